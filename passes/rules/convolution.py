"""Convolutions and their pooling and resizing companions: channels are contracted, positions stay whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .registry import Operand, axis_rule

if TYPE_CHECKING:
    from ..rewrite import Site

aten = torch.ops.aten


def _letters(prefix: str, count: int, pinned: bool = True) -> str:
    return " ".join(f"{prefix}{i}{'!' if pinned else ''}" for i in range(count))


def _depthwise(x: Operand, weight: Operand, groups: int) -> bool:
    """Each channel has a kernel of its own, so channels are carried through rather than contracted."""
    return groups > 1 and bool(weight.shape[0] == groups == x.shape[1])


def groups_follow(site: Site) -> None:
    """A depthwise convolution has as many groups as channels."""
    x, weight = site.operands[:2]
    if _depthwise(x, weight, site.args["groups"]):
        site.args["groups"] = site.count(weight.exprs[0])


@axis_rule(aten.conv1d, aten.conv2d, aten.conv3d, follow=groups_follow)
def conv(x: Operand, weight: Operand, bias: Operand | None = None, stride: Any = 1, padding: Any = 0,
         dilation: Any = 1, groups: int = 1) -> str:  # fmt: skip
    """Neighbouring positions, and whole groups of channels, are summed over."""
    space = x.ndim - 2
    here, kernel, there = _letters("x", space), _letters("k", space), _letters("y", space)
    if groups == 1:
        return f"b c {here}, n c {kernel}, +n -> b n {there}"
    if _depthwise(x, weight, groups):
        return f"b c {here}, c one! {kernel}, +c -> b c {there}"
    return f"b (g! c) {here}, (g! n) c {kernel}, +(g! n) -> b (g! n) {there}"


def _resampled(space: int) -> Callable[..., str]:
    def resampled(x: Operand, *_: Any, **__: Any) -> str:
        """Neighbouring positions are combined."""
        # The batch dim may be missing, so positions are counted from the right.
        before = " ".join("bc"[: x.ndim - space])
        return f"{before} {_letters('x', space)} -> {before} {_letters('y', space)}"

    return resampled


axis_rule(aten.max_pool1d, aten.avg_pool1d, aten.adaptive_avg_pool1d, aten.upsample_linear1d)(_resampled(1))
axis_rule(
    aten.max_pool2d, aten.avg_pool2d, aten.adaptive_avg_pool2d, aten.adaptive_max_pool2d, aten.upsample_nearest2d,
    aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten._upsample_bicubic2d_aa, aten._upsample_bilinear2d_aa,
)(_resampled(2))  # fmt: skip
axis_rule(aten.max_pool3d, aten.avg_pool3d, aten.adaptive_avg_pool3d)(_resampled(3))


@axis_rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(x: Operand, padding: list[Any], *_: Any, **__: Any) -> str:
    """Entries are added at the ends of the axis."""
    dims = [f"d{i}" for i in range(x.ndim)]
    grown = {x.ndim - 1 - i // 2 for i, amount in enumerate(padding) if amount != 0}
    before = " ".join(f"{d}!" if i in grown else d for i, d in enumerate(dims))
    after = " ".join(f"{d}new!" if i in grown else d for i, d in enumerate(dims))
    return f"{before} -> {after}"
