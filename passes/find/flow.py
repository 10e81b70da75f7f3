"""Flow: the calls of regions in one forward of a model, and the ops between them, without any values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from ecospa_fx.passes.axes.algebra import Atom
from ecospa_fx.passes.capture.between import Between
from ecospa_fx.passes.ir.axis_facts import AxisFacts

from .joint import BETWEEN, Across


@dataclass(frozen=True, eq=False)
class CallInFlow:
    """One call of a region: the nodes between regions that are its arguments by name, and its results."""

    region: str
    arguments: Mapping[str, fx.Node]
    results: tuple[fx.Node, ...]


@dataclass(frozen=True, eq=False)
class RegionFlow:
    """The way of tensors from region to region.

    Attributes:
        calls: the calls of regions, in order.
        between: axes of the ops between them.
        atoms: name of a coupling across regions -> the atoms of these ops that it is.
    """

    calls: tuple[CallInFlow, ...]
    between: AxisFacts
    atoms: Mapping[str, frozenset[Atom]]

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionFlow:
        return self  # not changed after a capture


def flow_of(between: Between, across: Across) -> RegionFlow:
    """Keep of a forward that was followed what its couplings need."""
    calls = tuple(CallInFlow(call.region, _known(call.arguments), tuple(call.results)) for call in between.calls)
    atoms = {
        joint.name: frozenset(atom for where, _, atom in places if where == BETWEEN)
        for joint, places in zip(across.joints, across.places, strict=True)
    }
    return RegionFlow(calls, across.between, atoms)


def _known(arguments: Mapping[str, fx.Node | None]) -> dict[str, fx.Node]:
    return {name: node for name, node in arguments.items() if node is not None}
