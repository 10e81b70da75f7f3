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
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.nn import functional

from ecospa_fx.passes.axes.algebra import atoms_of
from ecospa_fx.passes.graph.nodes import (
    argument_nodes,
    arguments,
    memory_behind,
    op_name,
    place,
    tensor_meta,
    written_arguments,
)
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.region_graph import RegionGraph

aten = torch.ops.aten

WeightDim: TypeAlias = tuple[str, int]  # (parameter name in the region, dim)

_SAME = {
    aten.alias.default, aten.detach.default, aten.contiguous.default, aten.clone.default, aten.to.dtype,
    aten.to.dtype_layout, aten._to_copy.default,
}  # fmt: skip
_SWAPS = (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default)
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


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
            for user, given, order in _followed(node, tuple(range(len(_shape(node))))):
                use = _use(user, given, order, captured.region)
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


def _followed(node: fx.Node, order: tuple[int, ...]) -> Iterator[tuple[fx.Node, fx.Node, tuple[int, ...]]]:
    """The ops that take a parameter: (op, the argument as it comes there, the parameter's dim at each of its dims)."""
    for user in node.users:
        if user.target in _SAME:
            yield from _followed(user, order)
        elif user.target in _SWAPS:
            yield from _followed(user, _swapped(user, order))
        else:
            yield user, node, order


def _swapped(node: fx.Node, order: tuple[int, ...]) -> tuple[int, ...]:
    if node.target is aten.transpose.int:
        a, b = arguments(node)[1:3]
        swapped = list(order)
        swapped[a], swapped[b] = order[b], order[a]
        return tuple(swapped)
    return tuple(order[i] for i in arguments(node)[1]) if node.target is aten.permute.default else order[::-1]


def _use(user: fx.Node, given: fx.Node, order: tuple[int, ...], region: str) -> _Use | str:
    """What an op does with a parameter, in the parameter's dims."""
    if user.op == "output":
        return "it leaves the region"
    where = f"{op_name(user)} ({place(user, region)})"
    if argument_nodes(user).count(given) != 1 or user.op != "call_function":
        return f"{where} takes it in another way than as a matrix"
    read = _READERS.get(user.target)
    use = read(user, given) if read is not None else None
    if use is None:
        return f"{where} does not multiply it, as a matrix, with an activation"
    return _Use(order[use.dim], use.input, use.window, use.bias)


def _linear(node: fx.Node, weight: fx.Node) -> _Use | None:
    x, w, bias = (*arguments(node), None)[:3]
    return _Use(1, Input(x, -1), bias=bias) if w is weight and len(_shape(w)) == 2 else None


def _addmm(node: fx.Node, weight: fx.Node) -> _Use | None:
    bias, a, b = arguments(node)
    scaled = any(value != 1 for value in node.kwargs.values())
    use = _product(a, b, weight)
    return None if use is None else _Use(use.dim, use.input, bias=None if scaled or a is weight else bias)


def _matmul(node: fx.Node, weight: fx.Node) -> _Use | None:
    a, b = arguments(node)
    return _product(a, b, weight)


def _product(a: fx.Node, b: fx.Node, weight: fx.Node) -> _Use | None:
    """Of a matrix product, one factor of which is a matrix."""
    if len(_shape(weight)) != 2:
        return None
    if b is weight:
        return _Use(0, Input(a, -1))
    return _Use(1, Input(b, -2)) if a is weight and len(_shape(b)) > 1 else None


def _einsum(node: fx.Node, weight: fx.Node) -> _Use | None:
    equation, operands = arguments(node)[:2]
    equation = equation.replace(" ", "")
    if len(operands) != 2 or "->" not in equation:
        return None
    terms, out = equation.split("->")
    at = list(operands).index(weight)
    mine, theirs = terms.split(",")[at], terms.split(",")[1 - at]
    shared = [letter for letter in mine if letter in theirs]
    if (
        len(shared) != 1
        or shared[0] in out
        or "." in mine
        or any(term.count(shared[0]) != 1 for term in (mine, theirs))
    ):
        return None
    before, after = theirs.split(shared[0])
    return _Use(mine.index(shared[0]), Input(operands[1 - at], -1 - len(after) if "." in before else len(before)))


def _convolution(node: fx.Node, weight: fx.Node) -> _Use | None:
    given: tuple[Any, ...] = (*arguments(node), *_DEFAULTS[len(node.args) - 2 :])
    x, w, bias, stride, padding, dilation, groups = given
    kernel = _shape(w)[2:]
    if w is not weight or groups != 1 or node.kwargs or len(_shape(x)) != len(_shape(w)):
        return None
    window = tuple(_per_dim(each, len(kernel)) for each in (kernel, dilation, padding, stride))
    one = all(size == 1 for size in (*window[0], *window[3])) and not any(window[2])
    size = 1
    for extent in kernel:
        size *= extent
    return _Use(1, Input(x, 1, None if one else window), size, bias)


_DEFAULTS = (None, 1, 0, 1, 1)


def _transposed(node: fx.Node, weight: fx.Node) -> _Use | None:
    """Each position is spread over neighbours; what is summed over is the channels at the position alone."""
    given: tuple[Any, ...] = (*arguments(node), *(None, 1, 0, 0, 1)[len(node.args) - 2 :])
    (x, w), groups = given[:2], given[6]
    if w is not weight or groups != 1 or node.kwargs or len(_shape(x)) != len(_shape(w)):
        return None
    return _Use(0, Input(x, 1))


_READERS: dict[Any, Any] = {
    aten.linear.default: _linear, aten.addmm.default: _addmm, aten.mm.default: _matmul, aten.matmul.default: _matmul,
    aten.einsum.default: _einsum, **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_TRANSPOSED, _transposed),
}  # fmt: skip


def _shape(node: fx.Node) -> tuple[Any, ...]:
    meta = tensor_meta(node)
    return tuple(meta[0].shape) if meta else ()


def _per_dim(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple, torch.Size)) else (value,)
    return values * count if len(values) == 1 else values


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
