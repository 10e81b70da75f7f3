"""Reductions along dims: a sum is a contraction with ones; most others take what is left, as an average does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ecospa_fx.passes.axes.algebra import as_size
from ecospa_fx.passes.ir.relations import Opaque, Operand, Pattern, SameDims

from .operands import along, dims_of, letters, tensors
from .registry import axis_rule

aten = torch.ops.aten


@axis_rule(aten.sum.dim_IntList, aten.sum.default)
def summed(x: Operand, dim: Any = None, keepdim: bool = False, **_: Any) -> SameDims:
    """Entries along the axis are added up."""
    return SameDims(x, dropped=dims_of(x, dim), keepdim=keepdim)


@axis_rule(
    aten.mean.dim, aten.mean.default, aten.nanmean, aten.amax, aten.amin, aten.aminmax, aten.prod.dim_int,
    aten.prod.default, aten.logsumexp.default, aten.all.dim, aten.all.dims, aten.all.default, aten.max.default,
    aten.min.default, aten.median.default, aten.nanmedian.default,
)  # fmt: skip
def reduced(x: Operand, dim: Any = None, keepdim: bool = False, **_: Any) -> SameDims:
    """All that is left along the axis is reduced to one entry."""
    dims = dims_of(x, dim)
    return SameDims(x, absent=dims, dropped=dims, keepdim=keepdim)


@axis_rule(aten.max.dim, aten.min.dim, aten.median.dim, aten.nanmedian.dim, aten.mode.default)
def chosen(x: Operand, dim: int = -1, keepdim: bool = False) -> SameDims:
    """One of the entries along the axis is the result, and another result is its position."""
    return replace(reduced(x, dim, keepdim), positions=1)


@axis_rule(aten.argmax, aten.argmin)
def position(x: Operand, dim: Any = None, keepdim: bool = False) -> SameDims:
    """The result is a position among all entries of several axes."""
    dims = dims_of(x, dim)
    if len(dims) > 1:
        return SameDims(x, pinned=dims, dropped=dims, keepdim=keepdim)
    return SameDims(x, absent=dims, dropped=dims, keepdim=keepdim, positions=0)


@axis_rule(aten.kthvalue.default)
def kth(x: Operand, k: int, dim: int = -1, keepdim: bool = False) -> SameDims:
    """There may be no k-th entry among those that are left."""
    dims = dims_of(x, dim)
    return SameDims(x, pinned=dims, dropped=dims, keepdim=keepdim, positions=1)


@axis_rule(aten.any.default, aten.any.dim, aten.any.dims, aten.count_nonzero, aten.nansum, aten.hash_tensor)
def any_of(x: Operand, dim: Any = None, keepdim: bool = False, **_: Any) -> SameDims:
    """Entries along the axis that are not zero decide the result."""
    return SameDims(x, dropped=dims_of(x, dim), keepdim=keepdim, apart=True)


@axis_rule(aten.linalg_vector_norm, aten.linalg_norm, aten.norm)
def norm(x: Operand, order: Any = None, dim: Any = None, keepdim: bool = False, **_: Any) -> SameDims:
    """Every entry that is left along the axis counts in the norm over it."""
    return reduced(x, dim, keepdim)


@axis_rule(aten.var, aten.std, aten.var_mean, aten.std_mean)
def spread(x: Operand, dim: Any = None, *flags: bool, keepdim: bool = False, **_: Any) -> SameDims:
    """Every entry that is left along the axis counts in the variance over it."""
    dim = None if isinstance(dim, bool) else dim  # `var(x, unbiased)` is over all of them
    return reduced(x, dim, keepdim or flags[1:] == (True,))


@axis_rule(aten.linalg_matrix_norm)
def matrix_norm(x: Operand, order: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False, **_: Any) -> SameDims:
    """Every entry that is left along the axis counts in the norm over it."""
    return reduced(x, dim, keepdim)


@axis_rule(aten.frobenius_norm.dim, aten.nuclear_norm)
def norm_along(x: Operand, dim: Any = None, keepdim: bool = False) -> SameDims:
    """Every entry that is left along the axis counts in the norm over it."""
    dim, keepdim = (None, dim) if isinstance(dim, bool) else (dim, keepdim)
    return reduced(x, dim, keepdim)


@axis_rule(aten.quantile, aten.nanquantile)
def quantile(x: Operand, q: Any, dim: int | None = None, keepdim: bool = False, **_: Any) -> SameDims | Pattern:
    """Every entry that is left along the axis is compared with the others."""
    if not (isinstance(q, Operand) and q.ndim):
        return reduced(x, dim, keepdim)
    dims = dims_of(x, dim)
    own = " ".join(f"d{d}~" if d in dims else f"d{d}" for d in range(x.ndim))
    left = " ".join(f"one{d}" if d in dims else f"d{d}" for d in range(x.ndim) if keepdim or d not in dims)
    return Pattern(f"{own}, +q -> q {left}", (x, q), apart=True)


@axis_rule(aten.trapezoid)
def trapezoid(y: Operand, x: Operand | None = None, *, dim: int = -1, **_: Any) -> SameDims | Opaque:
    """Each entry along the axis is added to the next."""
    return SameDims(y, pinned=(dim % y.ndim,), dropped=(dim % y.ndim,), keepdim=False) if x is None else Opaque((y, x))


@axis_rule(aten.cumulative_trapezoid)
def trapezoids(y: Operand, x: Operand | None = None, *, dim: int = -1, **_: Any) -> Pattern | Opaque:
    """Each entry along the axis is added to the next."""
    return along(y, dim) if x is None else Opaque((y, x))


@axis_rule(aten.gradient)
def gradient(x: Operand, *, spacing: Any = None, dim: Any = None, **_: Any) -> SameDims | Pattern:
    """Each entry along the axis is compared with the next."""
    spaces, pinned = tensors(spacing), dims_of(x, dim)
    if not spaces:
        return SameDims(x, pinned=pinned)
    own = " ".join(f"d{d}!" if d in pinned else f"d{d}" for d in range(x.ndim))
    return Pattern(f"{own}{''.join(f', +s{i}!' for i in range(len(spaces)))} -> {own}", (x, *spaces), apart=True)


@axis_rule(aten.sum_to_size.default, resize=lambda site: site.resize_output("size"))
def sum_to_size(x: Operand, size: list[Any]) -> str:
    """Entries are added up along dims that the result has not, or with one entry."""
    kept = [f"d{i}" for i in range(x.ndim)]
    sizes = zip(range(x.ndim - len(size), x.ndim), size, strict=True)
    return f"{' '.join(kept)} -> {' '.join(f'one{i}' if as_size(n) == 1 else f'd{i}' for i, n in sizes)}"


@axis_rule(aten.msort.default)
def sorted_rows(x: Operand) -> SameDims:
    """Entries along the axis are sorted."""
    return SameDims(x, pinned=dims_of(x, 0), ordered=True)


@axis_rule(aten.sort.default)
def ordered(x: Operand, dim: int = -1, *_: Any, **__: Any) -> SameDims:
    """Entries along the axis are sorted."""
    return SameDims(x, pinned=dims_of(x, dim), ordered=True, positions=1)


@axis_rule(aten.sort.stable)
def ordered_stably(x: Operand, *, dim: int = -1, **_: Any) -> SameDims:
    """Entries along the axis are sorted."""
    return ordered(x, dim)


@axis_rule(aten.argsort.default)
def order(x: Operand, dim: int = -1, *_: Any, **__: Any) -> SameDims:
    """Entries along the axis are sorted."""
    return SameDims(x, pinned=dims_of(x, dim), positions=0)


@axis_rule(aten.argsort.stable)
def stable_order(x: Operand, *, dim: int = -1, **_: Any) -> SameDims:
    """Entries along the axis are sorted."""
    return order(x, dim)


@axis_rule(aten.topk.default)
def topk(x: Operand, k: int, dim: int = -1, *_: Any, **__: Any) -> Pattern | Opaque:
    """Entries along the axis are sorted."""
    if x.ndim == 0 or type(k) is not int:
        return along(x, dim)
    spec = f"{letters(x, dim, 'along~')} -> {letters(x, dim, 'new!')}"
    return Pattern(spec, (x,), apart=True, positions=(1, "along"), least=("along", k))


@axis_rule(aten.diff.default)
def difference(x: Operand, n: int = 1, dim: int = -1, *ends: Operand | None) -> Pattern:
    """Each entry along the axis is subtracted from the next."""
    operands = (x, *(end for end in ends if end is not None))
    pin = "!" if n > 0 else ""  # not at all subtracted, entries stay as they are, and those at the ends have no part
    before, *others, after = (letters(x, dim, f"along{i}{pin}") for i in range(len(operands) + 1))
    if n == 0:
        before = after
    return Pattern(f"{', +'.join((before, *others))} -> {after}", operands, apart=True)
