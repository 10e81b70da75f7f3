"""Reductions along dims: a sum is a contraction with ones; most others need the axis whole."""

from __future__ import annotations

from typing import Any

import torch

from ecospa_fx.passes.ir.relations import Opaque, Operand, Pattern, Pointwise, SameDims

from .operands import letters, tensors
from .registry import axis_rule

aten = torch.ops.aten


def _dims(x: Operand, dim: Any) -> tuple[int, ...]:
    if dim is None or dim == []:
        return tuple(range(x.ndim))
    return tuple(d % x.ndim for d in (dim if isinstance(dim, (list, tuple)) else [dim]))


@axis_rule(aten.sum.dim_IntList, aten.sum.default)
def summed(x: Operand, dim: Any = None, keepdim: bool = False, **_: Any) -> SameDims:
    """Entries along the axis are added up."""
    return SameDims(x, dropped=_dims(x, dim), keepdim=keepdim)


@axis_rule(
    aten.mean.dim, aten.mean.default, aten.amax.default, aten.amin.default, aten.prod.dim_int, aten.prod.default,
    aten.logsumexp.default,
    aten.all.dim, aten.all.default, aten.argmax.default, aten.argmin.default,
)  # fmt: skip
def reduced(x: Operand, dim: Any = None, keepdim: bool = False, **_: Any) -> SameDims:
    """Every entry along the axis counts in the reduction over it."""
    dims = _dims(x, dim)
    return SameDims(x, pinned=dims, dropped=dims, keepdim=keepdim)


@axis_rule(aten.any.default, aten.any.dim, aten.any.dims)
def any_of(x: Operand, dim: Any = None, keepdim: bool = False) -> SameDims:
    """The result holds where any entry along the axis does."""
    return SameDims(x, dropped=_dims(x, dim), keepdim=keepdim, apart=True)


@axis_rule(aten.linalg_vector_norm, aten.linalg_norm)
def norm(x: Operand, order: Any = None, dim: Any = None, keepdim: bool = False, **_: Any) -> SameDims:
    """Every entry along the axis counts in the norm over it."""
    # Zeros add nothing to these norms: a root of a sum, a largest entry or singular value, a number of entries.
    adds_up = order is None or isinstance(order, str) or order >= 0
    return SameDims(x, pinned=() if adds_up else _dims(x, dim), dropped=_dims(x, dim), keepdim=keepdim, apart=True)


@axis_rule(aten.var, aten.std, aten.var_mean, aten.std_mean)
def spread(x: Operand, dim: Any = None, *flags: bool, keepdim: bool = False, **_: Any) -> SameDims:
    """Every entry along the axis counts in the variance over it."""
    dims = _dims(x, None if isinstance(dim, bool) else dim)  # `var(x, unbiased)` is over all of them
    return SameDims(x, pinned=dims, dropped=dims, keepdim=keepdim or flags[1:] == (True,))


@axis_rule(aten.max.dim, aten.min.dim, aten.max.default, aten.min.default)
def extremum(x: Operand, dim: Any = None, keepdim: bool = False, **_: Any) -> SameDims:
    """Every entry along the axis is compared with the others."""
    dims = _dims(x, dim)
    return SameDims(x, pinned=dims, dropped=dims, keepdim=keepdim)


@axis_rule(aten.sort.default, aten.argsort.default)
def ordered(x: Operand, dim: int = -1, *_: Any, **__: Any) -> SameDims:
    """Entries along the axis are sorted."""
    return SameDims(x, pinned=_dims(x, dim) if x.ndim else ())


@axis_rule(aten.sort.stable, aten.argsort.stable)
def ordered_stably(x: Operand, *, dim: int = -1, **_: Any) -> SameDims:
    """Entries along the axis are sorted."""
    return ordered(x, dim)


@axis_rule(aten.topk.default)
def topk(x: Operand, k: int, dim: int = -1, *_: Any, **__: Any) -> Pattern | Opaque:
    """Entries along the axis are sorted."""
    return along(x, dim)


@axis_rule(aten.diff.default)
def difference(x: Operand, n: int = 1, dim: int = -1, *ends: Operand | None) -> Pattern:
    """Each entry along the axis is subtracted from the next."""
    operands = (x, *(end for end in ends if end is not None))
    pin = "!" if n > 0 else ""  # not at all subtracted, entries stay as they are, and those at the ends have no part
    before, *others, after = (letters(x, dim, f"along{i}{pin}") for i in range(len(operands) + 1))
    if n == 0:
        before = after
    return Pattern(f"{', +'.join((before, *others))} -> {after}", operands, apart=True)


def along(x: Operand, dim: int) -> Pattern | Opaque:
    """Write the pattern of an op that mixes entries along a dim into new ones, apart at each position of other dims."""
    if x.ndim == 0:
        return Opaque((x,))
    return Pattern(f"{letters(x, dim, 'along!')} -> {letters(x, dim, 'new!')}", (x,), apart=True)


@axis_rule(aten.histc.default)
def counted(*args: Any, **_: Any) -> Opaque:
    """The value of an entry decides where it is counted."""
    return Opaque(tensors(*args))


@axis_rule(aten.mse_loss.default)
def squared_error(x: Operand, target: Operand, reduction: int = 1) -> Opaque | Pointwise:
    """Every entry counts in the loss."""
    return Pointwise((x, target), "nonlinear") if reduction == 0 else Opaque((x, target))


@axis_rule(aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default)
def classified(*args: Any, **_: Any) -> Opaque:
    """Every class counts in the loss."""
    return Opaque(tensors(*args))
