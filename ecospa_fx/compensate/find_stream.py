"""Find streams: couplings that norms stand on, followed through the graphs of all regions that they lie in.

stream_of(model, compiled, coupling)   -> Stream: how each weight lies on it, and what each norm does; or a reason
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.model.compiled import CompiledModel
from ecospa_fx.model.joint_offers import atoms_at_edges
from ecospa_fx.passes.axes.algebra import Atom, atoms_of
from ecospa_fx.passes.find.joint import BETWEEN
from ecospa_fx.passes.graph.tensors import join, named_tensors, storage_key
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.rewrite.replay import replay
from ecospa_fx.passes.transform.rotate import FAR, NEAR, Part
from ecospa_fx.passes.transform.stream import Factors, KeepsBasis, Kind, OnGraphs, Trace, factors
from ecospa_fx.ranks.shards import gathered

from .streams import FarWeight, Key, OnStream, Stream, region_of
from .taking_over import has_values


def on_norms(compiled: CompiledModel, coupling: Coupling) -> bool:
    """Decide whether norms may stand on a coupling: something takes statistics along it."""
    return coupling.context is None and any(
        fact.role == "reduced" and not atoms.isdisjoint(atoms_of(fact.expr))
        for _, facts, atoms in _graphs(compiled, coupling)
        for fact in facts.facts
    )


def _graphs(compiled: CompiledModel, coupling: Coupling) -> list[tuple[str, AxisFacts, set[Atom]]]:
    """Return the graphs in which a coupling is some atoms: of its region, or of all that it crosses."""
    region = compiled.regions.get(coupling.region)
    joint = next((joint for joint in compiled.state.joints if joint.name == coupling.name), None)
    if joint is not None:
        graphs = [
            (name, each.axis_facts, set(atoms_at_edges(each.axis_facts, joint)))
            for name, region in compiled.regions.items()
            for each in region.specializations
        ]
        return [graph for graph in graphs if graph[2]]
    if region is None or not region.specializations:
        return []
    named = {join(region.name, c.name): c.key for c in region.naming_graph.discovery.couplings}
    found = []
    for each in region.specializations:
        atoms = {c.atom for c in each.discovery.couplings if c.key == named.get(coupling.name)}
        if atoms:
            found.append((region.name, each.axis_facts, atoms))
    return found


def _traced(compiled: CompiledModel, coupling: Coupling) -> OnGraphs:
    """Follow a coupling through all graphs."""
    found, flow = OnGraphs(), compiled.state.flow
    graphs = _graphs(compiled, coupling)
    if all(joint.name != coupling.name for joint in compiled.state.joints):
        for region, facts, atoms in graphs:
            Trace(region, facts, atoms, found).run()
        return found
    if flow is None:
        raise KeepsBasis("the way between its regions is not known after a load; compile the model anew")
    outer = Trace(BETWEEN, flow.between, set(flow.atoms[coupling.name]), found)
    entered: dict[str, dict[str, Kind]] = {}
    returned: dict[str, dict[int, Kind]] = {}
    for call in flow.calls:
        mine = [(facts, atoms) for name, facts, atoms in graphs if name == call.region]
        given: dict[str, Kind] = {}
        for argument, node in call.arguments.items():
            outer.run(node)
            if node in outer.kinds:
                given[argument] = outer.kinds[node]
        if entered.setdefault(call.region, given) != given:
            raise KeepsBasis(f"`{call.region}` is called with the stream, and with what a norm returns")
        for facts, atoms in mine:
            trace = Trace(call.region, facts, atoms, found)
            for argument, kind in given.items():
                trace.enter(argument, kind)
            trace.run()
            results = dict(trace.results())
            if returned.setdefault(call.region, results) != results:
                raise KeepsBasis(f"two calls of `{call.region}` return different things along it")
        for number, node in enumerate(call.results):
            if number in returned.get(call.region, {}):
                outer.kinds[node] = returned[call.region][number]
    outer.run()
    return found


def stream_of(model: nn.Module, compiled: CompiledModel, coupling: Coupling) -> Stream:
    """Find how the weights of a model lie on a coupling that norms stand on.

    Raises:
        KeepsBasis: no change of basis passes through something on the way.
    """
    if coupling.size < 2:
        raise KeepsBasis("it has one entry")
    found, tensors = _traced(compiled, coupling), named_tensors(model)
    members = {(storage_key(tensors[m.parameter]), m.dim): m for m in coupling.members}

    def full(region: str, name: str) -> str:
        return name if region == BETWEEN else join(region, name)

    def part(region: str, name: str, dim: int, side: int) -> Part:
        member = members.get((storage_key(tensors[full(region, name)]), dim))
        if member is None:
            raise KeepsBasis(f"`{full(region, name)}` lies on it, and is no parameter")
        counts = {int((member.index == entry).sum()) for entry in range(coupling.size)}
        if len(counts) > 1:
            raise KeepsBasis(f"`{member.parameter}` has more rows of one entry than of another")
        order = torch.stack([(member.index == entry).nonzero().flatten() for entry in range(coupling.size)])
        return Part(member.parameter, member.dim, side, order, torch.zeros(order.shape[1], dtype=torch.long))

    near = {(p.parameter, p.dim): p for p in (part(*each, NEAR) for each in found.near)}
    far: dict[tuple[str, int], dict[Kind, FarWeight]] = {}
    for (region, name, dim), kinds in found.far.items():
        one = part(region, name, dim, FAR)
        for kind, bias in kinds.items():
            own = None if bias is None else full(region, bias)
            far.setdefault((one.parameter, one.dim), {})[kind] = FarWeight(one, kind, own)
    rigid = dict(found.rigid)
    for where, reads in far.items():
        for kind in [kind for kind in reads if kind is not None]:
            if where in near:
                rigid.setdefault(kind, f"`{where[0]}` reads its result, and writes the stream as well: untie them")
            elif len(reads) > 1:
                rigid.setdefault(kind, f"`{where[0]}` reads its result, and something else")
    norms: dict[Key, OnStream] = {}
    known: dict[tuple[int, str], Factors] = {}
    for key, standings in found.norms.items():
        for standing in standings:
            region = region_of(standing)
            place = id(standing.axis_facts.facts), standing.norm.result.name
            if place not in known:
                values = {name: gathered(tensors[join(region, name)]) for name in standing.norm.tensors}
                kept = replay(standing.axis_facts, compiled.plan)
                known[place] = factors(standing, kept, values, coupling.size)
        does = known[id(standings[0].axis_facts.facts), standings[0].norm.result.name]
        names = [None if name is None else join(region_of(standings[0]), name) for name in (does.scale, does.shift)]
        norms[key] = OnStream(does, names[0], names[1], key in rigid, tuple(standings))
    reading = tuple(
        next(iter(kinds.values())) if len(kinds) == 1 else replace(next(iter(kinds.values())), kind=None, bias=None)
        for where, kinds in far.items()
        if where not in near
    )  # fmt: skip
    stream = Stream(model, compiled, coupling, tuple(near.values()), reading, norms)
    lying = {m.parameter for m in coupling.members}
    missing = sorted(lying - set(stream.names))
    if missing:
        raise KeepsBasis(f"`{missing[0]}` lies on it, and no op was seen that takes it")
    _check_memory(stream, tensors)
    try:
        stream.check(tensors)
    except KeepsBasis as error:
        why = next((reason for key, reason in rigid.items() if f"`{norms[key].scale}`" in str(error)), None)
        raise KeepsBasis(f"{error}: {why}" if why else str(error)) from None
    return stream


def _check_memory(stream: Stream, tensors: Mapping[str, Tensor]) -> None:
    for name in stream.names:
        weight = tensors[name]
        if not has_values(weight):
            kind = type(weight).__name__
            raise KeepsBasis(f"`{name}` is a {kind} on {weight.device}, whose values are not all in this process")
