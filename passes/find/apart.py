"""Entries apart: axes of which each entry is picked out, and goes to weights of its own, as in a list of experts.

    own_weights(axis_facts, is_axis)   the parameters that single entries meet, where each meets others; or none

A gate per module is an axis of the router alone. What it would take along is no entry of any tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from torch import fx

from ecospa_fx.passes.axes.algebra import Expr
from ecospa_fx.passes.ir import relations as r
from ecospa_fx.passes.ir.axis_facts import AxisFacts

NEAR = 40
"""Number of ops behind a pick that are looked at: an expert, not the rest of the model."""


def own_weights(axis_facts: AxisFacts, is_axis: Callable[[Expr], bool]) -> list[str]:
    """Return one parameter for each entry of an axis that is picked by its position, if others meet others.

    Args:
        axis_facts: axes of a graph.
        is_axis: whether an expression is the axis, or holds it.
    """
    picks = list(_picks(axis_facts, is_axis))
    if len(picks) < 2:
        return []
    ancestors: dict[fx.Node, frozenset[str]] = {}
    met = [_met(pick, axis_facts, ancestors) for pick in picks]
    counts = Counter(name for names in met for name in names)
    own = [sorted(name for name in names if counts[name] == 1) for names in met]
    return [names[-1] for names in own if names] if sum(map(bool, own)) > 1 else []


def _picks(axis_facts: AxisFacts, is_axis: Callable[[Expr], bool]) -> Iterator[tuple[fx.Node, ...]]:
    """Yield for each entry that is picked the values that it is in, or that it is put beside."""
    resolve = axis_facts.axes.resolve
    for node, relation in axis_facts.relations.items():
        match relation:
            case r.Picked(x, dim) | r.Parted(x, dim) if is_axis(resolve(x.exprs[dim])):
                several = not isinstance(node.meta.get("val"), (tuple, list))
                yield from ((node,),) if several else ((user,) for user in node.users)
            case r.Sliced(x, dim) if is_axis(resolve(x.exprs[dim])):
                yield (node,)
            case r.Stacked(xs, dim) if is_axis(axis_facts.values[node][0][dim]):
                yield from ((x.node,) for x in xs)
            case r.Pointwise((x,), compares=True) if x.places is not None and is_axis(resolve(x.places)):
                yield (node,)


def _met(pick: tuple[fx.Node, ...], axis_facts: AxisFacts, ancestors: dict[fx.Node, frozenset[str]]) -> frozenset[str]:
    """Return the parameters that a picked entry meets in products nearby, or is made of."""
    found: set[str] = set()
    seen, waiting = set(pick), list(pick)
    while waiting and len(seen) < NEAR:
        node = waiting.pop(0)
        if axis_facts.captured.tensors.get(node.name) is None:
            found |= _made_of(node, axis_facts, ancestors) if node in pick else set()
        for user in node.users:
            relation = axis_facts.relations.get(user)
            multiplies = isinstance(relation, r.Pattern) and not relation.apart
            if multiplies or (isinstance(relation, r.Pointwise) and relation.how == "product"):
                for other in user.all_input_nodes:
                    found |= _made_of(other, axis_facts, ancestors) if other not in seen else set()
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    return frozenset(found)


def _made_of(node: fx.Node, axis_facts: AxisFacts, known: dict[fx.Node, frozenset[str]]) -> frozenset[str]:
    """Return the parameters that a value depends on."""
    stack = [node]
    while stack:
        last = stack[-1]
        missing = [arg for arg in last.all_input_nodes if arg not in known]
        if missing:
            stack += missing
            continue
        stack.pop()
        name = axis_facts.captured.tensors.get(last.name) if last.op == "placeholder" else None
        known[last] = frozenset([name]) if name is not None else frozenset[str]().union(
            *(known[arg] for arg in last.all_input_nodes)
        )  # fmt: skip
    return known[node]
