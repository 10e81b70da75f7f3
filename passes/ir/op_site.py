"""Op site: one op of a program whose arguments a rule rewrites for new sizes."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from ecospa_fx.passes.axes.algebra import UNIT, Expr, Size, as_size, quotient, size_of
from ecospa_fx.passes.axes.selection import Selection, count, count_before, in_first_contexts, mask_of, touched
from ecospa_fx.passes.graph.nodes import by_name

from .axis_facts import AxisFacts
from .relations import Operand


class OpSite:
    """One op of a program, whose arguments a rule's `resize` may rewrite for the new sizes.

    Attributes:
        target: the op; assign to change it to another.
        args: every argument by its name in the op's schema, with defaults; assign to change one.
        operands: the tensor arguments, with their axes at original sizes.
        outputs: the axes of each output.
        made: the axes that the op makes itself by repeating.
    """

    def __init__(self, node: fx.Node, original: fx.Node, axis_facts: AxisFacts, kept: Selection) -> None:
        target: Any = node.target
        self.target = target
        self.operands: tuple[Operand, ...] = axis_facts.operands[original]
        self.outputs = axis_facts.values[original]
        self.made = axis_facts.made.get(original, ())
        self._node, self._kept = node, in_first_contexts(kept)  # sizes and bounds are the same in every one
        self.args = by_name(target, node.args, node.kwargs, defaults=True)

    def touched(self, expr: Expr) -> bool:
        """Return True if `expr` has lost entries."""
        return touched(expr, self._kept)

    def count(self, expr: Expr) -> Size:
        """Return the number of entries of `expr` that stay."""
        return count(expr, self._kept)

    def kept_before(self, expr: Expr, bound: Any) -> Any:
        """Count the entries of `expr` that stay before position `bound`, read as Python reads slice bounds.

        Args:
            expr: the axis.
            bound: an int, or a node that computes one.
        """
        at, size = as_size(bound.meta["val"]) if isinstance(bound, fx.Node) else bound, size_of(expr)
        if type(at) is int and type(size) is int:
            return int(mask_of(expr, self._kept)[:at].sum()) if at < size else at
        if type(at) is int and at >= 2**62:  # beyond any end
            return at
        if at < 0 if type(at) is int else at.is_negative:
            left = as_size(count_before(expr, as_size(size + at), self._kept) - self.count(expr))
            return self._scaled(bound, at, left) if left != 0 else 2**63 - 1
        return self._scaled(bound, at, count_before(expr, at, self._kept))

    def resized(self, size: Any, expr: Expr, per: Expr = UNIT) -> Any:
        """Scale `size` from the original extent of `expr` to the kept one, counted in entries of `per`.

        Args:
            size: an int, or a node that computes one.
            expr: the axis that it counts.
            per: the axis that runs along `expr` once per counted entry: the channels of a group, say.
        """
        before = quotient(size_of(expr), size_of(per))
        return size if size == -1 else self._scaled(size, before, quotient(self.count(expr), self.count(per)))

    def share(self, tensor: fx.Node, dim: int, expr: Expr, part: Expr) -> Any:
        """Compute the entries of `part` that stay from the size of a dim of `tensor` that carries `expr`."""
        with self._node.graph.inserting_before(self._node):
            size = self._node.graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
        return self._scaled(size, self.count(expr), self.count(part))

    def _scaled(self, value: Any, before: Size, after: Size) -> Any:
        """Turn `value`, an int or a node that computes `before`, into what computes `after`."""
        if type(after) is int:
            return after
        # Both are a dynamic factor times static ones: the ratio of the static ones is exact.
        ratio = sympy.cancel(sympy.sympify(after) / before)
        if ratio == 1:
            return value
        if not ratio.is_Rational:
            raise ValueError(f"{before} and {after} are no multiples of each other")
        with self._node.graph.inserting_before(self._node):
            scaled = self._node.graph.call_function(operator.mul, (value, int(ratio.p)))
            return self._node.graph.call_function(operator.floordiv, (scaled, int(ratio.q)))

    def resize_output(self, *names: str) -> None:
        """Rewrite the argument that lists the sizes of the output; `names` are the names it may have."""
        name = next(name for name in names if name in self.args)
        # `expand` may name more dims than the operand has, never fewer than the output.
        self.args[name] = [
            self.resized(size, expr) if self.touched(expr) else size
            for size, expr in zip(self.args[name], self.outputs[0], strict=True)
        ]

    def repeats(self) -> Any:
        """Return the numbers of copies that stay, as `repeat` (a list) or `repeat_interleave` (one int) takes them."""
        times = self.args["repeats"]
        if isinstance(times, (list, tuple)):
            return [self.count(copy) if self.touched(copy) else n for n, copy in zip(times, self.made, strict=True)]
        return next(self.count(copy) for copy in self.made if self.touched(copy))

    def apply(self) -> None:
        """Write the arguments back into the node."""
        self._node.target = self.target
        schema = self.target._schema.arguments
        self._node.args = tuple(self.args[a.name] for a in schema if not a.kwarg_only and a.name in self.args)
        self._node.kwargs = {a.name: self.args[a.name] for a in schema if a.kwarg_only and a.name in self.args}
