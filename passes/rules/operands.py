"""Operands: what rules of several kinds read off the tensors of an op, and write of their dims."""

from __future__ import annotations

from typing import Any

from ecospa_fx.passes.ir.relations import Operand


def tensors(*args: Any) -> tuple[Operand, ...]:
    """Return the tensors among the arguments of an op."""
    return tuple(arg for arg in args if isinstance(arg, Operand))


def letters(x: Operand, dim: int, letter: str) -> str:
    """Write a letter per dim of `x`, the same for every operand, with `letter` at `dim`."""
    return " ".join(letter if d == dim % x.ndim else f"d{d}" for d in range(x.ndim))
