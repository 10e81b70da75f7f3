"""Offers: the couplings that every captured call of a region can follow, and the axes that cannot shrink."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ecospa_fx.couple.coupling import Coupling, Member
from ecospa_fx.couple.coupling_index import CouplingIndex, by_part
from ecospa_fx.couple.why import Path, path_between
from ecospa_fx.errors import PinnedAxisError
from ecospa_fx.passes.axes.algebra import Atom
from ecospa_fx.passes.axes.selection import Selected, Selection, entries, mask_of, narrow, whole
from ecospa_fx.passes.find.discover import RegionCoupling
from ecospa_fx.passes.find.left_whole import Refusal, UncoupledAxis
from ecospa_fx.passes.follow.follow import PythonSupport
from ecospa_fx.passes.graph.tensors import join
from ecospa_fx.passes.rewrite.replay import replay, selected_by, write_plan
from ecospa_fx.passes.rewrite.stored import check_state_layouts
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.tensor_parallel import Sharding

from .specialization import Specialization


@dataclass(frozen=True, eq=False)
class Offers:
    """The couplings of a region under a plan.

    Attributes:
        region: name of the region in the model.
        plan: the plan of the model.
        specializations: the captured calls of the region, the first one first. Names and entries are those of the
            first graph, so that they never change.
        python_support: where the region's own Python runs, what that can follow; else None.
        unsupported_marks: marks (see `_mark`) of couplings that some call before a save could not follow.
        across: atoms of the naming graph that are a coupling across regions -> its name.
        uncaptured: why a call could not be captured, if there is one: then nothing can shrink.
        shared_out: see `ModelState`.
    """

    region: str
    plan: Plan
    specializations: Sequence[Specialization]
    python_support: PythonSupport | None
    unsupported_marks: frozenset[str]
    uncaptured: str | None = None
    across: Mapping[Atom, str] = field(default_factory=dict)
    shared_out: Mapping[tuple[str, int], Sharding] = field(default_factory=dict)

    @property
    def naming_graph(self) -> Specialization:
        """The first captured specialization, from which names are taken."""
        return self.specializations[0]

    @cached_property
    def kept(self) -> dict[Atom, Selected]:
        """The plan, in atoms of the naming graph."""
        return replay(self.naming_graph.axis_facts, self.plan)

    def couplings(self) -> list[Coupling]:
        """Return the couplings that every call signature met so far can follow, at their sizes now."""
        return [self._coupling(offered) for offered in self.offered()] if self.specializations else []

    def offered(self) -> list[RegionCoupling]:
        """Return the same couplings as objects of the naming graph, at original sizes."""
        return [coupling for coupling in self.naming_graph.discovery.couplings if self._supported(coupling)]

    def marks(self) -> list[str]:
        """Return the marks of all that some call cannot follow, so that a save excludes it before such a call."""
        marks = set(self.unsupported_marks)
        if len(self.specializations) > 1 or (self.specializations and self.uncaptured is not None):
            for coupling in self.naming_graph.discovery.couplings:
                for context in (None, coupling.context):
                    if not self._supported(coupling, context):
                        marks.add(_mark(coupling, context))
        return sorted(marks)

    def refusals(self) -> list[Refusal]:
        """Return the axes that cannot shrink in some call signature, with the reasons."""
        discoveries = [each.discovery for each in reversed(self.specializations)]
        by_members = {refusal.members: refusal for discovery in discoveries for refusal in discovery.refusals}
        return [*by_members.values(), *self._refused_by_python(), *self._refused_for_a_call()]

    def uncoupled(self) -> list[UncoupledAxis]:
        """Return the axes of matrices that are neither on a coupling nor refused, with the reasons."""
        discovery = self.naming_graph.discovery
        offered, refused = set(self.offered()), {axis for refusal in self.refusals() for axis in refusal.members}
        axes = list(discovery.uncoupled)
        for coupling in discovery.couplings:
            members = tuple(f"{join(self.region, name)}[{dim}]" for name, dim in coupling.axes)
            if coupling not in offered and not set(members) <= refused:
                why = "another captured call of the model needs it whole"
                axes.append(UncoupledAxis(members, coupling.atom.size, (why,), self.region))
        return axes

    def write(self, plan: Plan, kept: Selection) -> None:
        """Write into `plan` the entries that parameters keep under a selection of the naming graph's atoms."""
        first = self.naming_graph.axis_facts
        write_plan(plan, self.region, first.parameters, kept)
        others = self.specializations[1:]
        known = first.parameters.keys() & first.captured.used() if others else set()
        for other in others:
            # A graph may use tensors that the others do not: noise that only training adds, statistics of a batch norm.
            more = {name: exprs for name, exprs in other.axis_facts.parameters.items() if name not in known}
            if more:
                write_plan(plan, self.region, more, selected_by(other.axis_facts, plan))
                known |= more.keys() & other.axis_facts.captured.used()

    def _supported(self, coupling: RegionCoupling, context: Atom | None = None) -> bool:
        """Decide whether every graph can follow a coupling of the first, or (`context`) one that differs by context."""
        if self.uncaptured is not None:
            return False
        if self.unsupported_marks and _mark(coupling, context) in self.unsupported_marks:
            return False
        support = self.python_support
        if support is not None and coupling.key not in (support.couplings if context is None else support.varied):
            return False
        return all(self._supported_by(each, coupling, context) for each in self.specializations[1:])

    def _supported_by(self, other: Specialization, coupling: RegionCoupling, context: Atom | None) -> bool:
        """Decide whether another graph of the region can follow a coupling of the naming graph."""
        if any(
            coupling.key == theirs.key and (context is None or coupling.context_key == theirs.context_key)
            for theirs in other.discovery.couplings
        ):
            return True
        # A graph that uses fewer of the weights sees less of the coupling and may still follow it: try it on a plan.
        choice = self.kept.get(coupling.atom, whole(coupling.atom))
        positions = torch.arange(entries(choice))
        if len(positions) > 1:
            live = mask_of(context, self.kept) if context is not None else None
            keep = positions[1:]
            if live is not None:  # other entries go in the first context than in the rest
                keep = torch.stack([keep] + [positions[positions != 1]] * (int(live.sum()) - 1))
            choice = narrow(choice, keep, context, live)
        selection = {**self.kept, coupling.atom: choice}
        trial = self.plan.copy()
        self.write(trial, selection)
        try:
            theirs = replay(other.axis_facts, trial)
            check_state_layouts([(self.naming_graph.axis_facts, selection), (other.axis_facts, theirs)])
        except PinnedAxisError:
            return False
        return True

    def _refused_for_a_call(self) -> Iterator[Refusal]:
        """Yield the couplings that no longer shrink, because the region has been called as no graph can be."""
        if self.uncaptured is not None and self.specializations:
            for coupling in self.naming_graph.discovery.couplings:
                members = tuple(f"{join(self.region, name)}[{dim}]" for name, dim in coupling.axes)
                yield Refusal(members, coupling.atom.size, (f"a call has no graph: {self.uncaptured}",), self.region)

    def _refused_by_python(self) -> Iterator[Refusal]:
        """Yield the couplings that only execution='graph' can shrink."""
        if self.python_support is None or not self.specializations:
            return
        for coupling in self.naming_graph.discovery.couplings:
            why = self.python_support.refused.get(coupling.key)
            if why is not None:
                members = tuple(f"{join(self.region, name)}[{dim}]" for name, dim in coupling.axes)
                reason = f"its own Python {why}; execution='graph' can shrink it"
                yield Refusal(members, coupling.atom.size, (reason,), self.region)

    def _coupling(self, offered: RegionCoupling) -> Coupling:
        """Describe a coupling of the naming graph as one of the model, at its size now."""
        axis_facts = self.naming_graph.axis_facts
        context = offered.context
        if context is not None and not self._supported(offered, context):
            context = None
        numbers = CouplingIndex(offered.atom, context, self.kept)
        support = self.python_support

        def why(a: str, b: str) -> Path:
            inside = [name.removeprefix(f"{self.region}.") for name in (a, b)]
            return path_between(axis_facts, offered.atom, inside[0], inside[1])

        members = tuple(self._members(offered, numbers))
        return Coupling(
            name=join(self.region, offered.name),
            kind=offered.kind,
            size=numbers.size,
            original_size=offered.atom.size,
            members=members,
            linear=offered.linear,
            region=self.region,
            explain_path=why,
            context=None if context is None else self._name_of(context),
            contexts=numbers.contexts,
            attention=None if offered.attention is None else f"{self.region}:{offered.attention}",
            changes=tuple(str(attribute.within(self.region)) for attribute in support.couplings[offered.key])
            if support is not None
            else (),
            in_step=tuple(self._names_of(support.in_step.get(offered.key, ()))) if support is not None else (),
            parts=parts_of(members, numbers.size, self.shared_out),
            least=max(c.least for c in self._in_each_graph(offered)),
            last_stays=self._last_stays(offered),
        )

    def _in_each_graph(self, offered: RegionCoupling) -> Iterator[RegionCoupling]:
        """Yield a coupling as each graph of the region has it."""
        yield from (found for s in self.specializations if (found := s.discovery.same(offered)) is not None)

    def _last_stays(self, offered: RegionCoupling) -> str | None:
        """Return the reason why one entry of a coupling stays, of the first graph that needs it."""
        support = self.python_support
        if support is not None and offered.key in support.last_stays:
            return f"its own Python {support.last_stays[offered.key]}; execution='graph' needs none"
        return next((c.last_stays for c in self._in_each_graph(offered) if c.last_stays is not None), None)

    def _members(self, offered: RegionCoupling, numbers: CouplingIndex) -> Iterator[Member]:
        axis_facts = self.naming_graph.axis_facts
        matrices = [name for name, _ in offered.axes if len(axis_facts.parameters[name]) > 1]
        for name, dim in offered.axes:
            if not axis_facts.captured.is_parameter(name):
                continue
            expr = axis_facts.parameters[name][dim]
            matrix = name in matrices
            of = name if matrix else nearest(name, offered.producers or matrices)
            writes, of = of in offered.producers, join(self.region, of)
            mask = mask_of(expr, self.kept)
            for part, index in by_part(expr, offered.atom):
                label = of if part is None else f"{of} part {part}"
                of_entry, of_context = numbers.read(expr, index, mask)
                yield Member(join(self.region, name), dim, of_entry, matrix, label, writes, part, of_context)

    def _names_of(self, keys: Iterable[object]) -> Iterator[str]:
        """Yield the names of couplings of the naming graph."""
        named = {coupling.key: coupling.name for coupling in self.naming_graph.discovery.couplings}
        yield from (join(self.region, named[key]) for key in keys if key in named)

    def _name_of(self, atom: Atom) -> str:
        """Return the name of the coupling along an atom, or words for an axis that has none."""
        couplings = self.naming_graph.discovery.couplings
        names = [join(self.region, coupling.name) for coupling in couplings if coupling.atom is atom]
        names += [self.across[atom]] if atom in self.across else []
        return names[0] if names else f"an axis of {atom.size} that stays whole"


def parts_of(members: Iterable[Member], size: int, shared_out: Mapping[tuple[str, int], Sharding]) -> int:
    """Return the number that the size of a coupling stays a multiple of, see `Coupling.parts`."""
    found: list[Tensor] = []  # [size, ranks]: the ranks that have a part of each entry
    for member in members:
        sharding = shared_out.get((member.parameter, member.dim))
        if sharding is not None:
            owned, ranks = member.index >= 0, sharding.owners(len(member.index))
            found.append(torch.zeros(size, sharding.ranks, dtype=torch.bool))
            found[-1][member.index[owned], ranks[owned]] = True
    if all(bool(each.all()) for each in found):
        return 1  # as the dims inside of heads, of which every rank has some
    apart = all(bool((each.sum(1) == 1).all()) and torch.equal(each, found[0]) for each in found)
    return found[0].shape[1] if apart else 0


def _mark(coupling: RegionCoupling, context: Atom | None) -> str:
    """Return a hash of the positions of a coupling, and of the context that it may differ by, on the parameters."""
    where = coupling.key if context is None else (coupling.key, coupling.context_key)
    return hashlib.sha256(repr(where).encode()).hexdigest()[:16]


def nearest(name: str, matrices: Sequence[str]) -> str:
    """Return the matrix whose name shares the longest prefix with that of a bias."""
    return max(matrices, key=lambda matrix: shared_prefix(name, matrix))


def shared_prefix(a: str, b: str) -> int:
    """Return how many letters two names begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
