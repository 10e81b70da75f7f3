"""Joint offers: the couplings that cross the edges of regions, as the regions of a model can follow them now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecospa_fx.couple.coupling import Coupling, Member
from ecospa_fx.couple.coupling_index import CouplingIndex, by_part
from ecospa_fx.couple.why import Path, PathStep, path_between
from ecospa_fx.errors import NoCouplingError, PinnedAxisError
from ecospa_fx.passes.axes.algebra import Atom, atoms_of
from ecospa_fx.passes.axes.selection import Selected, mask_of, narrow, whole
from ecospa_fx.passes.find.discover import RegionCoupling
from ecospa_fx.passes.find.joint import Joint
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.border import WeightDim
from ecospa_fx.passes.rewrite.replay import replay
from ecospa_fx.plan import Plan

from .offers import nearest, parts_of

if TYPE_CHECKING:
    from .region import Region
    from .state import ModelState


@dataclass(frozen=True, eq=False)
class JointOffer:
    """A coupling across regions, and the regions of a model.

    Attributes:
        joint: the coupling at original sizes.
        state: the state of the model.
        regions: all its regions by name.
    """

    joint: Joint
    state: ModelState
    regions: Mapping[str, Region]

    def touched(self) -> list[Region]:
        """Return the regions that it lies in, or passes through."""
        along = self.joint.members[0]
        inside = {name for name in (self._region_of(member) for member in self.joint.members) if name is not None}
        return [
            region for name, region in self.regions.items() if name in inside or along in region.border.along().values()
        ]

    def atoms(self, region: Region) -> list[Atom]:
        """Return the atoms of a region's first graph that it is."""
        return atoms_at_edges(region.naming_graph.axis_facts, self.joint)

    def coupling(self) -> Coupling | None:
        """Describe it as a coupling of the model at its size now; None if some call cannot follow it."""
        if not self.supported():
            return None
        kept = {region.name: region.offers.kept for region in self.touched()}
        members = tuple(member for each in self.joint.members for member in self._members(each, kept))
        size = len(self._left(self.state.plan))
        return Coupling(
            name=self.joint.name,
            kind=self.joint.kind,
            size=size,
            original_size=self.joint.size,
            members=members,
            linear=self.joint.linear,
            region="",
            explain_path=self._why,
            parts=parts_of(members, size, self.state.shared_out),
        )

    def supported(self) -> bool:
        """Decide whether every captured call of its regions can follow it."""
        regions = self.touched()
        if self.joint.name in self.state.withheld or any(r.uncaptured or not r.specializations for r in regions):
            return False
        if any(self._pinned(region) for region in regions):
            return False
        others = [(region, each) for region in regions for each in region.specializations[1:]]
        if not others:
            return True
        # A graph that uses fewer of the weights may still follow it: try it on a plan.
        trial = self.state.plan.copy()
        left = len(self._left(trial))
        self.write(trial, torch.arange(left)[1:] if left > 1 else torch.arange(left))
        try:
            for _, each in others:
                replay(each.axis_facts, trial)
        except PinnedAxisError:
            return False
        return True

    def _pinned(self, region: Region) -> bool:
        atoms = set(self.atoms(region))
        return any(
            fact.role == "pinned" and not atoms.isdisjoint(atoms_of(fact.expr))
            for fact in region.naming_graph.axis_facts.facts
        )

    def selections(self, keep: Tensor) -> dict[str, dict[Atom, Selected]]:
        """Return by region the entries of its atoms that stay, at original sizes, of those that there are now."""
        found: dict[str, dict[Atom, Selected]] = {}
        for region in self.touched():
            kept = region.offers.kept
            found[region.name] = {atom: narrow(kept.get(atom, whole(atom)), keep.cpu()) for atom in self.atoms(region)}
        return found

    def write(self, plan: Plan, keep: Tensor) -> None:
        """Write into `plan` what all parameters keep when only `keep` stays of the entries that there are now."""
        for name, selection in self.selections(keep).items():
            region = self.regions[name]
            region.offers.write(plan, {**region.offers.kept, **selection})
        self.write_outside(plan, keep)
        self.write_aliases(plan)

    def write_outside(self, plan: Plan, keep: Tensor) -> None:
        """Write into `plan` what parameters outside of all regions keep."""
        for name, dim in self.joint.outside:
            positions = self._left(self.state.plan)[keep.cpu()]
            plan.original_shapes[name] = self.joint.shapes[name]
            plan.kept[name, dim] = positions

    def write_aliases(self, plan: Plan) -> None:
        """Write into `plan` what tied members keep under names that lie in no region."""
        for name, of in self.joint.aliases.items():
            if of in plan.original_shapes:
                plan.original_shapes[name] = plan.original_shapes[of]
                plan.kept |= {(name, dim): kept for (each, dim), kept in plan.kept.items() if each == of}

    def _left(self, plan: Plan) -> Tensor:
        """Return the original entries that a plan keeps."""
        kept = plan.kept.get(self.joint.members[0])
        return torch.arange(self.joint.size) if kept is None else kept

    def _region_of(self, member: WeightDim) -> str | None:
        if member in self.joint.outside:
            return None
        return next((name for name in self.regions if member[0].startswith(f"{name}.")), None)

    def _members(self, member: WeightDim, kept: Mapping[str, Mapping[Atom, Selected]]) -> Iterator[Member]:
        full, dim = member
        region = self._region_of(member)
        matrix = full in self.joint.matrices
        of = full if matrix else nearest(full, self.joint.producers or self.joint.matrices)
        writes = of in self.joint.producers
        if region is None:
            yield Member(full, dim, torch.arange(len(self._left(self.state.plan))), matrix, of, writes)
            return
        facts = self.regions[region].naming_graph.axis_facts
        inside = full.removeprefix(f"{region}.")
        if inside not in facts.parameters or not facts.captured.is_parameter(inside):
            return
        expr = facts.parameters[inside][dim]
        for atom in [atom for atom in dict.fromkeys(atoms_of(expr)) if atom in self.atoms(self.regions[region])]:
            numbers, mask = CouplingIndex(atom, None, kept[region]), mask_of(expr, kept[region])
            for part, index in by_part(expr, atom):
                label = of if part is None else f"{of} part {part}"
                yield Member(full, dim, numbers.read(expr, index, mask)[0], matrix, label, writes, part)

    def _why(self, a: str, b: str) -> Path:
        """Return the path between two parameters: inside one region, or through the edges of two."""
        names = {name for name, _ in self.joint.members}
        for name in (a, b):
            if name not in names:
                raise NoCouplingError(
                    f"`{name}` is not a member of this coupling; its members are {', '.join(sorted(names))}"
                )
        regions = [self._region_of(next(m for m in self.joint.members if m[0] == name)) for name in (a, b)]
        if regions[0] is not None and regions[0] == regions[1]:
            region = self.regions[regions[0]]
            inside = [name.removeprefix(f"{region.name}.") for name in (a, b)]
            for atom in self.atoms(region):
                try:
                    return path_between(region.naming_graph.axis_facts, atom, inside[0], inside[1])
                except NoCouplingError:
                    continue
        ends = [next(f"{n}[{d}]" for n, d in self.joint.members if n == name) for name in (a, b)]
        places = [f"`{region}`" if region else "the model's own Python" for region in regions]
        step = PathStep(
            op="the edge of a region",
            where=f"{places[0]}, {places[1]}",
            before=ends[0],
            after=ends[1],
            because="a tensor that one returns reaches the other, and nothing on the way needs the axis whole",
        )
        return Path(ends[0], ends[1], (step,))


def atoms_at_edges(axis_facts: AxisFacts, joint: Joint) -> list[Atom]:
    """Return the atoms of a graph that are a coupling across regions."""
    along = axis_facts.captured.border.along()
    edges = [
        axis_facts.crossing[edge]
        for edge, of in along.items()
        if of == joint.members[0] and edge in axis_facts.crossing
    ]
    return list(dict.fromkeys(atom for expr in edges for atom in atoms_of(expr)))


def parts_across(state: ModelState, axis_facts: AxisFacts) -> Iterator[tuple[str, RegionCoupling]]:
    """Yield the couplings across regions that a graph has a part of, by name, as couplings of that graph."""
    for joint in state.joints:
        for atom in atoms_at_edges(axis_facts, joint):
            axes = tuple(
                (name, dim)
                for name, exprs in axis_facts.parameters.items()
                for dim, expr in enumerate(exprs)
                if atom in atoms_of(expr)
            )
            yield joint.name, RegionCoupling((joint.name,), axes, joint.name, atom, joint.kind, joint.linear, ())


def joint_offers(state: ModelState, regions: Mapping[str, Region]) -> Sequence[JointOffer]:
    """Return the couplings across regions of a model."""
    return [JointOffer(joint, state, regions) for joint in state.joints]
