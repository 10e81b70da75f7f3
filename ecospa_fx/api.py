"""Front door: compile a model, and compare its sizes with those before any shrink."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from ecospa_fx.model.compiled import MODEL, CompiledModel
from ecospa_fx.model.diff import ModuleDiff, diff_since
from ecospa_fx.model.lookup import plan
from ecospa_fx.model.lookup import regions_of as regions_of
from ecospa_fx.model.state import Execution

from .arguments import CALL, FLAG, MODULE, TEXT, takes
from .errors import EcoSpaError

Module = TypeVar("Module", bound=nn.Module)


@takes(model=MODULE, **CALL, experiments=FLAG, execution=TEXT)
def compile(
    model: Module,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    regions: str | Sequence[str] = "auto",
    experiments: bool = False,
    execution: Execution = "graph",
) -> Module:
    """Make a model shrinkable. It stays the same object, of the same class, with the same parameters.

    >>> model = ecospa_fx.compile(model)

    Without inputs it is captured at its first call, as in `torch.compile`.

    Args:
        model: any module.
        example_inputs: positional arguments of a call, to capture now.
        example_kwargs: keyword arguments of that call.
        regions: the submodules to capture as graphs: `"auto"` (repeated blocks where couplings close inside them, else
            the whole model, else the largest submodules that can be captured), `"blocks"`, `"root"`, or names of
            submodules.
        experiments: find an axis rule by experiment for an op that has none, where shrinking by it has been verified on
            this call. Evidence and not proof, so off unless asked for; `explain` names these ops.
        execution: `"graph"` runs generated code and offers every coupling. `"module"` runs the model's own Python,
            activation checkpointing included, and offers the couplings that it can follow: each is tried at other
            sizes, and integers such as a number of heads that must change with it are found and kept up to date.

    Returns:
        `model`.

    Raises:
        CaptureError: torch.export captures neither the blocks nor the root, or a captured graph disagrees with eager.
        NoCouplingError: nothing in the model can shrink.
    """
    existing: CompiledModel | None = model.__dict__.get(MODEL)
    if existing is not None:
        if existing.execution != execution:
            raise EcoSpaError(
                f"{type(model).__name__} is compiled with execution={existing.execution!r}; ecospa_fx.restore(model) "
                "undoes that"
            )
        if (
            existing.execution == "module"
            and existing.regions
            and not existing.captured
            and (example_inputs is not None or example_kwargs is not None)
        ):
            existing.capture_again(model, tuple(example_inputs or ()), dict(example_kwargs or {}))
        return model
    compiled = CompiledModel(regions, experiments, execution)
    if example_inputs is None and example_kwargs is None:
        compiled.attach(model)
    else:
        compiled.capture(model, tuple(example_inputs or ()), dict(example_kwargs or {}))
    return model


@takes(model=MODULE)
def diff(model: nn.Module) -> ModuleDiff:
    """Compare the sizes of every layer before any shrink and now; print the result.

    Raises:
        EcoSpaError: the model is not compiled.
    """
    return diff_since(model, plan(model))
