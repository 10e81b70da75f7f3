"""Errors raised by the library. Each message says what is wrong, where, the values, and the way out."""

from __future__ import annotations


class EcoSpaError(Exception):
    """Base class of all errors of ecospa_fx. Whenever one is raised, the model is unchanged, bit for bit."""


class ArgumentError(EcoSpaError, TypeError):
    """An argument of a kind that the function does not take."""


class NoInputsError(EcoSpaError, ValueError):
    """No inputs to capture with: none were given and the model offers none."""


class CaptureError(EcoSpaError, RuntimeError):
    """A region that torch.export cannot capture, or whose captured graph disagrees with eager."""


class TooManyCallsError(EcoSpaError, RuntimeError):
    """A shrunk region that has been called in too many ways, each with a graph of its own."""


class NotNowError(CaptureError):
    """A call that would have to be captured where nothing can be: in an export, in a transform of torch.func."""


class FirstCallError(CaptureError):
    """A call that registers what later calls find: it must come before the one that is captured."""


class RuleError(EcoSpaError, RuntimeError):
    """An axis rule that failed on an op: a bug in the rule, not in the model."""


class PatternError(RuleError):
    """A pattern of an axis rule that is malformed or does not fit the op: a bug in the rule, not in the model."""


class NoCouplingError(EcoSpaError, ValueError):
    """A model without a coupling that can shrink, or without one of the given name."""


class ShrinkError(EcoSpaError, ValueError):
    """A selection that cannot be applied: empty, out of range, unsorted, or not of a coupling of this model."""


class PinnedAxisError(EcoSpaError, ValueError):
    """A new call signature that needs an axis at full size which has shrunk already."""


class TargetError(EcoSpaError, ValueError):
    """A target or a schedule setting out of range, or a size that cannot be reached."""


class OptimizerError(EcoSpaError, ValueError):
    """An optimizer that does not belong to the model, or whose state cannot follow a shrink."""


class WrapperError(EcoSpaError, RuntimeError):
    """A model that is spread over devices by something that a shrink cannot bring along."""


class RanksError(EcoSpaError, RuntimeError):
    """Processes that train one model together and do not agree, or of which one has failed; raised on each of them."""


class RestoreError(EcoSpaError, RuntimeError):
    """A module whose own forward cannot run with the shrunk weights, or returns something else with them."""


class FormatError(EcoSpaError, ValueError):
    """A file format that cannot represent the shrunk model, or a file in it that cannot be used."""


class CheckpointError(EcoSpaError, ValueError):
    """A saved directory that is incomplete, altered, of another version, or of another model."""


class VerificationError(EcoSpaError, AssertionError):
    """A shrunk model that differs from the masked one."""
