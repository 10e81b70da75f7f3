"""Specialization: the program of one call signature of a region, and the couplings of its graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ecospa_fx.passes.find.discover import Discovery
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.rewrite.program import Program


@dataclass(frozen=True, eq=False)
class Specialization:
    """One captured call signature of a region.

    Attributes:
        program: the generated code, under the plan as it is now.
        discovery: the couplings and refusals of its graph, at original sizes.
    """

    program: Program
    discovery: Discovery

    def __deepcopy__(self, memo: dict[int, Any]) -> Specialization:
        """Return the same object: it holds no module, and copies of the model share it."""
        return self

    @property
    def captured(self) -> RegionGraph:
        """The graph, at original sizes."""
        return self.program.captured

    @property
    def axis_facts(self) -> AxisFacts:
        """The axes of the graph."""
        return self.program.axis_facts
