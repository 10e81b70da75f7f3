"""Cholesky factors of Gram matrices, which rounding may have made indefinite: with the smallest ridge that works."""

from __future__ import annotations

import torch
from torch import Tensor


def factor(grams: Tensor, ridge: float, least: float = 1e-14, *, own: float = 0.0) -> Tensor:
    """Return the lower factor of `grams + ridge * mean diagonal + own * diagonal`; if that fails, try 10 times `ridge`.

    Args:
        grams: `[..., n, n]`, finite.
        ridge: share of the mean diagonal, 0 or more.
        least: the ridge to try after 0.
        own: share of each entry's own diagonal, 0 or more: it means the same for an entry of any scale, where the
            effect of a share of the mean depends on how large the largest entries are.
    """
    diagonal = grams.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.mean(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)  # a matrix may be all zeros
    while True:
        raised = grams.clone()
        raised.diagonal(dim1=-2, dim2=-1).add_(own * diagonal + ridge * scale)
        factors, failed = torch.linalg.cholesky_ex(raised)
        if not bool(failed.any()):
            lower: Tensor = factors
            return lower
        ridge = max(10 * ridge, least)
