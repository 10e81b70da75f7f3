"""Front door: compile a model, and compare its sizes with those before any shrink."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from ecospa_fx.model.compiled import MODEL, REGION, CompiledModel
from ecospa_fx.model.diff import ModuleDiff, diff_since
from ecospa_fx.model.execution import Execution
from ecospa_fx.model.lookup import check_ready, plan
from ecospa_fx.model.lookup import regions_of as regions_of
from ecospa_fx.model.old_weights import say_of_sizes
from ecospa_fx.model.owners import check_owner
from ecospa_fx.ranks.wrappers import looks_inside, note_earlier, unwrapped

from .arguments import CALL, FLAG, MODULE, REGIONS, TEXT, takes
from .errors import EcoSpaError

Module = TypeVar("Module", bound=nn.Module)


@takes(model=MODULE, **CALL, regions=REGIONS, experiments=FLAG, execution=TEXT)
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
        model: any module; of `torch.compile(module)` and the like the module inside is compiled.
        example_inputs: positional arguments of a call, to capture now.
        example_kwargs: keyword arguments of that call.
        regions: the submodules to capture as graphs: `"auto"` (repeated blocks where couplings close inside them and
            reach most of what those of the whole model do, else the whole model, else the largest submodules that can
            be captured, joined if that covers more), `"blocks"`, `"joined"`, `"root"`, or names of submodules.
            `explain` says what lies outside.
            `"joined"`: blocks and the modules around them, with the couplings that cross their edges, such as a
            residual stream, which `"blocks"` keeps whole. After it has shrunk, blocks take and return smaller tensors:
            a hook, or a later call that returns hidden states, sees them at the size that is left.
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
        EcoSpaError: a part of it is compiled already, or it is, with another `execution`.
    """
    note_earlier()
    module = unwrapped(model)
    existing: CompiledModel | None = module.__dict__.get(MODEL)
    if existing is not None:
        if existing.execution != execution:
            raise EcoSpaError(
                f"{type(module).__name__} is compiled with execution={existing.execution!r}; ecospa_fx.restore(model) "
                "undoes that"
            )
        if (
            existing.execution == "module"
            and existing.regions
            and not existing.captured
            and (example_inputs is not None or example_kwargs is not None)
        ):
            existing.capture_again(module, tuple(example_inputs or ()), dict(example_kwargs or {}))
        return model
    _check_alone(module)
    check_ready(module)
    say_of_sizes(module)
    compiled = CompiledModel(regions, experiments, execution)
    if example_inputs is None and example_kwargs is None:
        compiled.attach(module)
    else:
        compiled.capture(module, tuple(example_inputs or ()), dict(example_kwargs or {}))
    return model


def _check_alone(model: nn.Module) -> None:
    """Refuse a model that is a part of a compiled one, or has a compiled one in it.

    Raises:
        EcoSpaError: it has, or is; the same weights would have two plans.
    """
    kind = type(model).__name__
    if REGION in model.__dict__:
        raise EcoSpaError(f"{kind} is a part of a model that is compiled already; use that model, or restore it first")
    for name, module in model.named_modules():
        if MODEL in module.__dict__:
            raise EcoSpaError(
                f"`{name}` ({type(module).__name__}) in this {kind} is compiled already, and what it has lost would be "
                f"unknown to the {kind}; use model.get_submodule({name!r}), or ecospa_fx.restore it first"
            )
    check_owner(model, (), MODEL)  # of its own regions nothing is known yet


@takes(model=MODULE)
@looks_inside
def diff(model: nn.Module) -> ModuleDiff:
    """Compare the sizes of every layer before any shrink and now; print the result.

    Raises:
        EcoSpaError: the model is not compiled.
    """
    return diff_since(model, plan(model))
