"""Sizes: ints, or sympy expressions where torch.export found a dim to be dynamic, in a normal form that compares."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Max

Size: TypeAlias = Any  # int | sympy.Expr; sympy is untyped


def as_size(size: int | torch.SymInt | sympy.Expr) -> Size:
    """Return the normal form of a size: an int where the value is known, else the sympy expression behind a SymInt."""
    if type(size) is int:
        return size
    expr = size.node.expr if isinstance(size, torch.SymInt) else size
    if not isinstance(expr, sympy.Expr):
        return int(expr)
    if isinstance(size, torch.SymInt) and not expr.is_Symbol and (told := _told(size.node.shape_env)):
        expr = expr.xreplace(told)
    return _normal(expr)


_TOLD: WeakKeyDictionary[Any, tuple[int, dict[sympy.Expr, sympy.Expr]]] = WeakKeyDictionary()


def _told(shapes: Any) -> dict[sympy.Expr, sympy.Expr]:
    """Return the sizes of which a graph holds only where they are one: of one patch of a small image, say.

    torch.export writes the one from the op on that asked for it, and the size before. Of other numbers the size tells
    more: of which axes it is the product.
    """
    if shapes is None:
        return {}
    number, told = _TOLD.get(shapes, (0, {}))
    if number != len(shapes.guards):
        equal = [guard.expr for guard in shapes.guards if isinstance(guard.expr, sympy.Eq)]
        told = {each.lhs: each.rhs for each in equal if each.rhs == 1 and not each.lhs.is_Symbol}
        _TOLD[shapes] = len(shapes.guards), told
    return told


@lru_cache(maxsize=1 << 14)  # a graph has few sizes and asks for them at every node, and sympy is slow
def _normal(expr: sympy.Expr) -> Size:
    if expr.has(FloorDiv):
        # torch writes a floor division even where the division is exact: `(s*s) // s`, say.
        expr = expr.replace(FloorDiv, lambda a, b: FloorDiv(a, b) if (exact := quotient(a, b)) is None else exact)
    if expr.has(Max):
        # torch keeps `max(0, -s - 1)`, although sizes are positive.
        expr = expr.replace(Max, _largest)
    if expr.has(sympy.Add):
        expr = sympy.expand(expr)  # sums of products have many forms, which compare as different
    return int(expr) if isinstance(expr, sympy.Integer) else expr


def in_words(size: Size | Sequence[Size]) -> str:
    """Return a size, or a list of them, for a reason: symbols of torch.export say nothing to who reads it."""
    if isinstance(size, (list, tuple)):
        return f"[{', '.join(map(in_words, size))}]"
    return str(size) if type(size) is int else "a dynamic size"


def _largest(*args: sympy.Expr) -> sympy.Expr:
    """Return the maximum of sizes, without those that are provably not larger than another."""
    candidates = [
        a for i, a in enumerate(args) if not any((b - a).is_nonnegative for j, b in enumerate(args) if j != i)
    ]
    return candidates[0] if len(candidates) == 1 else Max(*args)


def quotient(size: Size, divisor: Size) -> Size | None:
    """Return `size / divisor` where that is provably an integer, else None."""
    if type(size) is int and type(divisor) is int:
        return size // divisor if divisor and size % divisor == 0 else None
    return 1 if size == divisor else _ratio(size, divisor)


@lru_cache(maxsize=1 << 14)
def _ratio(size: Size, divisor: Size) -> Size | None:
    ratio = size / sympy.sympify(divisor)
    if isinstance(size, sympy.Add):
        ratio = sympy.cancel(ratio)
    return as_size(ratio) if sympy.fraction(ratio)[1] == 1 and ratio.is_integer else None
