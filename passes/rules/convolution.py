"""Convolutions, pooling, resizing and padding: channels are contracted or carried, positions stay whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ecospa_fx.passes.axes.algebra import Size
from ecospa_fx.passes.ir.relations import Operand, Pattern

from .operands import spaced
from .registry import axis_rule

if TYPE_CHECKING:
    from ecospa_fx.passes.ir.op_site import OpSite

aten = torch.ops.aten


def _per_dim(value: Any, space: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * space if len(values) == 1 else values


def _window(kernel: Sequence[Size], dilation: Any, padding: Any, stride: Any) -> tuple[tuple[int, ...], ...]:
    """Return kernel, dilation, padding and stride per dim of space; nothing where two ends are padded differently."""
    space = len(kernel)
    if padding == "valid":
        padding = 0
    if padding == "same":
        around = [d * (k - 1) for d, k in zip(_per_dim(dilation, space), kernel, strict=True)]
        if any(type(total) is not int or total % 2 for total in around):
            return ()
        padding = [total // 2 for total in around]
    return tuple(kernel), _per_dim(dilation, space), _per_dim(padding, space), _per_dim(stride, space)


def _one_by_one(kernel: Sequence[Size], padding: Any, stride: Any) -> set[int]:
    """Return the dims of space of which each position has a window of its own, so that they are carried through."""
    space = len(kernel)
    pads = (0,) * space if isinstance(padding, str) else _per_dim(padding, space)
    windows = zip(kernel, pads, _per_dim(stride, space), strict=True)
    return {i for i, window in enumerate(windows) if window == (1, 0, 1)}


def resize_groups(site: OpSite) -> None:
    """Count the groups that are left: only whole groups go, so divide all channels by those of one group."""
    x, weight = site.operands[:2]
    if site.args["groups"] != 1:
        site.args["groups"] = site.resized(site.args["groups"], x.exprs[1 - weight.ndim], weight.exprs[1])


@axis_rule(aten.conv1d, aten.conv2d, aten.conv3d, resize=resize_groups)
def conv(x: Operand, weight: Operand, bias: Operand | None = None, stride: Any = 1, padding: Any = 0,
         dilation: Any = 1, groups: int = 1) -> Pattern:  # fmt: skip
    """Neighbouring positions are summed over, together with the channels of a group."""
    window = _window(weight.shape[2:], dilation, padding, stride)
    own = _one_by_one(weight.shape[2:], padding, stride)
    if groups == 1:
        return _convolution("c", "n c", "n", x, weight, bias, window, own)
    if weight.shape[0] == groups == x.shape[1 - weight.ndim]:
        # Each channel has a kernel of its own, so channels are carried through rather than contracted.
        return _convolution("c", "c one!", "c", x, weight, bias, window, own, apart=True)
    return _convolution("(g c)", "(g n) c", "(g n)", x, weight, bias, window, own, sizes={"g": groups}, apart=True)


def resize_transposed_groups(site: OpSite) -> None:
    """Count the groups that are left, by the channels of the output: here the weight lists those of one group."""
    weight = site.operands[1]
    if site.args["groups"] != 1:
        site.args["groups"] = site.resized(site.args["groups"], site.outputs[0][1 - weight.ndim], weight.exprs[1])


@axis_rule(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d, resize=resize_transposed_groups)
def conv_transpose(x: Operand, weight: Operand, bias: Operand | None = None, stride: Any = 1, padding: Any = 0,
                   output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Pattern:  # fmt: skip
    """Each position is spread over its neighbours, after the channels of a group are summed over."""
    window = _window((1,) * (weight.ndim - 2), 1, 0, 1)  # the channels at each position are summed before they spread
    if groups == 1:
        return _convolution("c", "c n", "n", x, weight, bias, window)
    if weight.shape[0] == groups and weight.shape[1] == 1:
        return _convolution("c", "c one!", "c", x, weight, bias, window, apart=True)
    return _convolution("(g c)", "(g c) n", "(g n)", x, weight, bias, window, sizes={"g": groups}, apart=True)


@axis_rule(aten.conv_tbc.default)
def conv_tbc(x: Operand, weight: Operand, bias: Operand, *_: Any) -> Pattern:
    """Neighbouring positions are summed over, together with the channels."""
    return Pattern("t! b c, k! c n, +n -> y! b n", (x, weight, bias), window=())


def _convolution(channels: str, matrix: str, results: str, x: Operand, weight: Operand, bias: Operand | None,
                 window: tuple[tuple[int, ...], ...], own: Collection[int] = (), **how: Any) -> Pattern:  # fmt: skip
    """Write the pattern of a convolution, given the letters of its channels in the input, the weight and the output."""
    space = weight.ndim - 2
    batch = "b " if x.ndim == weight.ndim else ""
    here = " ".join(f"x{i}" if i in own else f"x{i}!" for i in range(space))
    there = " ".join(f"x{i}" if i in own else f"y{i}!" for i in range(space))
    spec = f"{batch}{channels} {here}, {matrix} {spaced('k', space, '!')}, +{results} -> {batch}{results} {there}"
    operands = tuple(operand for operand in (x, weight, bias) if operand is not None)
    return Pattern(spec, operands, window=window, **how)


def _resampled(space: int) -> Callable[..., Pattern]:
    def resampled(x: Operand, *_: Any, **__: Any) -> Pattern:
        """Each result along the axis is computed from neighbouring positions."""
        # The batch dim may be missing, so positions are counted from the right.
        before = " ".join("bc"[: x.ndim - space])
        return Pattern(f"{before} {spaced('x', space, '!')} -> {before} {spaced('y', space, '!')}", (x,), apart=True)

    return resampled


def _averaged(space: int) -> Callable[..., Pattern]:
    def averaged(x: Operand, size: Any, *_: Any) -> Pattern:
        """Each result along the axis is the average of neighbouring positions."""
        before = " ".join("bc"[: x.ndim - space])
        sizes = [size] * space if isinstance(size, int) else list(size)
        whole = [n == 1 for n in sizes]  # all positions make one average
        here = " ".join(f"x{i}~" if all_of else f"x{i}!" for i, all_of in enumerate(whole))
        there = " ".join(f"one{i}" if all_of else f"y{i}!" for i, all_of in enumerate(whole))
        return Pattern(f"{before} {here} -> {before} {there}", (x,), apart=True)

    return averaged


axis_rule(aten.adaptive_avg_pool1d)(_averaged(1))
axis_rule(aten.adaptive_avg_pool2d)(_averaged(2))
axis_rule(aten.adaptive_avg_pool3d)(_averaged(3))
axis_rule(
    aten.max_pool1d, aten.max_pool1d_with_indices, aten.avg_pool1d, aten.adaptive_max_pool1d,
    aten.upsample_linear1d, aten.upsample_nearest1d, aten._upsample_nearest_exact1d,
)(_resampled(1))  # fmt: skip
axis_rule(
    aten.max_pool2d, aten.max_pool2d_with_indices, aten.avg_pool2d, aten.adaptive_max_pool2d,
    aten.upsample_nearest2d, aten._upsample_nearest_exact2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d,
    aten._upsample_bicubic2d_aa, aten._upsample_bilinear2d_aa,
)(_resampled(2))  # fmt: skip
axis_rule(
    aten.max_pool3d, aten.max_pool3d_with_indices, aten.avg_pool3d, aten.adaptive_max_pool3d,
    aten.upsample_nearest3d, aten._upsample_nearest_exact3d, aten.upsample_trilinear3d,
)(_resampled(3))  # fmt: skip


def _placed(space: int) -> Callable[..., Pattern]:
    def placed(x: Operand, index: Operand, *_: Any) -> Pattern:
        """Each entry goes to the position that an index names."""
        before = " ".join("bc"[: x.ndim - space])
        here = f"{before} {spaced('x', space, '!')}"
        return Pattern(f"{here}, +{here} -> {before} {spaced('y', space, '!')}", (x, index), apart=True)

    return placed


axis_rule(aten.max_unpool2d.default)(_placed(2))
axis_rule(aten.max_unpool3d.default)(_placed(3))


def _sampled(space: int) -> Callable[..., Pattern]:
    def sampled(x: Operand, kernel: Any, size: Any, samples: Operand) -> Pattern:
        """Each result along the axis is the largest of some neighbouring positions."""
        before = " ".join("bc"[space + 2 - x.ndim :])
        batch = "b" if x.ndim == space + 2 else "one!"
        places = f"{before} {spaced('x', space, '!')}, +{batch} c dims!"
        return Pattern(f"{places} -> {before} {spaced('y', space, '!')}", (x, samples), apart=True)

    return sampled


axis_rule(aten.fractional_max_pool2d.default)(_sampled(2))
axis_rule(aten.fractional_max_pool3d.default)(_sampled(3))


@axis_rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(x: Operand, padding: list[Any], *how: Any, **more: Any) -> Pattern:
    """New entries are added at the ends of the axis."""
    dims = [f"d{i}" for i in range(x.ndim)]
    grown = {x.ndim - 1 - i // 2 for i, amount in enumerate(padding) if amount != 0}
    before = " ".join(f"{d}!" if i in grown else d for i, d in enumerate(dims))
    after = " ".join(f"{d}new!" if i in grown else d for i, d in enumerate(dims))
    zeros = not any(value not in (None, 0, "constant") for value in (*how, *more.values()))
    return Pattern(f"{before} -> {after}", (x,), apart=not zeros, moves=zeros)
