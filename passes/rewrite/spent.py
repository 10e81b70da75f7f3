"""Spent weights: weights that are still there, and whose ops a program has left out because their result is a constant.

Their gradient is zero, as in a smaller model of the same class, which runs these ops: an optimizer decays them alike,
and `DistributedDataParallel` waits for no gradient that never comes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Spent(torch.autograd.Function):
    """The first argument; the others get gradients of zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, *weights: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.weights = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.weights, ctx.needs_input_grad[1:], strict=True)
        return gradient, *(torch.zeros_like(weight) if needed else None for weight, needed in wanted)


def spent(value: Tensor, *weights: Tensor) -> Tensor:
    """Return `value`, on which weights depend only in name: in backward they get gradients of zeros."""
    if not weights or not torch.is_grad_enabled():
        return value
    result: Tensor = _Spent.apply(value, *weights)  # type: ignore[no-untyped-call]
    return result
