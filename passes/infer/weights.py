"""Weights: the values of a graph that are weights, made of parameters alone.

    Weights(captured)
      .visit(node, relation)     the parameters that the result of an op is a weight of, if it is one
      .derivations(axis_facts)   the ops that make weights, or state of them, which bring no axis into a product of
                                 the model

A mask, a scale, a quantiser or a parametrization stands between a parameter and its use. The result is a weight like
the parameter if an entry of it stands for an entry of the parameter: some operand that is a weight has all of its dims,
and nothing that comes in with a call meets it entry by entry. Of a product of two weights, neither has. A weight that
is normalised over an axis is made anew of what is left of its parameters.
"""

from __future__ import annotations

from torch import fx

from ecospa_fx.passes.axes.algebra import Size
from ecospa_fx.passes.axes.sizes import as_size
from ecospa_fx.passes.graph.nodes import memory_root, tensor_meta, tensors_of, written_arguments
from ecospa_fx.passes.ir import relations as r
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.patterns import bind
from ecospa_fx.passes.ir.region_graph import RegionGraph

from .taint import given_nodes


class Weights:
    """The weights among the values of one graph, in the order in which its ops are visited."""

    def __init__(self, captured: RegionGraph) -> None:
        self._captured = captured
        self._given = given_nodes(captured)
        self._made_of: dict[fx.Node, tuple[str, ...]] = {}  # of values that nothing given enters: their parameters
        self._weights: dict[fx.Node, tuple[str, ...]] = {}

    def of(self, node: fx.Node) -> tuple[str, ...]:
        """Return the parameters (of tied ones the first) that a value is a weight made of; none if it is no weight."""
        return self._weights.get(node, ())

    def visit(self, node: fx.Node, relation: r.Relation | None) -> None:
        """Note whether the result of an op on parameters is a weight; `relation` is that of the op, where known."""
        if node.op == "placeholder":
            name = self._captured.tensors.get(node.name)
            if name is not None:
                self._weights[node] = self._made_of[node] = (self._captured.same_storage.get(name, name),)
            return
        entering = tensors_of(node) or list(node.all_input_nodes)
        made_of = [self._made_of.get(arg, ()) for arg in entering if arg not in self._given]
        self._made_of[node] = names = tuple(dict.fromkeys(name for each in made_of for name in each))
        if relation is None:
            handed = node.op == "call_function" and not tensors_of(node) and all(self.of(arg) for arg in entering)
            if handed and entering:  # one of several results
                self._weights[node] = self.of(entering[0])
            return
        kept = self._kept_operand(relation, node)
        if kept is not None:
            self._weights[node] = tuple(dict.fromkeys((*self.of(kept.node), *names)))

    def _kept_operand(self, relation: r.Relation, node: fx.Node) -> r.Operand | None:
        """Return the operand that is a weight and whose entries those of the result stand for, one by one or moved."""
        match relation:
            case r.Indexed(x):  # rows of a matrix are activations, as of an embedding; rows of matrices are matrices
                return x if x.ndim > 2 and x.parameters else None
            case r.Joined(xs) | r.Stacked(xs):
                kept = next((x for x in xs if x.parameters), None)
                return kept if not any(x.node in self._given for x in xs) else None
            case r.SameDims(x) | r.Halved(x):
                return x if x.parameters else None
            case r.Pattern(rescaled=x) if x is not None:
                return x if x.parameters else None
            case r.Pattern():
                return self._spanning(_factors_that_meet_apart(relation), relation.operands, node)
            case r.Pointwise(xs) | r.Probed(xs):
                return self._spanning(xs, xs, node)
            case _:
                moved = r.moved_operand(relation)
                return moved if moved is not None and moved.parameters else None

    def _spanning(
        self, candidates: tuple[r.Operand, ...], operands: tuple[r.Operand, ...], node: fx.Node
    ) -> r.Operand | None:
        """Return a weight among the operands that has every dim of the result, if the others are weights or numbers."""
        shape = tuple(map(as_size, tensor_meta(node)[0].shape)) if tensor_meta(node) else ()
        kept = next((x for x in candidates if x.parameters and _has_dims(x, shape)), None)
        if kept is None:
            return None
        others = [x for x in operands if x.node is not kept.node]
        if any(x.node in self._given and any(size != 1 for size in x.shape) for x in others):
            return None
        # A vector that is added to a product of weights is the bias of an activation: of a learned query, say.
        matrix = sum(size != 1 for size in shape) > 1
        return kept if matrix or all(x.parameters or not x.weighted for x in others) else None

    def derivations(self, axis_facts: AxisFacts) -> set[fx.Node]:
        """Return the ops that make weights, or state that only these read, out of parameters, with all that enters."""
        found: set[fx.Node] = set()
        waiting = [node for node in self._weights if node in axis_facts.operands]
        while waiting:
            node = waiting.pop()
            if node.op == "call_function" and node not in found and node not in self._given:
                found.add(node)
                waiting += [arg for arg in node.all_input_nodes if self._made_of.get(arg)]
        return self._with_state(found)

    def _with_state(self, derivations: set[fx.Node]) -> set[fx.Node]:
        """Return `derivations` and the ops whose results end in state that nothing but all of these reads.

        The vectors of a spectral norm are such state: products of a weight with itself, step by step.
        """
        nodes = [node for node in self._captured.graph.nodes if node.op == "call_function"]
        found = {node for node in nodes if node not in self._given}
        results = next(reversed(self._captured.graph.nodes)).args[0]
        assigned = {
            node: place.full_name
            for place, node in zip(self._captured.assigned, self._captured.assigned_among(results), strict=True)
        }
        placed = {name: node for node in self._captured.graph.nodes if (name := self._captured.tensors.get(node.name))}
        readers: dict[fx.Node, set[fx.Node]] = {node: set(node.users) for node in self._captured.graph.nodes}
        for node in assigned.keys() - set(results[: self._captured.returned]):
            state = placed.get(assigned[node])
            readers[node] = {user for user in node.users if user.op != "output"} | set(state.users if state else ())
        for node in nodes:
            for value in written_arguments(node):
                readers[node] |= readers[memory_root(value)]
        inside, size = found | derivations, -1
        while size != len(inside):
            size = len(inside)
            for node in reversed(nodes):  # readers come after what they read
                if node not in derivations and not readers[node] <= inside:
                    inside.discard(node)
        return inside


def _has_dims(x: r.Operand, shape: tuple[Size, ...]) -> bool:
    """Return whether an operand has every dim of a result that has more than one entry."""
    own = (*(1 for _ in range(len(shape) - x.ndim)), *x.shape)
    return all(size in (1, mine) for size, mine in zip(reversed(shape), reversed(own), strict=False))


def _factors_that_meet_apart(relation: r.Pattern) -> tuple[r.Operand, ...]:
    """Return the factors of a pattern that have all names of its output; none where a sum runs over two of them."""
    pattern = bind(relation.spec, len(relation.operands), tuple(relation.sizes))
    named = [(t, o) for t, o in zip(pattern.operands, relation.operands, strict=True) if not t.added]
    summed = [name for t, _ in named for name in t.keys if name not in pattern.kept]
    if len(set(summed)) < len(summed):
        return ()
    return tuple(o for t, o in named if pattern.kept <= t.keys)
