"""The front door: compile, explain, couplings, shrink, plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from .compiled import MODEL, CompiledModel, Execution
from .copies import copies_of
from .coupling import Coupling, Selection
from .diff import ModuleDiff, diff_of, diff_since, shapes_of
from .errors import EcoSpaError, NoInputsError, OptimizerError
from .logs import logger
from .optimizers import several
from .plan import Plan
from .region import Region

if TYPE_CHECKING:
    from .grams import Grams

Module = TypeVar("Module", bound=nn.Module)


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

    Without inputs it is captured at its first call, as `torch.compile` does it.

    Args:
        model: any module.
        example_inputs: positional arguments of a call, to capture now.
        example_kwargs: keyword arguments of that call.
        regions: what to capture as graphs: `"auto"` (repeated blocks where couplings close inside them, else the
            whole, else the largest submodules that can be captured), `"blocks"`, `"root"`, or names of submodules.
        experiments: let an op that no axis rule is known for have one by experiment, where shrinking by it has been
            verified on this call. Evidence and not proof, so off unless asked for; `explain` names these ops.
        execution: `"graph"` runs generated code and offers every coupling. `"module"` runs the model's own Python, so
            that checkpointing and whatever else it does are its own, and offers what that can follow: each coupling is
            tried at other sizes, and integers such as a number of heads that must change with it are found and kept
            up to date.

    Returns:
        `model`.

    Raises:
        CaptureError: torch.export captures neither the blocks nor the root, or what it captures disagrees with eager.
        NoCouplingError: nothing in the model can shrink.
    """
    known: CompiledModel | None = model.__dict__.get(MODEL)
    if known is not None:
        if known.execution != execution:
            raise EcoSpaError(
                f"{type(model).__name__} is compiled with execution={known.execution!r}; ecospa_fx.restore(model) "
                "undoes that"
            )
        if (
            known.execution == "module"
            and known.regions
            and not known.captured
            and (example_inputs is not None or example_kwargs is not None)
        ):
            known.capture_again(model, tuple(example_inputs or ()), dict(example_kwargs or {}))
        return model
    compiled = CompiledModel(regions, experiments, execution)
    if example_inputs is None and example_kwargs is None:
        compiled.attach(model)
    else:
        compiled.capture(model, tuple(example_inputs or ()), dict(example_kwargs or {}))
    return model


def state_of(model: nn.Module) -> CompiledModel:
    """The state of a compiled and captured model.

    Raises:
        EcoSpaError: it was not compiled, or weights were tied that have shrunk apart.
        NoInputsError: it was, and has not been called yet.
    """
    compiled: CompiledModel | None = model.__dict__.get(MODEL)
    if compiled is None:
        raise EcoSpaError(f"{type(model).__name__} is not compiled; call ecospa_fx.compile(model) first")
    if not compiled.captured:
        raise NoInputsError(
            f"{type(model).__name__} is compiled but has not been called yet, so nothing is known of it; call it once, "
            "or compile it with example_inputs=(x,)"
        )
    compiled.follow_ties(model)
    return compiled


def is_captured(model: nn.Module) -> bool:
    """Whether a model is compiled and has been called, so that its couplings are known."""
    compiled: CompiledModel | None = model.__dict__.get(MODEL)
    return compiled is not None and compiled.captured


def regions_of(model: nn.Module) -> dict[str, Region]:
    """The regions of a compiled model by name; none before its first call, unless it was loaded."""
    compiled: CompiledModel | None = model.__dict__.get(MODEL)
    return {} if compiled is None else compiled.regions


def couplings(model: nn.Module) -> tuple[Coupling, ...]:
    """The couplings of a compiled model, at their sizes now.

    Raises:
        NoInputsError: the model has not been called yet.
    """
    return state_of(model).couplings()


def shrink(
    model: nn.Module,
    selection: Selection,
    *,
    optimizer: Optimizer | Iterable[Optimizer] = (),
    also: Any = (),
    absorb: Grams | None = None,
) -> ModuleDiff:
    """Remove rows and columns by hand.

    Parameters stay the same objects; their gradients and the state of `optimizer` are sliced with them. Either all of
    it happens or nothing.

    Args:
        model: a compiled model.
        selection: coupling (or its name) -> sorted LongTensor of the entries to keep, in `0..coupling.size - 1`.
        optimizer: the optimizer, or several, that hold the parameters.
        also: copies of the model that shrink with it, such as averages of its weights: modules, objects that hold some
            (`torch.optim.swa_utils.AveragedModel`, timm's `ModelEma`), dicts of names and tensors; or one of these.
        absorb: what was gathered of what weights meet. Where a weight sums over what goes, its entries that stay take
            over by least squares, so that what it computes changes little; see docs/absorption.md.

    Returns:
        The sizes of every layer before and after; print it.

    Raises:
        ShrinkError: a selection is empty, out of range or not increasing, or something in `also` is no copy.
        NoCouplingError: there is no such coupling.
        OptimizerError: the optimizer holds none of the parameters, or state that cannot follow.
        PinnedAxisError: another call signature of the model needs an axis whole.
    """
    compiled = state_of(model)
    optimizers = several(optimizer)
    for each in optimizers:
        check_optimizer(model, each)
    before, sizes = shapes_of(model), {coupling.name: coupling.size for coupling in compiled.couplings()}
    compiled.shrink(model, selection, optimizers, copies_of(model, also), absorb)
    change = diff_of(model, before)
    log = logger("shrink")
    log.info("%s", change.headline())
    for coupling in compiled.couplings():
        if coupling.size != sizes[coupling.name]:
            log.debug("%s: %d -> %d", coupling.name, sizes[coupling.name], coupling.size)
    return change


def plan(model: nn.Module) -> Plan:
    """What is left of the original model: a copy of the plan.

    Raises:
        EcoSpaError: the model is not compiled.
    """
    compiled = model.__dict__.get(MODEL)
    if compiled is None:
        raise EcoSpaError(f"{type(model).__name__} is not compiled; call ecospa_fx.compile(model) first")
    result: Plan = compiled.plan.copy()
    return result


def diff(model: nn.Module) -> ModuleDiff:
    """The sizes of every layer before any shrink and now; print it.

    Raises:
        EcoSpaError: the model is not compiled.
    """
    return diff_since(model, plan(model))


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer that holds none of the model's parameters.

    Raises:
        OptimizerError: it holds none.
    """
    mine = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(p) in mine for p in held):
        raise OptimizerError(
            f"this {type(optimizer).__name__} holds {len(held)} parameters, none of them of this "
            f"{type(model).__name__}; pass the one made from model.parameters()"
        )
