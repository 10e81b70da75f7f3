"""Shrink: remove rows and columns of a compiled model by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.arguments import MAPPING, MODULE, having, instance, optional, takes
from ecospa_fx.couple.constraints import Constraints
from ecospa_fx.couple.coupling import CouplingSelection
from ecospa_fx.errors import ShrinkError
from ecospa_fx.logs import logger
from ecospa_fx.ranks.members import ranks_of
from ecospa_fx.ranks.wrappers import check_wrappers, unwrapped

from .compiled_code import forget_code
from .copies import copies_of
from .diff import ModuleDiff, diff_of, shapes_of
from .journal import Journal, all_or_nothing
from .keeping import keep_only
from .left_behind import left_behind
from .lookup import check_optimizer, state_of
from .optimizer_state import several
from .slicing import Absorber


@takes(
    model=MODULE, selection=MAPPING, absorb=optional(having("the moments of ecospa_fx.Grams", "absorbed")),
    constraints=optional(instance("an ecospa_fx.Constraints", Constraints)),
)  # fmt: skip
def shrink(
    model: nn.Module,
    selection: CouplingSelection,
    *,
    optimizer: Optimizer | Iterable[Optimizer] = (),
    also: Any = (),
    absorb: Absorber | None = None,
    constraints: Constraints | None = None,
) -> ModuleDiff:
    """Remove rows and columns by hand.

    Parameters stay the same objects; their gradients and the state of `optimizer` are sliced with them. On any error
    everything is as before.

    Of a model in `DistributedDataParallel` all ranks must call this, with the same entries to keep. It follows.

    Args:
        model: a compiled model.
        selection: coupling (or its name) -> sorted LongTensor of the entries to keep, in `0..coupling.size - 1`. It may
            be empty, for all to go, with `constraints=Constraints(min_keep=0)`.
        optimizer: the optimizer, or several, that hold the parameters. One with state that is left out refuses its next
            step.
        also: copies of the model that shrink with it, such as averages of its weights: modules, objects that hold some
            (`torch.optim.swa_utils.AveragedModel`, timm's `ModelEma`), dicts of names and tensors; or one of these.
        absorb: statistics of the inputs of weights. Where a weight sums over removed entries, the entries that stay
            take over by least squares, so that its output changes little; see docs/absorption.md.
        constraints: conditions that the sizes afterwards must meet, or nothing is removed.

    Returns:
        The sizes of every layer before and after; print it.

    Raises:
        ShrinkError: a selection is empty, out of range or not increasing, or an object in `also` is not a copy; or the
            sizes afterwards do not meet `constraints`.
        TargetError: no sizes meet `constraints`.
        NoCouplingError: there is no such coupling.
        OptimizerError: the optimizer holds none of the parameters, or state that cannot follow.
        PinnedAxisError: another call signature of the model needs an axis at full size.
        WrapperError: the model is spread over devices, in a wrapper that cannot follow.
        RanksError: another rank cannot shrink, or would by another plan; nothing changes on any of them.
    """

    def change(journal: Journal) -> ModuleDiff:
        check_wrappers(model)
        if constraints is not None:
            _check_sizes(unwrapped(model), selection, constraints)
        if constraints is None or constraints.min_keep:
            _check_some_stay(unwrapped(model), selection)
        return shrink_within(journal, model, selection, optimizer=optimizer, also=also, absorb=absorb)

    return all_or_nothing(change, ranks_of(model), "shrink")


def _check_sizes(model: nn.Module, selection: CouplingSelection, constraints: Constraints) -> None:
    by_name = {coupling.name: coupling for coupling in state_of(model).couplings()}
    named = {str(getattr(given, "name", given)): keep for given, keep in selection.items()}
    tensors = {name: keep for name, keep in named.items() if isinstance(keep, Tensor) and keep.ndim}
    sizes = {by_name[name]: keep.shape[-1] for name, keep in tensors.items() if name in by_name}
    constraints.check(model, tuple(by_name.values()), sizes)


def _check_some_stay(model: nn.Module, selection: CouplingSelection) -> None:
    """Refuse to remove all entries of a coupling where nobody has said that this may be."""
    by_name = {coupling.name: coupling for coupling in state_of(model).couplings()}
    for given, keep in selection.items():
        coupling = by_name.get(str(getattr(given, "name", given)))
        if coupling is None or not coupling.size or not isinstance(keep, Tensor) or keep.dtype != torch.long:
            continue
        if keep.ndim in (1, 2) and not keep.is_meta and not keep.numel():
            raise ShrinkError(
                f"cannot shrink `{coupling.name}` to nothing; at least one of its {coupling.size} entries must stay, "
                "unless constraints=Constraints(min_keep=0) lets the last one go"
            )


def shrink_within(
    journal: Journal,
    model: nn.Module,
    selection: CouplingSelection,
    *,
    optimizer: Optimizer | Iterable[Optimizer] = (),
    also: Any = (),
    absorb: Absorber | None = None,
) -> ModuleDiff:
    """Shrink as `shrink` does, as a part of a larger change."""
    model = unwrapped(model)
    compiled = state_of(model)
    optimizers = several(optimizer)
    for each in optimizers:
        check_optimizer(model, each)
    before, sizes = shapes_of(model), {coupling.name: coupling.size for coupling in compiled.couplings()}
    keep_only(compiled, model, selection, journal, optimizers, copies_of(model, also), absorb)
    change = diff_of(model, before)
    left_behind().note(model, change.before, optimizers)
    forget_code(model, change.before)
    log = logger("shrink")
    log.info("%s", change.headline())
    for coupling in compiled.couplings():
        if coupling.size != sizes[coupling.name]:
            log.debug("%s: %d -> %d", coupling.name, sizes[coupling.name], coupling.size)
    return change
