"""Places: the values of a graph that are positions along an axis, and what each op makes of them.

    Places(axis_facts)
      .axis_of(node)     the axis that the entries of a value are positions along: those of a `topk`, `argmax`, `sort`
      .visit(node, ...)  hand places on, meet those that are compared, and pin the axis of those that are read otherwise

A shrink renumbers what is left along an axis. Positions along it that the graph finds itself (among router logits, say)
come out renumbered, as long as all that reads them counts along the same axis: a weight that they pick from, a one-hot,
a histogram, `arange` that they are compared with. As numbers, or outside the graph, they would mean other entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from ecospa_fx.passes.axes.algebra import Expr, size_of
from ecospa_fx.passes.graph.nodes import arguments, op_name, tensor_meta
from ecospa_fx.passes.ir import relations as r
from ecospa_fx.passes.ir.axis_facts import AxisFacts

aten = torch.ops.aten

_SAME_ENTRIES = {
    aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten.expand.default, aten.to.dtype,
    aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.clone.default, aten.contiguous.default,
    aten.squeeze.dim, aten.alias.default,
}  # fmt: skip


_EXACT = (torch.int64, torch.int32, torch.int16, torch.float64, torch.float32)  # that hold any position


class Places:
    """The positions among the values of one graph, in the order in which its ops are visited."""

    def __init__(self, axis_facts: AxisFacts) -> None:
        self._axis_facts = axis_facts
        self._several: dict[tuple[fx.Node, int], Expr] = {}  # of one of several results

    def axis_of(self, node: fx.Node) -> Expr | None:
        """Return the axis that the entries of a value are positions along, or None."""
        return self._axis_facts.places.get(node)

    def is_counted(self, node: fx.Node) -> bool:
        """Return whether a value depends on parameters by places only."""
        return node in self._axis_facts.counted

    def take(self, node: fx.Node, source: fx.Node, number: int) -> None:
        """Note the places in one of several results."""
        if (source, number) in self._several:
            self._axis_facts.places[node] = self._several[source, number]
        if source in self._axis_facts.counted:
            self._axis_facts.counted.add(node)

    def visit(self, node: fx.Node, relation: r.Relation, operands: Sequence[r.Operand]) -> None:
        """Note the places among the results of an op, and pin the axes of those that it reads as numbers."""
        for x in self._read_as_numbers(node, relation, operands):
            self.pin(x.node, node, x.places)
        several = not isinstance(node.meta["val"], torch.Tensor)
        for number, expr in _results(relation, len(node.meta["val"]) if several else 1):
            if not several and node.meta["val"].dtype not in _EXACT:
                self._axis_facts.pin(expr, node, f"{op_name(node)}: positions along the axis are rounded")
            elif not several:
                self._axis_facts.places[node] = expr
            else:
                self._several[node, number] = expr
        weighted = [x for x in operands if x.weighted]
        if weighted and all(x.places is not None or x.counted for x in weighted):
            self._axis_facts.counted.add(node)

    def pin(self, value: fx.Node, user: fx.Node, expr: Expr | None = None, why: str = "") -> None:
        """Keep the axis whole that a value holds positions along, if it does."""
        expr = self.axis_of(value) if expr is None else expr
        if expr is not None:
            why = why or f"{op_name(user)}: positions along the axis are used as numbers"
            self._axis_facts.pin(expr, user, why)

    def _read_as_numbers(
        self, node: fx.Node, relation: r.Relation, operands: Sequence[r.Operand]
    ) -> Iterator[r.Operand]:
        """Yield the operands whose places an op reads in a way that does not follow a shrink."""
        match relation:
            case r.Created() | r.SameDims(empty=True) | r.SameDims(positions=0):
                return  # nothing is read, or entries are compared with each other: a shrink keeps their order
            case r.Pointwise(xs, compares=True) if len(xs) > 1 and _along_one(xs):
                for x in xs[1:]:
                    self._axis_facts.axes.unify(xs[0].places, x.places)  # type: ignore[arg-type]
                return
            case r.Joined(xs) | r.Stacked(xs) if _along_one(xs) and all(x.weighted for x in xs):
                for x in xs[1:]:
                    self._axis_facts.axes.unify(xs[0].places, x.places)  # type: ignore[arg-type]
                return
        known = {x.node for x in (_handed_on(relation), *read_as_places(relation)) if x is not None}
        yield from (x for x in operands if x.weighted and x.places is not None and x.node not in known)


def _results(relation: r.Relation, count: int) -> Iterator[tuple[int, Expr]]:
    """Yield the results, of `count`, that hold places, and the axis that these lie along."""
    handed, found = _handed_on(relation), r.positions(relation)
    if found is not None:
        number, x, dim = found
        yield number, x.exprs[dim]
        if handed is not None and handed.places is not None:
            yield 1 - number, handed.places
        return
    match relation:
        case r.Joined(xs) | r.Stacked(xs) if _along_one(xs) and all(x.weighted for x in xs):
            yield 0, xs[0].places  # type: ignore[misc]
        case _ if handed is not None and handed.places is not None:
            yield from ((number, handed.places) for number in range(count))


def _handed_on(relation: r.Relation) -> r.Operand | None:
    """Return the operand whose entries the result of an op holds."""
    match relation:
        case r.Pattern(operands=(x, *_), moves=True) | r.SameDims(x, ordered=True):
            return x
        case _:
            return r.moved_operand(relation)


def _along_one(xs: Sequence[r.Operand]) -> bool:
    """Return whether operands all hold places along axes of one size."""
    sizes = {None if x.places is None else size_of(x.places) for x in xs}
    return len(sizes) == 1 and None not in sizes


def read_as_places(relation: r.Relation) -> Iterator[r.Operand]:
    """Yield the operands by whose values an op chooses entries of an axis, or whose places it compares with others."""
    match relation:
        case r.Indexed(index=index):
            yield index
        case r.Pattern(chosen=chosen):
            yield from chosen.values()
        case r.Pointwise(xs, compares=True) if len(xs) > 1 and _along_one(xs):
            yield from xs


def counting_dim(node: fx.Node) -> int | None:
    """Return the dim along which the entries of a value that depends on nothing are their own positions, or None."""
    made = node
    while made.op == "call_function" and made.target in _SAME_ENTRIES:
        made = arguments(made)[0]
    if made.op != "call_function" or not _counts_up(made):
        return None
    (shape, (count,)) = (tensor_meta(each)[0].shape for each in (node, made))
    dims = [dim for dim, size in enumerate(shape) if size != 1]
    dtype = tensor_meta(node)[0].dtype
    return dims[0] if len(dims) == 1 and shape[dims[0]] == count and not dtype.is_floating_point else None


def _counts_up(node: fx.Node) -> bool:
    args = arguments(node)
    if node.target is aten.arange.default:
        return True
    return node.target in (aten.arange.start, aten.arange.start_step) and args[0] == 0 and args[2:3] in ((), (1,))
