"""Coverage: the share of a model's matrices that lies on couplings of its regions, and the most that the root may add.

    Coverage(model, ends)
      .on_couplings(analyses)    the matrices on a coupling
      .most(analyses)            these, and those which a graph of the whole model might bring onto one
      .share(names)              of the entries of all matrices but those at the ends of the model

A region pins the axes of its arguments and results: a weight may have no partner inside and one around it. A weight
outside of every region has none at all. Both may be on couplings of the root; a weight that something else pins
may not, so the root need not be captured to know that it adds little.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import nn

from ecospa_fx.passes.axes.algebra import Atom, atoms_of
from ecospa_fx.passes.graph.tensors import join, parameters_of

from .analyse import Analysis

KEPT = 0.75
"""Blocks are regions if they bring at least this share of the entries onto couplings that the root does.

Less than 1, because a root costs more: it is captured anew for more calls, and equal blocks share one capture.
"""


class Coverage:
    """The matrices of a model by name, counted once where they are tied.

    Attributes:
        sizes: name -> number of entries; those at the ends of the model count nothing.
    """

    def __init__(self, model: nn.Module, ends: Collection[str] = ()) -> None:
        self.sizes = {name: p.numel() for name, p in parameters_of(model) if p.ndim > 1 and name not in ends}
        first = {id(p): name for name, p in parameters_of(model)}
        self._first = {name: first[id(p)] for name, p in parameters_of(model, remove_duplicate=False)}

    def on_couplings(self, analyses: Mapping[str, Analysis]) -> set[str]:
        """Return the matrices on a coupling of some region."""
        axes = ((name, axis) for name, a in analyses.items() for c in a.discovery.couplings for axis, _ in c.axes)
        return self.counted(join(name, axis) for name, axis in axes)

    def most(self, analyses: Mapping[str, Analysis]) -> set[str]:
        """Return the matrices that may be on a coupling of the root: all but those that more than an edge pins."""
        stuck = self.counted(join(name, inner) for name, a in analyses.items() for inner in _stuck(a))
        return self.on_couplings(analyses) | (set(self.sizes) - stuck)

    def share(self, names: Iterable[str]) -> float:
        """Return the share of the entries that matrices have; 1 where no matrix counts."""
        total = sum(self.sizes.values())
        return sum(self.sizes[name] for name in names) / total if total else 1.0

    def counted(self, names: Iterable[str]) -> set[str]:
        """Return the matrices that some names mean, tied ones by their first name."""
        return {self._first[name] for name in names if name in self._first and self._first[name] in self.sizes}


def _stuck(analysis: Analysis) -> Iterator[str]:
    """Yield the parameters of a region of which every axis is pinned by more than an edge of the region."""
    pinned: set[Atom] = set()
    for fact in analysis.axis_facts.facts:
        if fact.role == "pinned" and fact.node.op == "call_function":
            pinned.update(atoms_of(fact.expr))
    for name, exprs in analysis.axis_facts.parameters.items():
        if all(atom in pinned for expr in exprs for atom in atoms_of(expr)):
            yield name
