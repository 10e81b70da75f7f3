"""Consumers: the weights that sum over an axis of activations, and the inputs of each.

    consumers(axis_facts) -> (parameter, dim) -> a Consumer: the inputs that this dim is multiplied with
                                              -> or the reason why its uses are not one matrix times one weight

They are read off the graph: a parameter is followed through transposes and casts to each op that takes it. If every
one of them multiplies it with an activation and sums over the same dim, the op is `X @ W.T` with `X` `[positions,
entries]`, and columns of `W` may take over what others did (`absorb.py`). Any other use gives a reason that users read.
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
    is_complex,
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
    """The activation that one op multiplies a weight with.

    Attributes:
        node: the node that makes it.
        dim: its dim along which the op sums; counted from the right if negative.
        window: kernel, dilation, padding and stride per dim of space, of a convolution.
    """

    node: fx.Node
    dim: int
    window: tuple[tuple[int, ...], ...] | None = None

    def positions(self, value: Tensor, mask: Tensor | None = None) -> int:
        """Count the rows; see `rows` for the mask."""
        if self.window is None:
            if mask is not None and (over := _over_rows(mask, value.movedim(self.dim, -1).shape[:-1])) is not None:
                return int(over.sum())
            return value.numel() // max(1, value.shape[self.dim])
        kernel, dilation, padding, stride = self.window
        per_image = _positions(value.shape[-len(kernel) :], kernel, dilation, padding, stride)
        return per_image * (value.shape[0] if value.ndim == len(kernel) + 2 else 1)

    def rows(self, value: Tensor, most: int, skip: int = 0, mask: Tensor | None = None) -> Tensor:
        """Return the factors of the weight's columns, position by position, `[positions, columns]`.

        Args:
            value: the value of `node`.
            most: number of positions that are read at most, evenly spaced.
            skip: changes which ones these are.
            mask: BoolTensor over the first dims of positions, those to read; where it lies on no such dims all are.
        """
        if self.window is None:
            rows = value.movedim(self.dim, -1)
            over = None if mask is None else _over_rows(mask, rows.shape[:-1])
            rows = rows.reshape(-1, rows.shape[-1])
            rows = rows if over is None else rows[over.to(rows.device)]
        else:
            kernel, dilation, padding, stride = self.window
            value = value if value.ndim == len(kernel) + 2 else value.unsqueeze(0)
            if len(kernel) == 1:  # there is an `unfold` of images only
                value = value.unsqueeze(-2)
                kernel, dilation, padding, stride = (1, *kernel), (1, *dilation), (0, *padding), (1, *stride)
            per_image = _positions(value.shape[-2:], kernel, dilation, padding, stride)
            value = spaced(value, max(1, most // max(1, per_image)), skip)
            rows = functional.unfold(value, kernel, dilation, padding, stride).mT.flatten(0, 1)
        return spaced(rows, most, skip)


@dataclass(frozen=True, eq=False)
class Consumer:
    """A weight that sums over one of its dims, wherever it is used.

    Attributes:
        parameter: name in the region; the first name of a tied one.
        dim: the dim that is summed over.
        inputs: the activations that it is multiplied with, one per op.
        window: columns per entry of `dim`: the positions of a convolution's kernel; else 1.
        bias: name of the parameter that is added to the sum and used nowhere else, so that it may take up a constant;
            or None.
    """

    parameter: str
    dim: int
    inputs: tuple[Input, ...]
    window: int
    bias: str | None

    def columns(self, weight: Tensor) -> Tensor:
        """Lay the weight out as a matrix `[rows, columns]`, columns along `dim`."""
        if self.window > 1:
            return weight.flatten(1)
        moved = weight.movedim(self.dim, -1)
        return moved.reshape(-1, moved.shape[-1])

    def as_weight(self, columns: Tensor, weight: Tensor) -> Tensor:
        """Invert `columns`: lay a matrix out in the shape of `weight`."""
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


def _placeholders_of(captured: RegionGraph) -> dict[str, list[fx.Node]]:
    """Return the placeholders of each parameter and buffer, under the first name of a tied one."""
    nodes_of: dict[str, list[fx.Node]] = {}
    for node in captured.graph.nodes:
        name = captured.tensors.get(node.name) if node.op == "placeholder" else None
        if name is not None:
            nodes_of.setdefault(captured.same_storage.get(name, name), []).append(node)
    return nodes_of


def consumers(axis_facts: AxisFacts) -> dict[WeightDim, Consumer | str]:
    """Find the dims of parameters that some op of a graph sums over, each with its inputs or a reason against it."""
    captured = axis_facts.captured
    nodes_of = _placeholders_of(captured)
    results: dict[WeightDim, Consumer | str] = {}
    overwritten = _written_later(captured.graph)
    for name, nodes in nodes_of.items():
        uses: list[_Use | str] = []
        for node in nodes:
            for user, argument, order in _users(node, tuple(range(len(_shape(node)))), axis_facts):
                use = _use(user, argument, order, axis_facts)
                if isinstance(use, _Use) and use.input.node in overwritten.get(user, ()):
                    use = f"its input in {op_name(user)} ({place(user, captured.region)}) is overwritten later"
                uses.append(use)
        dims = {use.dim for use in uses if isinstance(use, _Use)}
        for dim in sorted(dims | _summed_over(name, axis_facts)):
            sums = [use for use in uses if isinstance(use, _Use) and use.dim == dim]
            reason = next((use for use in uses if isinstance(use, str)), None)
            if reason is None and len(sums) < len(uses):
                reason = "another op sums over another of its dims"  # and may make the input of this one
            if reason is None and len({use.window for use in sums}) > 1:
                reason = "it is a convolution's kernel in one op and a matrix in another"
            if reason is None and any(map(is_complex, (*nodes, *(use.input.node for use in sums)))):
                reason = "its numbers, or those that it sums over, are complex"
            if reason is not None:
                results[name, dim] = reason
                continue
            bias = _bias(sums, captured, nodes_of)
            results[name, dim] = Consumer(name, dim, tuple(use.input for use in sums), sums[0].window, bias)
    return results


@dataclass(frozen=True, eq=False)
class Use:
    """One op that takes a parameter, through transposes and casts.

    Attributes:
        user: the op.
        dim: the dim of the parameter that it sums over with one activation; None if it does something else.
        input: the node of that activation.
        bias: name of the parameter that is added to the sum and used nowhere else, or None.
        plain: the sum is over one entry at a time, so that a constant in the input is one in the result.
    """

    user: fx.Node
    dim: int | None = None
    input: fx.Node | None = None
    bias: str | None = None
    plain: bool = True


def uses_of(axis_facts: AxisFacts) -> dict[str, list[Use]]:
    """List the uses of each parameter of a graph, under the first name of a tied one."""
    captured = axis_facts.captured
    nodes_of = _placeholders_of(captured)
    found: dict[str, list[Use]] = {}
    for name, nodes in nodes_of.items():
        for node in nodes:
            for user, argument, order in _users(node, tuple(range(len(_shape(node)))), axis_facts):
                use = _use(user, argument, order, axis_facts)
                if isinstance(use, str):
                    found.setdefault(name, []).append(Use(user))
                else:
                    bias = _bias([use], captured, nodes_of)
                    found.setdefault(name, []).append(Use(user, use.dim, use.input.node, bias, use.window == 1))
    return found


def _summed_over(name: str, axis_facts: AxisFacts) -> set[int]:
    """Return the dims of a parameter that are summed over according to the axis facts, in whatever way."""
    summed = [
        f.expr for f in axis_facts.facts if f.role == "contracted" and any(name in o.parameters for o in f.operands)
    ]
    atoms = {atom for expr in summed for atom in atoms_of(expr)}
    exprs = axis_facts.parameters.get(name, ())
    return {dim for dim, expr in enumerate(exprs) if atoms & set(atoms_of(expr))}


def _written_later(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Map each op to its arguments that a later op writes to: at the end of the graph they have other values."""
    overwritten: dict[fx.Node, set[fx.Node]] = {}
    written: set[fx.Node] = set()  # memory, by the node that made it
    for node in reversed(graph.nodes):
        if written:
            overwritten[node] = {arg for arg in node.all_input_nodes if _origin(arg) in written}
        written.update(_origin(value) for value in written_arguments(node))
    return overwritten


def _origin(node: fx.Node) -> fx.Node:
    """Return the node that made the memory of a value."""
    behind = list(memory_behind(node))
    return behind[-1] if behind else node


def _bias(uses: list[_Use], captured: RegionGraph, nodes_of: dict[str, list[fx.Node]]) -> str | None:
    """Return the name of the bias that may change together with the weight, or None."""
    (node, *more) = (use.bias for use in uses)
    if node is None or more or node.op != "placeholder" or len(node.users) != 1 or len(_shape(node)) != 1:
        return None
    name = captured.tensors.get(node.name)
    if name is None or len(nodes_of[captured.same_storage.get(name, name)]) != 1:
        return None
    return name if captured.is_parameter(name) and name not in captured.shared_outside else None


def _users(
    node: fx.Node, order: tuple[int, ...], axis_facts: AxisFacts
) -> Iterator[tuple[fx.Node, fx.Node, tuple[int, ...]]]:
    """Yield each op that takes a parameter, the argument it takes, and the parameter's dim at each dim of that."""
    for user in node.users:
        match axis_facts.relations.get(user):
            case Pointwise((x,), "copy") if x.node is node:
                yield from _users(user, order, axis_facts)
            case Permuted(x, dims):
                yield from _users(user, tuple(order[i] for i in dims), axis_facts)
            case _:
                yield user, node, order


def _use(user: fx.Node, argument: fx.Node, order: tuple[int, ...], axis_facts: AxisFacts) -> _Use | str:
    """Read off the dim of a parameter that an op sums over, and the input there; or the reason why it does not."""
    if user.op == "output":
        return "it leaves the region as an output"
    where = f"{op_name(user)} ({place(user, axis_facts.captured.region)})"
    if argument_nodes(user).count(argument) != 1 or user.op != "call_function":
        return f"{where} takes it more than once, or not as a matrix"
    if user in axis_facts.derivations:
        return f"{where} makes another weight of it, whose columns are not its own"
    relation = axis_facts.relations.get(user)
    use = _product(relation, user, argument) if isinstance(relation, Pattern) and not relation.apart else None
    if use is None:
        return f"{where} does not multiply it as a matrix with an activation"
    return _Use(order[use.dim], use.input, use.window, use.bias)


def _product(relation: Pattern, node: fx.Node, weight: fx.Node) -> _Use | None:
    """Read a product of a weight and an activation that sums over one dim of both; None where it is another op."""
    pattern = bind(relation.spec, len(relation.operands), tuple(relation.sizes))
    named = [(t, o, list(t.keys_of(o.shape))) for t, o in zip(pattern.operands, relation.operands, strict=True)]
    factors = [(operand, names) for term, operand, names in named if not term.added]
    if len(factors) != 2:
        return None
    (w, w_names), (x, x_names) = sorted(factors, key=lambda factor: factor[0].node is not weight)
    shared = [name for name in w_names if name in x_names]
    if w.node is not weight or w.ndim < 2 or len(shared) != 1 or shared[0] in pattern.kept:
        return None
    if any(isinstance(name, tuple) or names.count(name) > 1 for names in (w_names, x_names) for name in names):
        return None
    others = [name for name in w_names if name != shared[0]]
    if any(name not in pattern.kept for name in others) and relation.window is None:
        return None  # another of its dims is summed over, or chosen from
    window, columns = _window(relation.window)
    if window == ():
        return None
    bias = None
    scaled = any(value != 1 for value in node.kwargs.values() if isinstance(value, (int, float)))
    per_row = columns > 1 or all(w.shape[w_names.index(name)] == 1 for name in others[1:])
    if others and per_row and not scaled:
        bias = next((o.node for t, o, names in named if t.added and names == [others[0]]), None)
    return _Use(w_names.index(shared[0]), Input(x.node, x_names.index(shared[0]) - x.ndim, window), columns, bias)


def _window(window: tuple[tuple[int, ...], ...] | None) -> tuple[tuple[tuple[int, ...], ...] | None, int]:
    """Normalise a window and count its columns: None for a single position, `()` where `unfold` cannot cut it."""
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
    """Count the windows in one image."""
    count = 1
    for size, k, d, p, s in zip(space, *window, strict=True):
        count *= (int(size) + 2 * p - d * (k - 1) - 1) // s + 1
    return count


def _over_rows(mask: Tensor, positions: tuple[int, ...]) -> Tensor | None:
    """Spread a mask over all rows of some positions, flat; None where it does not lie on their first dims."""
    if positions == (mask.numel(),):
        return mask.flatten()
    if tuple(positions[: mask.ndim]) != tuple(mask.shape):
        return None
    return mask[(..., *(None,) * (len(positions) - mask.ndim))].expand(positions).reshape(-1)


def spaced(rows: Tensor, most: int, skip: int) -> Tensor:
    """Return at most `most` rows, evenly spaced, a different set for each `skip`."""
    stride = -(-len(rows) // most)
    return rows[skip % stride :: stride] if stride > 1 else rows
