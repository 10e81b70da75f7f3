"""Symbolic entries: the entries of a tensor that depends on sizes alone, as formulas of their index.

    SymbolicEntries(graph, sizes).at(node, index) -> an affine integer | a condition | Select(condition, a, b) | None

A mask is often built from aranges and comparisons, in dozens of ops. Its value at a few sizes proves nothing: a window
of 4096 looks causal up to there. Its entry at `(b, h, q, k)`, for symbols q and k, does: if that is `q - k >= 0`, it is
so at every size. An entry without a known formula is None, and so is every entry that depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from ecospa_fx.passes.axes.algebra import as_size
from ecospa_fx.passes.graph.nodes import arguments, memory_behind, written_arguments
from ecospa_fx.passes.ir.relations import Expanded, Permuted, Picked, Pointwise, Regrouped, Sliced
from ecospa_fx.passes.rules import Formula, op_info, relation_of

from .unit_dims import dims_before

aten = torch.ops.aten
Index = tuple[Any, ...]  # one integer expression per dim
true, false = sympy.true, sympy.false


@dataclass(frozen=True)
class Select:
    """A choice of two plain numbers: `a` where `condition` holds, else `b`."""

    condition: Any
    a: float
    b: float


class SymbolicEntries:
    """Formulas of the entries of one graph.

    Attributes:
        sizes: index symbol -> size of the dim it runs along.
        written: nodes in whose memory some op writes; their entries are not known.
        cache: entries computed so far.
    """

    def __init__(self, graph: fx.Graph, sizes: Mapping[sympy.Symbol, Any]) -> None:
        self.sizes = dict(sizes)
        self.written = {view for node in graph.nodes for arg in written_arguments(node) for view in memory_behind(arg)}
        self.cache: dict[tuple[fx.Node, Index], Any] = {}

    def at(self, node: Any, index: Index) -> Any:
        """Return the entry of `node` at `index`, or None where it is not known."""
        if not isinstance(node, fx.Node):
            return node if isinstance(node, (int, float)) else None
        key = (node, index)
        if key not in self.cache:
            self.cache[key] = None  # for the walk below, which never comes back here in a graph without cycles
            self.cache[key] = self._entry(node, index)
        return self.cache[key]

    def nonnegative(self, expr: Any) -> Any:
        """Return the condition `expr >= 0`: true or false where the ranges of indices and sizes decide it."""
        expr = sympy.expand(expr)
        if self._least(expr) >= 0:
            return true
        if self._least(-expr - 1) >= 0:
            return false
        # Undecided, it is a symbol. For integers, not(e >= 0) is -e - 1 >= 0: of the two, the one with a positive
        # leading term stands for both.
        terms = expr.as_ordered_terms()
        leading = next((t for t in terms if t.free_symbols), sympy.Integer(1))
        if leading.as_coeff_Mul()[0] < 0:
            return sympy.Not(sympy.Symbol(f"{sympy.expand(-expr - 1)} >= 0"))
        return sympy.Symbol(f"{expr} >= 0")

    def _least(self, expr: Any) -> float:
        """Return a lower bound of an affine expression, where 0 <= index < its size and 0 <= size."""
        for symbol, size in self.sizes.items():
            coefficient = expr.coeff(symbol)
            if coefficient.is_number and expr.has(symbol):
                expr = sympy.expand(expr.subs(symbol, 0 if coefficient > 0 else size - 1))
        least = 0.0
        for term in expr.as_ordered_terms():
            coefficient, rest = term.as_coeff_Mul()
            if not rest.free_symbols:
                least += float(term)
            elif coefficient < 0 or not rest.is_nonnegative:
                return float("-inf")
        return least

    def _entry(self, node: fx.Node, index: Index) -> Any:
        if node.op != "call_function" or node in self.written:
            return None
        args, kwargs = arguments(node), node.kwargs
        match node.target:
            case aten.arange.default:
                return index[0] if _whole(node) else None
            case aten.arange.start:
                return _number(args[0]) + index[0] if _whole(node) else None
            case aten.index.Tensor:
                return self._indexed(args[0], args[1], index)
            case aten.cumsum.default:
                # Only for a value that does not change along the dim.
                dim = args[1] % len(index)
                value = self.at(args[0], (*index[:dim], _along, *index[dim + 1 :]))
                value = {true: 1, false: 0}.get(value, value)
                return None if not _is_integer(value) or sympy.sympify(value).has(_along) else value * (index[dim] + 1)
            case aten.diff.default:
                return self._differences(node, index)
            case aten.where.self | aten.where.ScalarOther | aten.where.Scalar | aten.where.ScalarSelf:
                return self._where(self._broadcast(args[0], index), *(self._broadcast(a, index) for a in args[1:]))
            case aten.masked_fill.Scalar | aten.masked_fill.Tensor:
                return self._where(
                    self._broadcast(args[1], index), self.at(args[2], ()), self._broadcast(args[0], index)
                )
            case aten.tril.default | aten.triu.default:
                below = index[-2] - index[-1] + (*args, 0)[1]
                kept = self.nonnegative(below if node.target is aten.tril.default else -below)
                if _dtype(node) is torch.bool:
                    value = self.at(args[0], index)
                    return None if value is None else sympy.And(kept, value)
                return self._where(kept, self.at(args[0], index), 0)
        info = op_info(node.target)
        if info is not None and info.formula is not None and info.formula.takes == "arguments":
            return self._fill(info.formula.entry(self.nonnegative, *args), node)
        if info is not None and info.formula is not None and not kwargs:
            return self._formula(info.formula, node, [self._broadcast(arg, index) for arg in args])
        return self._moved(node, index)

    def _fill(self, value: Any, node: fx.Node) -> Any:
        if not isinstance(value, (bool, int, float)):
            return None
        return sympy.sympify(bool(value)) if _dtype(node) is torch.bool else value

    def _formula(self, formula: Formula, node: fx.Node, values: list[Any]) -> Any:
        if formula.takes == "conditions" and _dtype(node) is torch.bool:
            values = [self._cast(value, node) for value in values]
        fits = _is_condition if formula.takes == "conditions" else _is_integer
        return formula.entry(self.nonnegative, *values) if all(map(fits, values)) else None

    def _moved(self, node: fx.Node, index: Index) -> Any:
        """Return an entry of an op that moves entries: that of its operand, at its position there."""
        match relation_of(node):
            case Pointwise((x,), "copy"):
                return self._cast(self.at(x.node, index), node)
            case Permuted(x, order):
                positions = dict(zip(order, index, strict=True))
                return self.at(x.node, tuple(positions[d] for d in range(x.ndim)))
            case Regrouped(x):
                before = dims_before(x.shape, _shape(node))
                if before is None:
                    return None
                positions = {d: i for d, i in zip(before, index, strict=True) if d is not None}
                return self.at(x.node, tuple(positions.get(d, 0) for d in range(x.ndim)))
            case Expanded(x):
                return self._broadcast(x.node, index)
            case Picked(x, dim, int(at)) if at >= 0:
                return self.at(x.node, (*index[:dim], at, *index[dim:]))
            case Sliced(x, dim, int(start), _, int(step)):
                return self.at(x.node, (*index[:dim], start + step * index[dim], *index[dim + 1 :]))
            case _:
                return None

    def _broadcast(self, node: Any, index: Index) -> Any:
        """Return the entry of an operand that broadcasts to the shape in which `index` is a position."""
        if not isinstance(node, fx.Node):
            return node if isinstance(node, (bool, int, float)) else None
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            return as_size(val) if isinstance(val, (int, torch.SymInt)) else None
        shape = _shape(node)
        if len(shape) > len(index):
            return None
        last = index[len(index) - len(shape) :]
        return self.at(node, tuple(0 if size == 1 else i for size, i in zip(shape, last, strict=True)))

    def _indexed(self, x: fx.Node, given: Sequence[Any], index: Index) -> Any:
        """Return an entry of `x` looked up by one index tensor per dim, which broadcast."""
        if len(given) != len(_shape(x)) or any(t is None or _dtype(t) is torch.bool for t in given):
            return None
        positions = [self._broadcast(t, index) for t in given]
        if not all(_is_integer(position) and self.nonnegative(position) == true for position in positions):
            return None  # a negative position counts from the end
        return self.at(x, tuple(positions))

    def _differences(self, node: fx.Node, index: Index) -> Any:
        """Return the difference between neighbours, where all are the same; the first one is to `prepend`."""
        rest: tuple[Any, ...] = (None, 1, -1, None, None)[len(node.args) :]
        x, n, dim, prepend, append = (*arguments(node), *rest)
        if n != 1 or append is not None or node.kwargs:
            return None
        dim %= len(index)

        def index_at(position: Any) -> Index:
            return (*index[:dim], position, *index[dim + 1 :])

        a, b = self.at(x, index_at(_along + 1)), self.at(x, index_at(_along))
        pairs = [(a, b)]
        if prepend is not None:
            if _shape(prepend)[dim] != 1:
                return None
            pairs.append((self.at(x, index_at(0)), self.at(prepend, index_at(0))))
        if not all(_is_integer(value) for pair in pairs for value in pair):
            return None
        steps = {sympy.expand(a - b) for a, b in pairs}
        (step, *more) = steps
        return None if more or not step.is_number else step

    def _cast(self, value: Any, node: fx.Node) -> Any:
        """Cast a value to the dtype of `node`; None where no formula is known for the result."""
        if _dtype(node) is torch.bool:
            return sympy.sympify(value) if _is_condition(value) else None
        if _is_condition(value):
            return Select(value, 1, 0)
        return value if not _dtype(node).is_floating_point or isinstance(value, (Select, int, float)) else None

    def _where(self, condition: Any, a: Any, b: Any) -> Any:
        if not _is_condition(condition):
            return None
        if condition in (true, false):
            return a if condition == true else b
        if isinstance(a, (int, float)) and isinstance(b, (int, float)):
            return Select(condition, float(a), float(b))
        return None


_along = sympy.Symbol("_along", integer=True)  # an index that a formula must not depend on


def _is_integer(value: Any) -> bool:
    return type(value) is int or (isinstance(value, sympy.Expr) and value.is_integer is True)


def _is_condition(value: Any) -> bool:
    # A sympy symbol may be either; those of integers say so.
    return isinstance(value, (bool, Boolean)) and not getattr(value, "is_integer", None)


def _number(arg: Any) -> Any:
    return as_size(arg.meta["val"]) if isinstance(arg, fx.Node) else arg


def _whole(node: fx.Node) -> bool:
    return not _dtype(node).is_floating_point and all(not isinstance(arg, float) for arg in node.args)


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(map(as_size, node.meta["val"].shape))
