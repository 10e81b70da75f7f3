"""Planning: the plan of a shrink, from the entries of couplings that a user keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ecospa_fx.arguments import shown
from ecospa_fx.couple.constraints import check_none_left
from ecospa_fx.couple.coupling import Coupling, CouplingSelection
from ecospa_fx.errors import NoCouplingError, ShrinkError
from ecospa_fx.passes.axes.algebra import Atom
from ecospa_fx.passes.axes.selection import Selected, Selection, mask_of, narrow, whole
from ecospa_fx.passes.graph.tensors import join
from ecospa_fx.plan import Plan

from .joint_offers import JointOffer
from .region import Region


def planned(
    plan: Plan,
    regions: Mapping[str, Region],
    couplings: Iterable[Coupling],
    selection: CouplingSelection,
    joints: Iterable[JointOffer] = (),
) -> Plan:
    """Return the plan after keeping only the selected entries of each coupling.

    Args:
        plan: the plan now.
        regions: the regions of the model by name.
        couplings: its couplings, at their sizes now.
        selection: coupling or its name -> positions that stay.
        joints: the couplings among them that cross the edges of regions.

    Raises:
        ShrinkError: a selection is empty, out of range or not increasing.
        NoCouplingError: there is no such coupling.
    """
    by_name = {coupling.name: coupling for coupling in couplings}
    across = {offer.joint.name: offer for offer in joints}
    by_region: dict[str, dict[str, Tensor]] = {}
    atoms: dict[str, dict[Atom, Selected]] = {}
    after = plan.copy()
    for given, keep in selection.items():
        if not isinstance(given, (str, Coupling)):
            raise ShrinkError(
                f"a selection names couplings, and {shown(given)} is none; its keys are names or couplings"
            )
        name = given if isinstance(given, str) else given.name
        if name not in by_name:
            raise NoCouplingError(f"the model has no coupling `{name}`; it has {', '.join(by_name) or 'none'}")
        _check_keep(by_name[name], keep)
        if name in across:
            across[name].write_outside(after, keep)
            for region, selected in across[name].selections(keep).items():
                atoms.setdefault(region, {}).update(selected)
            continue
        by_region.setdefault(by_name[name].region, {})[name] = keep
    _check_steps(by_name, {name: keep for keeps in by_region.values() for name, keep in keeps.items()})
    for region_name in dict.fromkeys((*by_region, *atoms)):
        _plan_region(after, regions[region_name], by_region.get(region_name, {}), atoms.get(region_name, {}))
    for offer in across.values():
        offer.write_aliases(after)
    return after


def _check_steps(couplings: Mapping[str, Coupling], keeps: Mapping[str, Tensor]) -> None:
    """Refuse sizes that one integer of the model's own Python cannot hold.

    Raises:
        ShrinkError: couplings that are in step would keep other shares.
    """
    sizes = {name: keeps[name].shape[-1] if name in keeps else c.size for name, c in couplings.items()}
    for name in keeps:
        one = couplings[name]
        for other in (couplings[each] for each in one.in_step if each in couplings):
            if sizes[name] * other.original_size != sizes[other.name] * one.original_size:
                raise ShrinkError(
                    f"cannot shrink `{name}` to {sizes[name]} of {one.original_size} beside `{other.name}` at "
                    f"{sizes[other.name]} of {other.original_size}: the model's own Python has one number for both "
                    f"({', '.join(one.changes) or 'their sizes'}); keep the same share of both, or use "
                    "execution='graph'"
                )


def _plan_region(after: Plan, region: Region, keeps: Mapping[str, Tensor], atoms: Selection) -> None:
    """Write into `after` the entries that stay of one region."""
    before = region.kept(region.naming_graph.program)
    selection = {**before, **atoms}
    for coupling in region.naming_graph.discovery.couplings:
        keep = keeps.get(join(region.name, coupling.name))
        if keep is not None:
            choice = before.get(coupling.atom, whole(coupling.atom))
            # Contexts are counted as they are before this shrink, which may take some of them too.
            live = mask_of(coupling.context, before) if coupling.context is not None else None
            selection[coupling.atom] = narrow(choice, keep.cpu(), coupling.context, live)
    region.offers.write(after, selection)


def _check_keep(coupling: Coupling, keep: Tensor) -> None:
    where, way = f"`{coupling.name}`", "keep is a sorted LongTensor of positions that stay"
    if coupling.context is not None:
        way += f", or one row of them for each of its {coupling.contexts} contexts"
    if isinstance(keep, Tensor) and keep.is_meta:
        raise ShrinkError(f"cannot shrink {where}: keep is on the meta device and has no values; {way}")
    if not isinstance(keep, Tensor) or keep.dtype != torch.long or keep.ndim not in (1, 2):
        shape = f"{keep.dtype} of shape {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
        raise ShrinkError(f"cannot shrink {where}: keep is {shape}; {way}")
    if keep.ndim == 2 and coupling.context is None:
        raise ShrinkError(
            f"cannot shrink {where}: keep has {len(keep)} rows, but this coupling keeps the same entries in every "
            f"context; {way}"
        )
    if keep.ndim == 2 and len(keep) != coupling.contexts:
        raise ShrinkError(f"cannot shrink {where}: keep has {len(keep)} rows; it has {coupling.contexts} contexts now")
    left = keep.shape[-1]
    if not left:
        check_none_left(coupling)
        return
    if left < coupling.least:
        raise ShrinkError(
            f"cannot shrink {where} to {left}: its model takes the best {coupling.least} of its entries (a top-k), so "
            f"keep at least {coupling.least}"
        )
    if left != coupling.size and (coupling.parts == 0 or left % coupling.parts):
        why = (
            f"{coupling.parts} ranks share its entries out by tensor parallelism, and {left} would stay; keep a "
            f"multiple of {coupling.parts}"
            if coupling.parts
            else "tensor parallelism cuts its entries apart, so that ranks have parts of them"
        )
        raise ShrinkError(f"cannot shrink {where}: {why}")
    if int(keep.min()) < 0 or int(keep.max()) >= coupling.size:
        raise ShrinkError(
            f"cannot shrink {where}: keep reaches from {int(keep.min())} to {int(keep.max())}, and it has entries 0 to "
            f"{coupling.size - 1} now"
        )
    if bool((keep.diff(dim=-1) <= 0).any()):
        raise ShrinkError(f"cannot shrink {where}: keep is not increasing; {way}, sort it and drop repeats")
