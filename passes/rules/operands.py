"""Operands: what rules of several kinds read off the tensors of an op, and write of their dims."""

from __future__ import annotations

from typing import Any

from ecospa_fx.passes.ir.relations import Opaque, Operand, Pattern


def tensors(*args: Any) -> tuple[Operand, ...]:
    """Return the tensors among the arguments of an op, those in lists included."""
    flat = (item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    return tuple(item for item in flat if isinstance(item, Operand))


def dims_of(x: Operand, dim: Any) -> tuple[int, ...]:
    """Return the dims that an op names, all of them where it names none."""
    if dim is None or dim == []:
        return tuple(range(x.ndim))
    return tuple(d % x.ndim for d in (dim if isinstance(dim, (list, tuple)) else [dim]) if x.ndim)


def spaced(letter: str, count: int, mark: str = "") -> str:
    """Write `count` names that start with `letter`, `c0 c1 c2`; `mark` comes after each."""
    return " ".join(f"{letter}{i}{mark}" for i in range(count))


def letters(x: Operand, dim: int, letter: str) -> str:
    """Write a letter per dim of `x`, the same for every operand, with `letter` at `dim`."""
    return " ".join(letter if d == dim % x.ndim else f"d{d}" for d in range(x.ndim))


def along(x: Operand, dim: int) -> Pattern | Opaque:
    """Write the pattern of an op that mixes entries along a dim into new ones, apart at each position of other dims."""
    if x.ndim == 0:
        return Opaque((x,))
    return Pattern(f"{letters(x, dim, 'along!')} -> {letters(x, dim, 'new!')}", (x,), apart=True)
