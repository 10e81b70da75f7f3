"""Every error the library raises on purpose. Each message says what, where, the values, and the way out."""

from __future__ import annotations


class EcoSpaError(Exception):
    """Base of all errors raised by ecospa_fx. The model is bit for bit as before whenever one is raised."""


class NoInputsError(EcoSpaError, ValueError):
    """Nothing to capture with: no example inputs were given and none can be derived."""


class CaptureError(EcoSpaError, RuntimeError):
    """torch.export could not capture a region, or the captured graph disagrees with eager."""


class RuleError(EcoSpaError, RuntimeError):
    """An axis rule failed on an op: a bug in the rule, not in the model."""


class PatternError(RuleError):
    """A pattern of an axis rule that is malformed or does not fit the op: a bug in the rule, not in the model."""


class NoCouplingError(EcoSpaError, ValueError):
    """The model has no coupling that can shrink, or none by the name that was asked for."""


class ShrinkError(EcoSpaError, ValueError):
    """A selection that cannot be applied: empty, out of range, unsorted, or of no coupling of this model."""


class PinnedAxisError(EcoSpaError, ValueError):
    """A new call signature needs an axis whole that has been shrunk already."""


class TargetError(EcoSpaError, ValueError):
    """A target or a schedule setting out of range, or a size that cannot be reached."""


class OptimizerError(EcoSpaError, ValueError):
    """An optimizer that does not belong to the model, or whose state cannot follow a shrink."""


class RestoreError(EcoSpaError, RuntimeError):
    """A module whose own forward cannot run with the weights that are left, or gives something else with them."""


class FormatError(EcoSpaError, ValueError):
    """A file format that cannot hold what is left of a model, or a file in it that nothing can be made of."""


class CheckpointError(EcoSpaError, ValueError):
    """A saved directory that is incomplete, altered, of another version, or of another model."""


class VerificationError(EcoSpaError, AssertionError):
    """A shrunk model that differs from the masked one."""
