"""Cholesky factors of Gram matrices, which rounding may have made indefinite: with as small a ridge as will do."""

from __future__ import annotations

import torch
from torch import Tensor


def factor(grams: Tensor, ridge: float, least: float = 1e-14) -> Tensor:
    """The lower factor of `grams + ridge * mean diagonal`, `[..., n, n]`; where that fails, with ten times the ridge.

    Args:
        grams: finite.
        ridge: share of the mean diagonal, 0 or more.
        least: the ridge after none.
    """
    scale = grams.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)  # of what carries nothing at all
    while True:
        raised = grams.clone()
        raised.diagonal(dim1=-2, dim2=-1).add_(ridge * scale)
        found, failed = torch.linalg.cholesky_ex(raised)
        if not bool(failed.any()):
            made: Tensor = found
            return made
        ridge = max(10 * ridge, least)
