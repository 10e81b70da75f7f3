"""Absorbers: the weights that sum over a coupling, so that the entries which stay can take over those that go.

graphs of a region -> how each weight sums over a dim -> absorbers, with those that share their inputs told | reasons
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ecospa_fx.model.lookup import compiled_state, regions_of
from ecospa_fx.model.region import Region
from ecospa_fx.passes.graph.tensors import parameters_of
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.transform.consumers import Consumer, WeightDim, consumers
from ecospa_fx.score.owners import last_weights

from .moments import HELD

EXPERTS = (
    "its entries are experts, each a function with weights of its own, of which none is a sum of others; those that go "
    "are left out, not merged into others, and tokens go to those that stay"
)


@dataclass(frozen=True, eq=False)
class Absorbing:
    """A weight that may absorb: how it is used, and the (parameter, dim) under which its inputs' moments are kept."""

    consumer: Consumer
    gram: WeightDim


class Absorbers:
    """Finds the weights that may absorb.

    Args:
        model: a compiled model.
        regions: its regions.

    Attributes:
        found: (parameter, dim) -> how it absorbs.
        refused: (parameter, dim) of a weight that sums over a coupling and cannot take over -> the reason.
    """

    def __init__(self, model: nn.Module, regions: Sequence[Region]) -> None:
        self.model, self.regions = model, regions
        self.found: dict[WeightDim, Absorbing] = {}
        self.refused: dict[WeightDim, str] = {}
        self._graphs: dict[int, tuple[AxisFacts, Mapping[WeightDim, Consumer | str]]] = {}
        self._read_for: list[object] = []  # a coupling and the graphs that absorbers have been found for

    def read_all(self) -> None:
        """Find the weights of all regions that may absorb, once for the couplings and the graphs that there are."""
        graphs = [program for region in self.regions for program in region.specializations]
        now = [*compiled_state(self.model).couplings()[:1], *graphs]
        if len(now) == len(self._read_for) and all(a is b for a, b in zip(now, self._read_for, strict=True)):
            return
        self._read_for = now
        for region in self.regions:
            if region.specializations:
                self.read(region)

    def read(self, region: Region) -> None:
        """Find the weights of a region that may absorb: every graph of it must sum over the dim in the same way."""
        groups: dict[Any, WeightDim] = {}
        experts = self._experts(region)
        for key in self._offered(region):
            self.found.pop(key, None)
            self.refused.pop(key, None)
            inside = key_in_region(region, key)
            graphs = [p.axis_facts for p in reversed(region.specializations) if _uses(p.captured, inside[0])]
            found = [self.consumers(axis_facts).get(inside) for axis_facts in graphs]
            if key in experts and not any(found):
                self.refused[key] = EXPERTS
            if not any(found):
                continue  # its outputs are summed over by other weights
            reasons = [each for each in found if isinstance(each, str)]
            same = [each for each in found if isinstance(each, Consumer)]
            if reasons or len(same) < len(found) or len({each.window for each in same}) > 1:
                self.refused[key] = reasons[0] if reasons else "not every call of its region sums over it"
                continue
            bias = same[0].bias if len({each.bias for each in same}) == 1 else None
            inputs = tuple(tuple((i.node, i.dim, i.window) for i in each.inputs) for each in same)
            self.found[key] = Absorbing(replace(same[0], bias=bias), groups.setdefault(inputs, key))

    def grams_in(self, region: Region, only: Collection[WeightDim] | None = None) -> list[WeightDim]:
        """Return the (parameter, dim)s under which a region's moments are kept; those of some weights."""
        keys = [key for key in self._offered(region) if key in self.found and (only is None or key in only)]
        return list(dict.fromkeys(self.found[key].gram for key in keys))

    def consumers(self, axis_facts: AxisFacts) -> Mapping[WeightDim, Consumer | str]:
        """Return how the weights of a graph sum, by names in the region; worked out once for a graph."""
        cached = self._graphs.get(id(axis_facts))
        if cached is None or cached[0] is not axis_facts:
            self._graphs[id(axis_facts)] = cached = (axis_facts, consumers(axis_facts))
        return cached[1]

    def _experts(self, region: Region) -> set[WeightDim]:
        """Return the dims of the last weights of experts in a region."""
        last = last_weights({region.name: region})
        experts = [c for c in compiled_state(self.model).couplings() if c.kind == "experts" and c.name in last]
        return {(m.parameter, m.dim) for c in experts for m in c.members if m.parameter in last[c.name]}

    def _offered(self, region: Region) -> list[WeightDim]:
        """Return the dims of matrices that couplings of a region lie on."""
        prefix = f"{region.name}." if region.name else ""
        members = (m for c in compiled_state(self.model).couplings() for m in c.members if m.matrix)
        return sorted({(m.parameter, m.dim) for m in members if m.parameter.startswith(prefix)})


def rooms(model: nn.Module) -> dict[str, int]:
    """Return about how many bytes moments take, by the name of the coupling that their weights sum over."""
    regions, parameters = list(regions_of(model).values()), dict(parameters_of(model, remove_duplicate=False))
    absorbers = Absorbers(model, regions)
    absorbers.read_all()
    found: dict[str, int] = {}
    for coupling in compiled_state(model).couplings():
        keys = [(member.parameter, member.dim) for member in coupling.members]
        over = {absorber.gram: absorber for key in keys if (absorber := absorbers.found.get(key)) is not None}
        found[coupling.name] = 0
        for (name, dim), absorber in over.items():
            columns = parameters[name].shape[dim] * absorber.consumer.window
            found[coupling.name] += columns * (columns + HELD) * max(4, parameters[name].element_size())
    return found


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
