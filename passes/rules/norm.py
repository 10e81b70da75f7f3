"""Normalisations: statistics of what is left along an axis; and ops that need it whole, as its order counts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ecospa_fx.passes.axes.algebra import Expr, product, size_of
from ecospa_fx.passes.ir.relations import Operand, Pattern, SameDims

from .operands import dims_of, letters, spaced, tensors
from .registry import axis_rule

if TYPE_CHECKING:
    from ecospa_fx.passes.ir.op_site import OpSite

aten = torch.ops.aten


@axis_rule(aten.softmax, aten._softmax, aten._safe_softmax)
def softmax(x: Operand, dim: int, *_: Any, **__: Any) -> SameDims:
    """Entries along the axis become shares of what is left."""
    return SameDims(x, absent=dims_of(x, dim), shares=True)


@axis_rule(aten.log_softmax, aten._log_softmax)
def log_softmax(x: Operand, dim: int, *_: Any, **__: Any) -> SameDims:
    """Entries along the axis become logarithms of shares of what is left."""
    return SameDims(x, absent=dims_of(x, dim))


@axis_rule(aten.cumsum)
def summed_so_far(x: Operand, dim: int, *_: Any, **__: Any) -> SameDims:
    """Results along the axis depend on other entries along it."""
    if x.counted:  # numbers of entries at places: there are none at those that go
        return SameDims(x, running=dim % x.ndim)
    return accumulated(x, dim)


@axis_rule(aten.cumprod, aten.logcumsumexp, aten.cummax, aten.cummin)
def accumulated(x: Operand, dim: int, *_: Any, **__: Any) -> SameDims:
    """Results along the axis depend on other entries along it."""
    return SameDims(x, pinned=(dim % x.ndim,))


@axis_rule(aten.flip.default)
def flip(x: Operand, dims: list[int]) -> SameDims:
    """Entries along the axis move to other positions."""
    return SameDims(x, pinned=tuple(dim % x.ndim for dim in dims), moves=True)


@axis_rule(aten.fliplr.default)
def fliplr(x: Operand) -> SameDims:
    """Entries along the axis move to other positions."""
    return SameDims(x, pinned=(1,), moves=True)


@axis_rule(aten.flipud.default)
def flipud(x: Operand) -> SameDims:
    """Entries along the axis move to other positions."""
    return SameDims(x, pinned=(0,), moves=True)


@axis_rule(aten.rot90.default)
def rot90(x: Operand, k: int = 1, dims: tuple[int, ...] = (0, 1)) -> SameDims | Pattern:
    """Entries along the axes move to other positions."""
    a, b = (d % x.ndim for d in dims)
    flipped = ((), (b,), (a, b), (a,))[k % 4]
    if k % 2 == 0:
        return SameDims(x, pinned=flipped, moves=True)
    names = [f"d{d}!" if d in flipped else f"d{d}" for d in range(x.ndim)]
    turned = list(names)
    turned[a], turned[b] = names[b], names[a]
    return Pattern(f"{' '.join(names)} -> {' '.join(turned)}", (x,), moves=True)


@axis_rule(aten._softmax_backward_data.default, aten._log_softmax_backward_data.default)
def softmax_backward(gradient: Operand, out: Operand, dim: int, *_: Any) -> Pattern:
    """Entries along the axis are shares of what is left."""
    own = letters(gradient, dim, "along~") if gradient.ndim else ""
    return Pattern(f"{own}, {own} -> {own}", (gradient, out), apart=True)


@axis_rule(aten.roll.default)
def roll(x: Operand, shifts: list[int], dims: tuple[int, ...] = ()) -> SameDims:
    """Entries along the axis move to other positions."""
    if not dims:
        return SameDims(x, pinned=tuple(range(x.ndim)), moves=True)
    moved = {dim % x.ndim for shift, dim in zip(shifts, dims, strict=True) if shift != 0}
    return SameDims(x, pinned=tuple(sorted(moved)), moves=True)


def resize_normalized(site: OpSite) -> None:
    """Write the sizes that are left of the dims that are normalised over."""
    sizes = site.args["normalized_shape"]
    axes = site.operands[0].exprs[-len(sizes) :]
    site.args["normalized_shape"] = [
        site.resized(n, e) if site.touched(e) else n for n, e in zip(sizes, axes, strict=True)
    ]


@axis_rule(aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default,
           aten._fused_rms_norm.default, resize=resize_normalized)  # fmt: skip
def layer_norm(x: Operand, normalized_shape: list[int], weight: Operand | None = None, bias: Any = None,
               *_: Any) -> Pattern:  # fmt: skip
    """The statistics are averages over the axis."""
    dims = " ".join(f"n{i}~" for i in range(len(normalized_shape)))
    affine = tuple(operand for operand in (weight, bias) if isinstance(operand, Operand))
    terms = [f"... {dims}"] + [dims for _ in affine]
    return Pattern(f"{', +'.join(terms)} -> ... {dims}", (x, *affine), apart=True)


def resize_groups(site: OpSite) -> None:
    """Count the groups that are left: whole ones go, or as many channels of one as of another."""
    channels, groups = site.operands[0].exprs[1], site.args["num_groups"]
    site.args["num_groups"] = _groups_left(site, channels, groups)


def _groups_left(site: OpSite, channels: Expr, groups: int) -> int:
    each = size_of(channels) // groups
    ends = [*(site.kept_before(channels, each * group) for group in range(groups)), site.count(channels)]
    return sum(before < after for before, after in pairwise(ends))


@axis_rule(aten.group_norm.default, resize=resize_groups)
def group_norm(x: Operand, groups: int, *affine: Any) -> Pattern:
    """The statistics are averages over a group of channels and over positions."""
    space = spaced("x", x.ndim - 2, "~")
    vectors = tensors(*affine)
    terms = [f"b (g c~) {space}"] + ["(g c~)" for _ in vectors]
    return Pattern(f"{', +'.join(terms)} -> b (g c~) {space}", (x, *vectors), sizes={"g": groups}, apart=True)


def resize_native_groups(site: OpSite) -> None:
    """Write the numbers of samples, channels, positions and groups that are left."""
    samples, channels, *space = site.operands[0].exprs
    site.args["N"] = site.resized(site.args["N"], samples)
    site.args["C"] = site.resized(site.args["C"], channels)
    site.args["HxW"] = site.resized(site.args["HxW"], product(*space))
    site.args["group"] = _groups_left(site, channels, site.args["group"])


@axis_rule(aten.native_group_norm.default, resize=resize_native_groups)
def native_group_norm(x: Operand, weight: Operand | None, bias: Operand | None, *sizes: Any) -> Pattern:
    """The statistics are averages over a group of channels and over positions."""
    here = f"b (g c~) {spaced('x', x.ndim - 2, '~')}"
    vectors = tensors(weight, bias)
    spec = f"{', +'.join((here, *('(g c~)' for _ in vectors)))} -> {here}, b g, b g"
    return Pattern(spec, (x, *vectors), sizes={"g": sizes[3]}, apart=True)


@axis_rule(aten.native_batch_norm, aten._native_batch_norm_legit.default, aten._native_batch_norm_legit.no_stats)
def native_batch_norm(x: Operand, *stats: Any) -> Pattern:
    """The statistics are averages over batch and positions; each channel has its own."""
    training = next(arg for arg in stats if isinstance(arg, bool))
    found = _by_channel("b~" if training else "b", x, *stats)
    return replace(found, spec=f"{found.spec}, {'c, c' if training else 'mean!, spread!'}")


@axis_rule(aten._batch_norm_with_update.default)
def batch_norm_with_update(x: Operand, *stats: Any) -> Pattern:
    """The statistics are averages over batch and positions; each channel has its own."""
    found = _by_channel("b~", x, *stats)
    return replace(found, spec=f"{found.spec}, c, c, reserve!")


@axis_rule(aten.batch_norm.default)
def batch_norm(x: Operand, weight: Operand | None, bias: Operand | None, mean: Operand | None, var: Operand | None,
               training: bool, *_: Any) -> Pattern:  # fmt: skip
    """The statistics are averages over batch and positions; each channel has its own."""
    return _by_channel("b~" if training else "b", x, weight, bias, mean, var)


@axis_rule(aten.instance_norm.default)
def instance_norm(x: Operand, *stats: Any) -> Pattern:
    """The statistics are averages over positions; each channel has its own."""
    return _by_channel("b", x, *stats)


def _by_channel(batch: str, x: Operand, *stats: Any) -> Pattern:
    space = spaced("x", x.ndim - 2, "~")
    vectors = tensors(*stats)
    terms = [f"{batch} c {space}"] + ["c" for _ in vectors]
    return Pattern(f"{', +'.join(terms)} -> b c {space}", (x, *vectors), apart=True)


@axis_rule(aten._weight_norm.default)
def weight_norm(direction: Operand, magnitude: Operand, dim: int = 0) -> Pattern:
    """The norm of a weight is taken over all dims but one, or over all (-1)."""
    letters = [f"d{i}" if i == dim else f"d{i}~" for i in range(direction.ndim)]
    alone = [f"d{i}" if i == dim else f"one{i}" for i in range(magnitude.ndim)]
    spec = f"{' '.join(letters)}, +{' '.join(alone)} -> {' '.join(letters)}"
    return Pattern(spec, (direction, magnitude), apart=True, rescaled=direction)


@axis_rule(aten.prelu.default)
def prelu(x: Operand, slope: Operand) -> Pattern:
    """Each channel has a slope of its own."""
    space = " ".join(f"x{i}" for i in range(x.ndim - 2))
    carried = f"b c {space}" if x.ndim > 1 else "c"
    return Pattern(f"{carried}, +{'c' if slope.ndim else ''} -> {carried}", (x, slope), apart=True)
