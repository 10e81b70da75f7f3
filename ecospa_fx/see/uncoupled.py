"""Uncoupled axes: the dims of matrices that are on no coupling and in no refusal, each with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.model.region import Region
from ecospa_fx.passes.find.left_whole import Refusal, UncoupledAxis
from ecospa_fx.passes.graph.tensors import join

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
            inside = snapshot.region_of(name)
            if size == 1 or f"{name}[{dim}]" in told:
                continue
            if inside is None:
                yield UncoupledAxis((f"{name}[{dim}]",), size, (_outside(name, not_captured),), "")
            elif name not in {join(inside.name, used) for used in inside.axis_facts.parameters}:
                yield UncoupledAxis((f"{name}[{dim}]",), size, ("the captured call does not use it",), inside.name)


def _outside(parameter: str, not_captured: Mapping[str, str]) -> str:
    """Return why a parameter is in no region."""
    around = [name for name in not_captured if name and parameter.startswith(f"{name}.")]
    if not around:
        return "it lies outside of the captured regions"
    name = max(around, key=len)
    return f"`{name}` was not captured: {not_captured[name]}"
