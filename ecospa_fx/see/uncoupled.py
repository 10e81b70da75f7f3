"""Uncoupled axes: the dims of matrices that are on no coupling and in no refusal, each with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.model.region import Region
from ecospa_fx.passes.find.left_whole import Refusal, UncoupledAxis

from .snapshot import Snapshot


def uncoupled_axes(
    snapshot: Snapshot,
    regions: Iterable[Region],
    couplings: Iterable[Coupling],
    refusals: Iterable[Refusal],
    not_captured: Mapping[str, str],
) -> Iterator[UncoupledAxis]:
    """Yield what is known of each dim of each matrix of a model that is on no coupling and in no refusal."""
    told = {f"{member.parameter}[{member.dim}]" for coupling in couplings for member in coupling.members}
    told |= {axis for refusal in refusals for axis in refusal.members}
    for region in regions:
        for axis in region.offers.uncoupled() if region.specializations else ():
            told.update(axis.members)
            yield axis
    for name, (shape, _) in snapshot.tensors.items():
        for dim, size in enumerate(shape) if len(shape) > 1 and name not in snapshot.ties else ():
            axis_name = f"{name}[{dim}]"
            if size > 1 and axis_name not in told:
                inside = snapshot.region_of(name)
                reason = _outside(name, not_captured) if inside is None else "the captured call does not use it"
                yield UncoupledAxis((axis_name,), size, (reason,), "" if inside is None else inside.name)


def _outside(parameter: str, not_captured: Mapping[str, str]) -> str:
    """Return why a parameter is in no region."""
    around = [name for name in not_captured if name and parameter.startswith(f"{name}.")]
    if not around:
        return "it lies outside of the captured regions"
    name = max(around, key=len)
    return f"`{name}` was not captured: {not_captured[name]}"
