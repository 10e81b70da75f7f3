"""Joint: a coupling that crosses the edges of regions, and the classes of axes that it is found by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from ecospa_fx.passes.axes.algebra import Atom
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.border import Edge, WeightDim

from .analyse import Analysis
from .discover import Kind
from .left_whole import Refusal

BETWEEN = "\0between"  # stands for the ops between regions where regions are named

Place: TypeAlias = tuple[str, int, Atom]  # region, number of its graph, atom


@dataclass(frozen=True)
class Joint:
    """A coupling that crosses the edges of regions, at original sizes.

    Attributes:
        name: unique in the model.
        kind: see `ecospa_fx.Coupling`.
        size: number of its entries.
        linear: nothing between the weights is nonlinear or scales entries apart.
        members: the dims of parameters and buffers that it lies on, by name in the model, tied ones once.
        outside: those that lie in no region; each of their positions is an entry of its own.
        matrices: the parameters among its members that have several dims.
        producers: those in whose contraction it is free.
        shapes: of the parameters in `outside`.
        aliases: other names of tied members that lie in no region -> the member.
    """

    name: str
    kind: Kind
    size: int
    linear: bool
    members: tuple[WeightDim, ...]
    outside: tuple[WeightDim, ...]
    matrices: tuple[str, ...]
    producers: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Across:
    """The joints of a model, and its regions with their borders.

    Attributes:
        analyses: the regions by name, their axes inferred with the border.
        joints: the couplings that cross the edges of regions.
        places: the atoms of each joint, of the ops between regions too.
        edges: the dims at the edges of each region, with the number of the joint.
        refusals: axes that cross them, along which weights meet, and that cannot shrink.
        between: axes of the ops between regions.
    """

    analyses: dict[str, Analysis]
    joints: tuple[Joint, ...]
    places: tuple[tuple[Place, ...], ...]
    edges: dict[str, dict[Edge, int]]
    refusals: tuple[Refusal, ...]
    between: AxisFacts


class Classes:
    """Classes of atoms that are one axis of the model, and the reasons why one cannot shrink."""

    def __init__(self) -> None:
        self._parents: dict[Place, Place] = {}
        self._reasons: dict[Place, list[str]] = defaultdict(list)

    def find(self, place: Place) -> Place:
        """Return the atom that stands for the class of an atom."""
        parent = self._parents.setdefault(place, place)
        while parent != self._parents[parent]:
            self._parents[place] = parent = self._parents[self._parents[parent]]
        return parent

    def unite(self, a: Place, b: Place) -> None:
        """Make two atoms one axis."""
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parents[b] = a
            self._reasons[a] += self._reasons.pop(b, [])

    def pin(self, place: Place, reason: str) -> None:
        """Keep the class of an atom whole."""
        self._reasons[self.find(place)].append(reason)

    def reasons(self, place: Place) -> list[str]:
        """Return why a class cannot shrink."""
        return list(dict.fromkeys(self._reasons.get(self.find(place), [])))

    def members(self) -> dict[Place, list[Place]]:
        """Return the classes."""
        found: dict[Place, list[Place]] = defaultdict(list)
        for place in list(self._parents):
            found[self.find(place)].append(place)
        return found
