"""Joints: couplings that cross the edges of regions, such as a residual stream through a stack of blocks.

    find_joints(between, analyses)
      -> border           every dim of a tensor that one region returns and another takes, at first
      -> infer_axes       each graph once more with that border, equal blocks once together; and the ops between
      -> Classes          the atoms of all graphs that a tensor or a tied weight joins are one axis
      -> refused          one that something pins, or along which no weights meet, leaves the border; again from there
      -> Joint            what is left: a coupling with members in several regions

Leaving the border means being pinned at the edge of the region, as without joints, so that no coupling is lost by it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ecospa_fx.passes.axes.algebra import UNIT, Atom, Expr, atoms_of
from ecospa_fx.passes.capture.between import Between, RegionCall
from ecospa_fx.passes.capture.uniform import is_uniform
from ecospa_fx.passes.graph.nodes import op_name, reason_text
from ecospa_fx.passes.graph.tensors import join, named_tensors, storage_key
from ecospa_fx.passes.infer.infer import infer_axes, inferred_again
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Exprs
from ecospa_fx.passes.ir.border import Border, Edge, WeightDim

from .analyse import Analysis
from .discover import Weighed, discover, is_linear, kind_of, least_entries, meet, named, weighed
from .joint import BETWEEN, Across, Classes, Joint, Place
from .left_whole import Refusal


@dataclass
class _Region:
    """A region while joints are looked for: its graphs, and the edges that may shrink."""

    name: str
    analyses: tuple[Analysis, ...]
    edges: set[Edge] = field(default_factory=set)
    facts: list[AxisFacts] = field(default_factory=list)


class JointSearch:
    """The search for joints in one forward.

    Args:
        model: the model.
        between: a forward of it.
        analyses: the regions by name.
        refused: see `find_joints`.
        experiments: see `infer_axes`.
        edges: the dims at the edges of regions that may shrink, where joints are known; None looks for them.
    """

    def __init__(
        self,
        model: nn.Module,
        between: Between,
        analyses: Mapping[str, Analysis],
        refused: Mapping[WeightDim, str],
        experiments: bool,
        edges: Mapping[str, Collection[Edge]] | None = None,
    ) -> None:
        self.model, self.tensors = model, named_tensors(model)
        self.order = {name: i for i, name in enumerate(self.tensors)}
        self.between, self.refused, self.experiments = between, refused, experiments
        self.regions = {name: _Region(name, (a, *a.others)) for name, a in analyses.items()}
        self.served = [self._served(call) for call in between.calls]
        self.outer = {n.name: n for n in between.captured.graph.nodes if n.op == "placeholder"}
        self.ties = self._ties()
        self._inferred: dict[Any, AxisFacts] = {}
        self._weighed: dict[Any, tuple[AxisFacts, dict[Atom, Weighed]]] = {}
        self._keys: dict[Any, tuple[AxisFacts, set[Any]]] = {}
        self.refusals: dict[tuple[str, ...], Refusal] = {}
        self.joints: list[Joint] = []
        self.places: list[tuple[Place, ...]] = []
        self.of: dict[str, dict[Edge, int]] = {}
        self.known = edges is not None
        for region in self.regions.values():
            region.edges = self._candidates(region) if edges is None else set(edges.get(region.name, ()))

    def _served(self, call: RegionCall) -> int | None:
        """Return the number of the graph that serves a call."""
        region = self.regions[call.region]
        if len(region.analyses) == 1 or call.call is None:
            return 0
        for i, analysis in enumerate(region.analyses):
            if analysis.captured.mismatch(call.call, analysis.captured.signature.training) is None:
                return i
        return None

    def _ties(self) -> list[list[tuple[str, str]]]:
        """Return the weights that lie in several places, each as (region, name in it)."""
        inside = {
            id(module): (name, path)
            for name in self.regions
            for path, module in self.model.get_submodule(name).named_modules()
        }
        used = {storage_key(self.tensors[name]): name for name in self.between.captured.tensors.values()}
        places: dict[Any, dict[tuple[str, str], None]] = defaultdict(dict)
        for name, tensor in self.tensors.items():
            path, _, attribute = name.rpartition(".")
            region, path = inside.get(id(self.model.get_submodule(path)), (None, ""))
            key = (storage_key(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
            if region is not None:
                places[key][region, join(path, attribute)] = None
            elif storage_key(tensor) not in used:
                places[key]["", name] = None  # something that the forward does not use
            if storage_key(tensor) in used:
                places[key][BETWEEN, used[storage_key(tensor)]] = None
        shared = {
            (n, inner) for n, r in self.regions.items() for a in r.analyses for inner in a.captured.shared_outside
        }
        return [list(held) for held in places.values() if len(held) > 1 or held.keys() & shared]

    def _candidates(self, region: _Region) -> set[Edge]:
        """Return the dims at the edge of a region whose sizes are known and that something else sees."""
        edges: set[Edge] = set()
        calls = [(c, n) for c, n in zip(self.between.calls, self.served, strict=True) if c.region == region.name]
        if not calls or any(n is None for _, n in calls):
            return edges
        given = {name for call, _ in calls for name, node in call.arguments.items() if node is not None}
        given -= {name for call, _ in calls for name, node in call.arguments.items() if node is None}
        for analysis in region.analyses:
            captured = analysis.captured
            shapes = dict(zip(captured.arguments.values(), captured.signature.tensors, strict=False))
            for name in given & shapes.keys():
                edges |= {("argument", name, dim) for dim, n in enumerate(shapes[name][2]) if type(n) is int and n > 1}
            for i, exprs in enumerate(analysis.axis_facts.results):
                edges |= {
                    ("result", i, dim) for dim, e in enumerate(exprs) if isinstance(e, Atom) and type(e.size) is int
                }
        for held in self.ties:
            for name in [name for where, name in held if where == region.name]:
                if any(name in a.captured.shared_outside for a in region.analyses):
                    edges |= {("tied", name, dim) for dim in range(self.tensors[join(region.name, name)].ndim)}
        return edges

    # One round.

    def infer(self) -> AxisFacts:
        """Infer the axes of every graph with its border as it is now, and of the ops between; return the latter."""
        for region in self.regions.values():
            border = Border.of(dict.fromkeys(region.edges))
            region.facts = [self._with_border(analysis, border) for analysis in region.analyses]
        arguments: set[tuple[str, int]] = set()
        for call in self.between.calls:
            for i, node in enumerate(call.results):
                arguments |= {
                    (node.name, dim)
                    for kind, number, dim in self.regions[call.region].edges
                    if (kind, number) == ("result", i)
                }
        ties = {(name, dim) for held in self.ties for where, name in held if where == BETWEEN
                for dim in range(self.tensors[name].ndim)}  # fmt: skip
        border = Border(dict.fromkeys(arguments), {}, dict.fromkeys(ties))
        return infer_axes(replace(self.between.captured, border=border), False)

    def _with_border(self, analysis: Analysis, border: Border) -> AxisFacts:
        """Infer the axes of a graph with a border; equal blocks share the result."""
        before = analysis.axis_facts
        captured = replace(analysis.captured, border=border)
        if border.edges() == before.captured.border.edges():
            return replace(before, captured=captured)
        key = (id(before.facts), border)
        if key not in self._inferred:
            self._inferred[key] = inferred_again(before, captured, self.experiments)
        found = self._inferred[key]
        # Paths into caches have the numbers of another block in them.
        stored = dict(zip(before.stored, found.stored.values(), strict=True))
        return replace(found, captured=captured, stored=stored)

    def classes(self, outer: AxisFacts) -> Classes:
        """Join the atoms of all graphs."""
        classes = Classes()
        uncalled = set() if self.known else self.regions.keys() - {call.region for call in self.between.calls}
        for region in self.regions.values():
            for number, facts in enumerate(region.facts):
                for atom in {atom for expr in facts.crossing.values() for atom in atoms_of(expr)}:
                    classes.find((region.name, number, atom))
                    for name in uncalled:  # a block that is left out at random, say
                        reason = f"`{name}` is not called in the forward that was followed, and may take it"
                        classes.pin((region.name, number, atom), reason)
                if number:
                    self._join_graphs(classes, region, number)
        for call, served in zip(self.between.calls, self.served, strict=True):
            self._join_call(classes, call, served or 0, outer)
        for held in self.ties:
            self._join_ties(classes, held, outer)
        for fact in outer.facts:
            if fact.role == "pinned":
                for atom in atoms_of(fact.expr):
                    classes.pin((BETWEEN, 0, atom), reason_text(fact.reason, fact.node, ""))
        for source in outer.sources:
            reason = f"{op_name(source.user)} between the regions takes a tensor along it that does not shrink"
            for atom in (
                a for dim, e in enumerate(source.exprs) if not is_uniform(source.node, dim) for a in atoms_of(e)
            ):
                classes.pin((BETWEEN, 0, atom), reason_text(reason, source.user, ""))
        for node, where in self.between.kept.items():
            for expr in (expr for exprs in outer.values.get(node, ()) for expr in exprs):
                for atom in atoms_of(expr):
                    classes.pin((BETWEEN, 0, atom), where)
        return classes

    def _join_call(self, classes: Classes, call: RegionCall, number: int, outer: AxisFacts) -> None:
        region = self.regions[call.region]
        facts = region.facts[number]
        for i, node in enumerate(call.results):
            self._join_edges(classes, region, number, facts, "result", i, outer.values.get(node))
        for name, value in call.arguments.items():
            self._join_edges(classes, region, number, facts, "argument", name,
                             None if value is None else outer.values.get(value))  # fmt: skip
            # A tensor that enters a region along a dim that stays whole there stays whole everywhere.
            exprs = () if value is None else next(iter(outer.values.get(value, ())), ())
            for dim, expr in enumerate(exprs):
                if ("argument", name, dim) not in region.edges:
                    for atom in atoms_of(expr):
                        classes.pin((BETWEEN, 0, atom), f"`{call.region}` takes it as dim {dim} of `{name}`, whole")
        for value in call.held:
            for expr in (expr for exprs in outer.values.get(value, ()) for expr in exprs):
                for atom in atoms_of(expr):
                    classes.pin((BETWEEN, 0, atom), f"`{call.region}` is called with an object that holds it")

    def _join_edges(
        self, classes: Classes, region: _Region, number: int, facts: AxisFacts, kind: str, name: Any,
        outside: tuple[Exprs, ...] | None,
    ) -> None:  # fmt: skip
        for dim in [dim for k, n, dim in region.edges if (k, n) == (kind, name)]:
            expr = facts.crossing.get((kind, name, dim))
            if expr is None:  # another graph of the region has it
                continue
            other = outside[0][dim] if outside else None
            if other is None:
                for atom in atoms_of(expr):
                    classes.pin(
                        (region.name, number, atom), f"`{region.name}` gets or returns it in a way not followed"
                    )
                continue
            self._same(classes, (region.name, number, expr), (BETWEEN, 0, other), f"the edge of `{region.name}`")

    def _same(self, classes: Classes, a: tuple[str, int, Expr], b: tuple[str, int, Expr], where: str) -> None:
        """Make two dims one axis. One that is divided on either side stays whole."""
        if isinstance(a[2], Atom) and isinstance(b[2], Atom) and a[2].size == b[2].size and type(a[2].size) is int:
            classes.unite((a[0], a[1], a[2]), (b[0], b[1], b[2]))
            return
        for region, number, expr in (a, b):
            for atom in atoms_of(expr):
                classes.pin((region, number, atom), f"it is one axis on one side of {where}, and divided on the other")

    def _join_ties(self, classes: Classes, held: Sequence[tuple[str, str]], outer: AxisFacts) -> None:
        first: tuple[str, int, Exprs] | None = None
        for where, name in held:
            graphs = [outer] if where == BETWEEN else self.regions[where].facts if where else []
            if where == "":
                continue
            for number, facts in enumerate(graphs):
                exprs = facts.parameters.get(name)
                if exprs is None:
                    continue
                if first is None:
                    first = where, number, exprs
                    continue
                for a, b in zip(first[2], exprs, strict=True):
                    if a != UNIT or b != UNIT:
                        self._same(classes, (*first[:2], a), (where, number, b), f"the tie of `{join(where, name)}`")

    def _join_graphs(self, classes: Classes, region: _Region, number: int) -> None:
        """Join the graphs of different calls of one region along the weights that they share."""
        first, other = region.facts[0], region.facts[number]
        for name, exprs in other.parameters.items():
            for a, b in zip(first.parameters.get(name, ()), exprs, strict=False):
                atoms, others = atoms_of(a), atoms_of(b)
                if [atom.size for atom in atoms] == [atom.size for atom in others]:
                    for x, y in zip(atoms, others, strict=True):
                        classes.unite((region.name, 0, x), (region.name, number, y))
                else:
                    for n, these in ((0, atoms), (number, others)):
                        for atom in these:
                            classes.pin((region.name, n, atom), f"two calls of `{region.name}` divide `{name}` apart")

    def parts(self, places: Sequence[Place], outer: AxisFacts) -> list[Weighed]:
        """Return what is known of each atom of a class."""
        found = []
        for region, number, atom in places:
            facts = outer if region == BETWEEN else self.regions[region].facts[number]
            key = id(facts.facts)
            if key not in self._weighed:
                also = {a for expr in facts.crossing.values() for a in atoms_of(expr)}
                also |= (
                    {a for exprs in facts.values.values() for e in exprs for x in e for a in atoms_of(x)}
                    if (region == BETWEEN)
                    else set()
                )
                self._weighed[key] = facts, {each.atom: each for each in weighed(facts, also)}
            if atom in self._weighed[key][1]:
                found.append(self._weighed[key][1][atom])
        return found

    def round(self, names: Collection[str]) -> AxisFacts | None:
        """Look for joints under the borders of now; return the axes between, None where some edge left a border."""
        outer = self.infer()
        classes = self.classes(outer)
        joints: list[Joint] = []
        self.places, self.of = [], defaultdict(dict)
        taken = set(names)
        leaving: dict[str, set[Edge]] = defaultdict(set)
        members = classes.members()
        crossing: dict[Place, list[tuple[str, Edge]]] = defaultdict(list)
        for region in self.regions.values():
            for number, facts in enumerate(region.facts):
                for edge, expr in facts.crossing.items():
                    for atom in atoms_of(expr):
                        crossing[classes.find((region.name, number, atom))].append((region.name, edge))
                    if not isinstance(expr, Atom) or type(expr.size) is not int:
                        leaving[region.name].add(edge)
        for root, edges in crossing.items():
            joint = self._joint(members[root], classes, outer, taken)
            if isinstance(joint, Joint):
                for name, edge in edges:
                    self.of[name][edge] = len(joints)
                joints.append(joint)
                self.places.append(tuple(members[root]))
            else:
                for name, edge in edges:
                    leaving[name].add(edge)
        if not any(leaving.values()):  # an argument of which no dim is left counts as it did before
            for name in self._lost(joints):
                leaving[name] |= self.regions[name].edges
        for name, going in leaving.items():
            self.regions[name].edges -= going
        self.joints = joints
        return None if any(leaving.values()) else outer

    def _lost(self, joints: Sequence[Joint]) -> list[str]:
        """Return the regions that would lose a coupling of their own to the border."""
        members = {member for joint in joints for member in joint.members}
        lost = []
        for region in self.regions.values():
            if not region.edges:
                continue
            for analysis, facts in zip(region.analyses, region.facts, strict=True):
                if id(facts.facts) not in self._keys:  # equal blocks share them
                    self._keys[id(facts.facts)] = facts, {coupling.key for coupling in discover(facts).couplings}
                now = self._keys[id(facts.facts)][1]
                for coupling in analysis.discovery.couplings:
                    axes = {(join(region.name, name), dim) for name, dim in coupling.axes}
                    if coupling.key not in now and not axes <= members:
                        lost.append(region.name)
        return lost

    def _joint(self, places: Sequence[Place], classes: Classes, outer: AxisFacts, taken: set[str]) -> Joint | None:
        """Make a class of atoms a joint; None if it is none, and noted among the refusals if weights meet along it."""
        with_names = [(place, part) for place in places for part in self.parts([place], outer)]
        parts = [part for _, part in with_names]
        members: dict[WeightDim, None] = {}
        outside: list[WeightDim] = []
        seen: dict[Any, str] = {}
        plain: WeightDim | None = None
        matrices: set[str] = set()
        producers: dict[str, None] = {}
        axes = [
            (self.order[join("" if where == BETWEEN else where, name)], where, name, dim, part)
            for (where, _, _), part in with_names
            for name, dim in part.axes
        ]
        for _, where, name, dim, part in sorted(axes, key=lambda axis: (axis[0], axis[3])):
            full = join("" if where == BETWEEN else where, name)
            tensor = self.tensors[full]
            first = seen.setdefault((storage_key(tensor), tensor.shape, tensor.stride()), full)
            if first != full:
                continue
            if (full, dim) not in members and where == BETWEEN and not self._in_region(full):
                outside.append((full, dim))
            members[full, dim] = None
            if name in part.matrices:
                matrices.add(full)
            if name in part.producers:
                producers[full] = None
            if plain is None and part.axis_facts.parameters[name][dim] is part.atom:
                plain = full, dim
        if not meet(parts):
            return None
        reasons = classes.reasons(places[0])
        for (where, _, _), part in with_names:
            if where != BETWEEN:
                reasons += [reason_text(fact.reason, fact.node, where) for fact in part.roles["pinned"]]
                needed, by = least_entries(part.axis_facts).get(part.atom, (1, None))
                if by is not None and needed > 1:
                    reasons.append(reason_text(f"{op_name(by)} takes {needed} of its entries", by, where))
        reasons += [self.refused[member] for member in members if member in self.refused]
        if plain is None:
            reasons.append("no parameter has it as a dim of its own")
        reasons += [
            f"`{name}`, which lies in no region, has it as a part of a dim"
            for name, dim in outside
            if not isinstance(outer.parameters[name][dim], Atom)
        ]
        size = places[0][2].size
        if reasons:
            names = tuple(f"{name}[{dim}]" for name, dim in members)
            self.refusals[names] = Refusal(names, size, tuple(dict.fromkeys(reasons)), "")
            return None
        kind = kind_of(parts)
        assert plain is not None
        ordered = (plain, *(member for member in members if member != plain))
        return Joint(
            named(kind, sorted(matrices), taken), kind, int(size), is_linear(parts, kind), ordered, tuple(outside),
            tuple(sorted(matrices)), tuple(producers), {name: tuple(self.tensors[name].shape) for name, _ in outside},
            self._aliases(dict(members)),
        )  # fmt: skip

    def _aliases(self, members: Mapping[WeightDim, None]) -> dict[str, str]:
        names = {storage_key(self.tensors[name]): name for name, _ in reversed(list(members))}
        of = {name: names.get(storage_key(tensor), name) for name, tensor in self.tensors.items()}
        return {name: first for name, first in of.items() if name != first and not self._in_region(name)}

    def _in_region(self, full: str) -> bool:
        return any(full.startswith(f"{name}.") for name in self.regions)


def find_joints(
    model: nn.Module,
    between: Between,
    analyses: Mapping[str, Analysis],
    *,
    refused: Mapping[WeightDim, str],
    experiments: bool = False,
) -> Across:
    """Find the couplings that cross the edges of regions.

    Args:
        model: the model.
        between: a forward of it, and what that runs between its regions.
        analyses: the regions by name.
        refused: dims of parameters whose axis is known not to be one -> the reason.
        experiments: see `infer_axes`.
    """
    search = JointSearch(model, between, analyses, refused, experiments)
    names = {join(name, c.name) for name, a in analyses.items() for c in a.discovery.couplings}
    while (outer := search.round(names)) is None:
        pass
    joined, joints = {}, tuple(search.joints)
    for name in analyses:
        region = search.regions[name]
        border = Border.of({edge: joints[number].members[0] for edge, number in search.of.get(name, {}).items()})
        finished = [
            _finished(each, facts, border, name) for each, facts in zip(region.analyses, region.facts, strict=True)
        ]
        joined[name] = replace(finished[0], others=tuple(finished[1:]))
    edges = {name: dict(of) for name, of in search.of.items()}
    return Across(joined, joints, tuple(search.places), edges, tuple(search.refusals.values()), outer)


def _finished(analysis: Analysis, facts: AxisFacts, border: Border, name: str) -> Analysis:
    captured = replace(facts.captured, border=border)
    facts = replace(facts, captured=captured)
    return Analysis(name, captured, facts, discover(facts), analysis.seconds, analysis.filled, analysis.first_only)
