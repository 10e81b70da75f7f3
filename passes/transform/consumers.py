"""Consumers: the weights that sum over an axis of activations, and what each of them sums.

    consumers(inference) -> (parameter, dim) -> a Consumer: the values that meet this dim, wherever it is used
                                             -> or the reason why what it sums is not one matrix times one weight

Read off the graph: a parameter is followed through transposes and casts to each op that takes it. Where every one of
them multiplies it with an activation and sums over the same dim, the op is `X @ W.T` with `X` `[positions, entries]`,
and columns of `W` may take over what others did (`absorb.py`). Anything else has a reason, for a user to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

from torch import Tensor, fx
from torch.nn import functional

from ecospa_fx.passes.axes.algebra import atoms_of
from ecospa_fx.passes.graph.nodes import (
    argument_nodes,
    memory_behind,
    op_name,
    place,
    tensor_meta,
    written_arguments,
)
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.patterns import bind
from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.ir.relations import Pattern, Permuted, Pointwise

WeightDim: TypeAlias = tuple[str, int]  # (parameter name in the region, dim)


@dataclass(frozen=True, eq=False)
class Input:
    """The activation that a weight meets in one op.

    Attributes:
        node: what makes it.
        dim: its dim along which the op sums; from the right where negative.
        window: of a convolution, kernel, dilation, padding and stride per dim of space.
    """

    node: fx.Node
    dim: int
    window: tuple[tuple[int, ...], ...] | None = None

    def positions(self, value: Tensor) -> int:
        """How many rows there are."""
        if self.window is None:
            return value.numel() // max(1, value.shape[self.dim])
        kernel, dilation, padding, stride = self.window
        per_image = _positions(value.shape[-len(kernel) :], kernel, dilation, padding, stride)
        return per_image * (value.shape[0] if value.ndim == len(kernel) + 2 else 1)

    def rows(self, value: Tensor, most: int, skip: int = 0) -> Tensor:
        """What the columns of the weight are multiplied with, position by position, `[positions, columns]`.

        Args:
            value: what `node` came to.
            most: positions that are read at most, evenly spaced.
            skip: changes which ones these are.
        """
        if self.window is None:
            found = value.movedim(self.dim, -1)
            found = found.reshape(-1, found.shape[-1])
        else:
            kernel, dilation, padding, stride = self.window
            value = value if value.ndim == len(kernel) + 2 else value.unsqueeze(0)
            if len(kernel) == 1:  # there is an `unfold` of images only
                value = value.unsqueeze(-2)
                kernel, dilation, padding, stride = (1, *kernel), (1, *dilation), (0, *padding), (1, *stride)
            per_image = _positions(value.shape[-2:], kernel, dilation, padding, stride)
            value = spaced(value, max(1, most // max(1, per_image)), skip)
            found = functional.unfold(value, kernel, dilation, padding, stride).mT.flatten(0, 1)
        return spaced(found, most, skip)


@dataclass(frozen=True, eq=False)
class Consumer:
    """A weight that sums over one of its dims, wherever it is used.

    Attributes:
        parameter: name in the region; of tied ones the first.
        dim: what is summed over.
        inputs: what it meets, one per op.
        window: columns per entry of `dim`: the positions of a convolution's kernel; else 1.
        bias: what is added to the sum and used nowhere else, so that it may take up what is constant; or None.
    """

    parameter: str
    dim: int
    inputs: tuple[Input, ...]
    window: int
    bias: str | None

    def columns(self, weight: Tensor) -> Tensor:
        """The weight as a matrix `[rows, columns]`, columns along `dim`."""
        if self.window > 1:
            return weight.flatten(1)
        moved = weight.movedim(self.dim, -1)
        return moved.reshape(-1, moved.shape[-1])

    def as_weight(self, columns: Tensor, weight: Tensor) -> Tensor:
        """The inverse of `columns`, in the shape of `weight`."""
        if self.window > 1:
            return columns.view(weight.shape)
        shape = weight.movedim(self.dim, -1).shape
        return columns.view(shape).movedim(-1, self.dim)


@dataclass(frozen=True, eq=False)
class _Use:
    """One op that sums over a dim of a parameter."""

    dim: int
    input: Input
    window: int = 1
    bias: fx.Node | None = None


def consumers(axis_facts: AxisFacts) -> dict[WeightDim, Consumer | str]:
    """The dims of parameters that some op of a graph sums over, with what they meet there, or why that is not known."""
    captured = axis_facts.captured
    held: dict[str, list[fx.Node]] = {}
    for node in captured.graph.nodes:
        name = captured.tensors.get(node.name) if node.op == "placeholder" else None
        if name is not None:
            held.setdefault(captured.same_storage.get(name, name), []).append(node)
    found: dict[WeightDim, Consumer | str] = {}
    spoiled = _written_later(captured.graph)
    for name, nodes in held.items():
        uses: list[_Use | str] = []
        for node in nodes:
            for user, given, order in _followed(node, tuple(range(len(_shape(node)))), axis_facts):
                use = _use(user, given, order, axis_facts)
                if isinstance(use, _Use) and use.input.node in spoiled.get(user, ()):
                    use = f"what it meets in {op_name(user)} ({place(user, captured.region)}) is overwritten later"
                uses.append(use)
        known = {use.dim for use in uses if isinstance(use, _Use)}
        for dim in sorted(known | _summed_over(name, axis_facts)):
            mine = [use for use in uses if isinstance(use, _Use) and use.dim == dim]
            other = next((use for use in uses if isinstance(use, str)), None)
            if other is None and len(mine) < len(uses):
                other = "another op sums over another of its dims"  # and may make what this one meets
            if other is None and len({use.window for use in mine}) > 1:
                other = "it is a kernel in one op and a matrix in another"
            if other is not None:
                found[name, dim] = other
                continue
            bias = _bias(mine, captured, held)
            found[name, dim] = Consumer(name, dim, tuple(use.input for use in mine), mine[0].window, bias)
    return found


def _summed_over(name: str, axis_facts: AxisFacts) -> set[int]:
    """The dims of a parameter that inference has seen summed over, however that may be."""
    summed = [f.expr for f in axis_facts.facts if f.role == "contracted" and name in [o.parameter for o in f.operands]]
    atoms = {atom for expr in summed for atom in atoms_of(expr)}
    exprs = axis_facts.parameters.get(name, ())
    return {dim for dim, expr in enumerate(exprs) if atoms & set(atoms_of(expr))}


def _written_later(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """For each op its arguments that a later op writes into: at the end of the graph they are no longer what it saw."""
    found: dict[fx.Node, set[fx.Node]] = {}
    written: set[fx.Node] = set()  # memory, by the node that made it
    for node in reversed(graph.nodes):
        if written:
            found[node] = {given for given in node.all_input_nodes if _origin(given) in written}
        written.update(_origin(value) for value in written_arguments(node))
    return found


def _origin(node: fx.Node) -> fx.Node:
    """The node that made the memory of a value."""
    behind = list(memory_behind(node))
    return behind[-1] if behind else node


def _bias(uses: list[_Use], captured: RegionGraph, held: dict[str, list[fx.Node]]) -> str | None:
    """The bias that may change together with the weight."""
    (node, *more) = (use.bias for use in uses)
    if node is None or more or node.op != "placeholder" or len(node.users) != 1 or len(_shape(node)) != 1:
        return None
    name = captured.tensors.get(node.name)
    if name is None or len(held[captured.same_storage.get(name, name)]) != 1:
        return None
    is_parameter = any(captured.tensors[each] == name for each in captured.parameters)
    return name if is_parameter and name not in captured.shared_outside else None


def _followed(
    node: fx.Node, order: tuple[int, ...], axis_facts: AxisFacts
) -> Iterator[tuple[fx.Node, fx.Node, tuple[int, ...]]]:
    """Yield each op that takes a parameter, the argument it takes, and the parameter's dim at each dim of that."""
    for user in node.users:
        match axis_facts.relations.get(user):
            case Pointwise((x,), "copy") if x.node is node:
                yield from _followed(user, order, axis_facts)
            case Permuted(x, places):
                yield from _followed(user, tuple(order[i] for i in places), axis_facts)
            case _:
                yield user, node, order


def _use(user: fx.Node, given: fx.Node, order: tuple[int, ...], axis_facts: AxisFacts) -> _Use | str:
    """Read off what an op sums over in a parameter, in the parameter's dims, and what it meets there."""
    if user.op == "output":
        return "it leaves the region"
    where = f"{op_name(user)} ({place(user, axis_facts.captured.region)})"
    if argument_nodes(user).count(given) != 1 or user.op != "call_function":
        return f"{where} takes it in another way than as a matrix"
    relation = axis_facts.relations.get(user)
    use = _product(relation, user, given) if isinstance(relation, Pattern) and not relation.apart else None
    if use is None:
        return f"{where} does not multiply it, as a matrix, with an activation"
    return _Use(order[use.dim], use.input, use.window, use.bias)


def _product(relation: Pattern, node: fx.Node, weight: fx.Node) -> _Use | None:
    """Read a product of a weight and an activation that sums over one dim of both; None where it is another op."""
    pattern = bind(relation.spec, len(relation.operands), tuple(relation.sizes))
    placed = [(t, o, list(t.keys_of(o.shape))) for t, o in zip(pattern.operands, relation.operands, strict=True)]
    factors = [(operand, names) for term, operand, names in placed if not term.added]
    if len(factors) != 2:
        return None
    (mine, theirs) = sorted(factors, key=lambda factor: factor[0].node is not weight)
    (w, w_names), (x, x_names) = mine, theirs
    shared = [name for name in w_names if name in x_names]
    if w.node is not weight or w.ndim < 2 or len(shared) != 1 or shared[0] in pattern.output.keys:
        return None
    if any(isinstance(name, tuple) or names.count(name) > 1 for names in (w_names, x_names) for name in names):
        return None
    left = [name for name in w_names if name != shared[0]]
    if any(name not in pattern.output.keys for name in left) and relation.window is None:
        return None  # another of its dims is summed over, or chosen from
    window, columns = _window(relation.window)
    if window == ():
        return None
    bias = None
    if not any(value != 1 for value in node.kwargs.values() if isinstance(value, (int, float))):
        bias = next((o.node for t, o, names in placed if t.added and names == [left[0]]), None)
    return _Use(w_names.index(shared[0]), Input(x.node, x_names.index(shared[0]) - x.ndim, window), columns, bias)


def _window(window: tuple[tuple[int, ...], ...] | None) -> tuple[tuple[tuple[int, ...], ...] | None, int]:
    """Take a window that is one position for none, and one that images cannot be cut into for `()`; its columns."""
    if not window:
        return window, 1
    kernel, _, padding, stride = window
    if all(size == 1 for size in (*kernel, *stride)) and not any(padding):
        return None, 1
    return (window, prod(kernel)) if len(kernel) <= 2 else ((), 1)


def _shape(node: fx.Node) -> tuple[Any, ...]:
    meta = tensor_meta(node)
    return tuple(meta[0].shape) if meta else ()


def _positions(space: Any, *window: tuple[int, ...]) -> int:
    """How many windows there are in one image."""
    count = 1
    for size, k, d, p, s in zip(space, *window, strict=True):
        count *= (int(size) + 2 * p - d * (k - 1) - 1) // s + 1
    return count


def spaced(rows: Tensor, most: int, skip: int) -> Tensor:
    """At most so many rows, evenly spaced."""
    stride = -(-len(rows) // most)
    return rows[skip % stride :: stride] if stride > 1 else rows
