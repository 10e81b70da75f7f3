"""Absorbers: the weights of a model that sum over its couplings, and how each is used in every graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ecospa_fx.model.lookup import compiled_state
from ecospa_fx.model.region import Region
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.transform.consumers import Consumer, WeightDim, consumers


@dataclass(frozen=True, eq=False)
class TakingOver:
    """A weight that may absorb: how it is used, and the (parameter, dim) under which its inputs' moments are kept."""

    consumer: Consumer
    gram: WeightDim


class Absorbers:
    """The weights that may absorb, by (parameter, dim).

    Args:
        model: a compiled model.
        regions: its regions.

    Attributes:
        found: the weights that may.
        refused: those that sum over a coupling and cannot take over -> the reason.
    """

    def __init__(self, model: nn.Module, regions: Sequence[Region]) -> None:
        self.model, self._regions = model, regions
        self.found: dict[WeightDim, TakingOver] = {}
        self.refused: dict[WeightDim, str] = {}
        self._graphs: dict[int, tuple[AxisFacts, Mapping[WeightDim, Consumer | str]]] = {}
        self._read_for: list[object] = []  # a coupling and the graphs that absorbers have been found for

    def consumers_in(self, axis_facts: AxisFacts) -> Mapping[WeightDim, Consumer | str]:
        """Return the dims of parameters that some op of a graph sums over, see `consumers`."""
        cached = self._graphs.get(id(axis_facts))
        if cached is None or cached[0] is not axis_facts:
            self._graphs[id(axis_facts)] = cached = (axis_facts, consumers(axis_facts))
        return cached[1]

    def offered(self, region: Region) -> list[WeightDim]:
        """Return the dims of matrices that couplings of a region lie on."""
        prefix = f"{region.name}." if region.name else ""
        members = (m for c in compiled_state(self.model).couplings() for m in c.members if m.matrix)
        return sorted({(m.parameter, m.dim) for m in members if m.parameter.startswith(prefix)})

    def read_all(self) -> None:
        """Find the weights of all regions that may absorb, once for the couplings and the graphs that there are."""
        graphs = [program for region in self._regions for program in region.specializations]
        now = [*compiled_state(self.model).couplings()[:1], *graphs]
        if len(now) == len(self._read_for) and all(a is b for a, b in zip(now, self._read_for, strict=True)):
            return
        self._read_for = now
        for region in self._regions:
            if region.specializations:
                self.read(region)

    def read(self, region: Region) -> None:
        """Find the weights of a region that may absorb: every graph of it must sum over the dim in the same way."""
        groups: dict[Any, WeightDim] = {}
        for key in self.offered(region):
            self.found.pop(key, None)
            self.refused.pop(key, None)
            inside = key_in_region(region, key)
            graphs = [p.axis_facts for p in reversed(region.specializations) if _uses(p.captured, inside[0])]
            found = [self.consumers_in(axis_facts).get(inside) for axis_facts in graphs]
            if not any(found):
                continue  # its outputs are summed over by other weights
            reasons = [each for each in found if isinstance(each, str)]
            same = [each for each in found if isinstance(each, Consumer)]
            if reasons or len(same) < len(found) or len({each.window for each in same}) > 1:
                self.refused[key] = reasons[0] if reasons else "not every call of its region sums over it"
                continue
            bias = same[0].bias if len({each.bias for each in same}) == 1 else None
            inputs = tuple(tuple((i.node, i.dim, i.window) for i in each.inputs) for each in same)
            self.found[key] = TakingOver(replace(same[0], bias=bias), groups.setdefault(inputs, key))


def key_in_region(region: Region, key: WeightDim) -> WeightDim:
    """Return a (parameter, dim) by the parameter's name inside a region."""
    return (key[0].removeprefix(f"{region.name}.") if region.name else key[0]), key[1]


def _uses(captured: RegionGraph, name: str) -> bool:
    """Return whether a graph uses a parameter."""
    return any(
        captured.same_storage.get(tensor, tensor) == name
        for node in captured.graph.nodes
        if node.op == "placeholder" and node.users and (tensor := captured.tensors.get(node.name)) is not None
    )
