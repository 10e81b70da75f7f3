"""Op site: one op of a program whose arguments a rule rewrites for new sizes."""

from __future__ import annotations

import operator
from typing import Any

import sympy
from torch import fx

from ecospa_fx.passes.axes.algebra import UNIT, Expr, quotient, size_of
from ecospa_fx.passes.axes.selection import Selection, count, in_first_contexts, mask_of, touched

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
        arguments = target._schema.arguments
        self.args = {a.name: a.default_value for a in arguments} | dict(node.kwargs)
        self.args |= {a.name: value for a, value in zip(arguments, node.args, strict=False)}

    def touched(self, expr: Expr) -> bool:
        """Return True if `expr` has lost entries."""
        return touched(expr, self._kept)

    def count(self, expr: Expr) -> int:
        """Return the number of entries of `expr` that stay."""
        return int(count(expr, self._kept))

    def kept_before(self, expr: Expr, bound: int) -> int:
        """Count the entries of `expr` that stay before position `bound`, read as Python reads slice bounds."""
        return int(mask_of(expr, self._kept)[:bound].sum()) if bound < size_of(expr) else bound

    def resized(self, size: Any, expr: Expr, per: Expr = UNIT) -> Any:
        """Scale `size` from the original extent of `expr` to the kept one, counted in entries of `per`.

        Args:
            size: an int, or a node that computes one.
            expr: the axis that it counts.
            per: the axis that runs along `expr` once per counted entry: the channels of a group, say.
        """
        if size == -1:
            return size
        kept = quotient(count(expr, self._kept), count(per, self._kept))
        if isinstance(size, int):
            assert kept is not None  # only whole entries of `per` go
            return int(kept)
        # The extent is a dynamic factor times static ones: the ratio of the static ones is exact.
        ratio = sympy.sympify(kept) / quotient(size_of(expr), size_of(per))
        if ratio == 1:
            return size
        with self._node.graph.inserting_before(self._node):
            scaled = self._node.graph.call_function(operator.mul, (size, int(ratio.p)))
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
