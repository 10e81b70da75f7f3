"""Normalisations: statistics over an axis tie all its entries together."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Carried, Operand, axis_rule

aten = torch.ops.aten


@axis_rule(aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.cumsum, aten.cumsum_, aten.cumprod,
           aten.logcumsumexp)  # fmt: skip
def softmax(x: Operand, dim: int, *_: Any, **__: Any) -> Carried:
    """Every entry along the axis feeds others along it."""
    return Carried(x, pinned=(dim % x.ndim,))


@axis_rule(aten.flip.default)
def flip(x: Operand, dims: list[int]) -> Carried:
    """Entries along the axis change places."""
    return Carried(x, pinned=tuple(dim % x.ndim for dim in dims))


@axis_rule(aten.roll.default)
def roll(x: Operand, shifts: list[int], dims: tuple[int, ...] = ()) -> Carried:
    """Entries along the axis change places."""
    return Carried(x, pinned=tuple(dim % x.ndim for dim in dims or range(x.ndim)))


@axis_rule(aten.layer_norm.default, aten.rms_norm.default, aten._fused_rms_norm.default)
def layer_norm(x: Operand, normalized_shape: list[int], weight: Operand | None = None, bias: Operand | None = None,
               *_: Any) -> str:  # fmt: skip
    """The statistics are averages over the axis."""
    dims = " ".join(f"n{i}!" for i in range(len(normalized_shape)))
    terms = [f"... {dims}"] + [dims for operand in (weight, bias) if operand is not None]
    return f"{', +'.join(terms)} -> ... {dims}"


@axis_rule(aten.group_norm.default)
def group_norm(x: Operand, groups: int, *affine: Any) -> str:
    """The statistics are averages over a group of channels and over positions."""
    space = " ".join(f"x{i}!" for i in range(x.ndim - 2))
    terms = [f"b c! {space}"] + ["c!" for operand in affine if isinstance(operand, Operand)]
    return f"{', +'.join(terms)} -> b c! {space}"


@axis_rule(aten.batch_norm.default)
def batch_norm(x: Operand, weight: Operand | None, bias: Operand | None, mean: Operand | None, var: Operand | None,
               training: bool, *_: Any) -> str:  # fmt: skip
    """The statistics are averages over batch and positions; each channel has its own."""
    return _by_channel("b!" if training else "b", x, weight, bias, mean, var)


@axis_rule(aten.instance_norm.default)
def instance_norm(x: Operand, *stats: Any) -> str:
    """The statistics are averages over positions; each channel has its own."""
    return _by_channel("b", x, *stats)


def _by_channel(batch: str, x: Operand, *stats: Any) -> str:
    space = " ".join(f"x{i}!" for i in range(x.ndim - 2))
    terms = [f"{batch} c {space}"] + ["c" for operand in stats if isinstance(operand, Operand)]
    return f"{', +'.join(terms)} -> b c {space}"
