"""Sums of squares per row or column: what scores and slice norms are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def slice_sums_ref(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Sum of squares of each slice of `x` along each of `dims`.

    Args:
        x: any shape, any floating dtype.
        dims: the dims to keep, one at a time.

    Returns:
        Per dim a tensor `[x.shape[dim]]` in float32 (float64 where `x` is).
    """
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    squares = wide * wide
    return tuple(squares.sum([d for d in range(x.ndim) if d != dim]) if x.ndim > 1 else squares for dim in dims)
