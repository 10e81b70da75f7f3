"""Entries apart: axes of which each entry is picked out, and goes to weights of its own, as in a list of experts.

    EntriesApart(axis_facts)
      .weights(is_axis)   a parameter for each entry of an axis that meets others than the rest do

A gate per module is an axis of the router alone. The weights that it would take along are not entries of one tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property

from torch import fx

from ecospa_fx.passes.axes.algebra import Expr
from ecospa_fx.passes.axes.sizes import as_size
from ecospa_fx.passes.graph.nodes import tensor_meta
from ecospa_fx.passes.ir import relations as r
from ecospa_fx.passes.ir.axis_facts import AxisFacts

NEAR = 40
"""Number of ops behind a pick that are looked at: an expert, not the rest of the model."""


class EntriesApart:
    """The entries that a graph picks by their positions, and the weights that each of them meets.

    Args:
        axis_facts: axes of the graph.
    """

    def __init__(self, axis_facts: AxisFacts) -> None:
        self._axis_facts = axis_facts
        self._made_of: dict[fx.Node, frozenset[str]] = {}

    def weights(self, is_axis: Callable[[Expr], bool]) -> list[str]:
        """Return one parameter for each entry of an axis that is picked by its position, if others meet others.

        Args:
            is_axis: whether an expression is the axis, or holds it.
        """
        picks = [node for expr, nodes in self._picks if is_axis(expr) for node in nodes]
        if len(picks) < 2:
            return []
        met = [self._met(pick) for pick in picks]
        counts = Counter(name for names in met for name in names)
        own = [sorted(name for name in names if counts[name] == 1) for names in met]
        return [names[-1] for names in own if names] if sum(map(bool, own)) > 1 else []

    @cached_property
    def _picks(self) -> list[tuple[Expr, list[fx.Node]]]:
        """Axes from which entries are picked, each with the values that these are in, or are put beside."""
        return list(self._picked())

    def _picked(self) -> Iterator[tuple[Expr, list[fx.Node]]]:
        resolve = self._axis_facts.axes.resolve
        for node, relation in self._axis_facts.relations.items():
            match relation:
                case r.Picked(x, dim) | r.Parted(x, dim) if {*getattr(relation, "sizes", ())} <= {1}:
                    several = isinstance(node.meta.get("val"), (tuple, list))
                    yield resolve(x.exprs[dim]), list(node.users) if several else [node]
                case r.Sliced(x, dim) if as_size(tensor_meta(node)[0].shape[dim]) == 1:
                    yield resolve(x.exprs[dim]), [node]
                case r.Stacked(xs, dim) if node in self._axis_facts.values:
                    yield self._axis_facts.values[node][0][dim], [x.node for x in xs]
                case r.Pointwise((x,), compares=True) if x.places is not None:
                    yield resolve(x.places), [node]

    def _met(self, pick: fx.Node) -> frozenset[str]:
        """Return the parameters that a picked entry meets in products nearby, or is made of."""
        found = set(self._parameters(pick))
        seen, waiting = {pick}, [pick]
        while waiting and len(seen) < NEAR:
            for user in waiting.pop(0).users:
                relation = self._axis_facts.relations.get(user)
                multiplies = isinstance(relation, r.Pattern) and not relation.apart
                if multiplies or (isinstance(relation, r.Pointwise) and relation.how == "product"):
                    for other in user.all_input_nodes:
                        found |= self._parameters(other) if other not in seen else set()
                if user not in seen:
                    seen.add(user)
                    waiting.append(user)
        return frozenset(found)

    def _parameters(self, node: fx.Node) -> frozenset[str]:
        """Return the parameters that a value depends on."""
        known, tensors, stack = self._made_of, self._axis_facts.captured.tensors, [node]
        while stack:
            last = stack[-1]
            missing = [arg for arg in last.all_input_nodes if arg not in known]
            if missing:
                stack += missing
                continue
            stack.pop()
            name = tensors.get(last.name) if last.op == "placeholder" else None
            above = (known[arg] for arg in last.all_input_nodes)
            known[last] = frozenset([name]) if name is not None else frozenset[str]().union(*above)
        return known[node]
