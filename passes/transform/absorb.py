"""Absorb: what kept entries of an axis can do for those that go, so that a weight that sums over it loses little.

    y = W x            W [rows, entries], x what the weight meets
    x[gone] ~ C x[kept] + c                   ridge regression, from the second moments of x alone
    W[:, kept] += W[:, gone] C;  b += W[:, gone] c

The sums of squares that are left are never more than without it, for every row of W: C = 0, c = 0 is plain removal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cholesky import factor


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over positions of what a weight meets.

    Attributes:
        squares: `[columns, columns]`, sum of the outer products.
        sums: `[columns]`.
        count: positions.
    """

    squares: Tensor
    sums: Tensor
    count: int

    def at(self, columns: Tensor) -> Moments:
        """Those of some columns only."""
        columns = columns.to(self.squares.device)
        return Moments(self.squares[columns][:, columns], self.sums[columns], self.count)


@dataclass(frozen=True, eq=False)
class Absorption:
    """How the columns that stay take over those that go.

    Attributes:
        kept: LongTensor of columns.
        gone: the others.
        share: `[gone, kept]`, float64.
        constant: `[gone]`, what is added whatever the kept ones are; zeros where nothing may be.
        left: share of the squares of what goes that nothing takes over, 0 to 1; of what varies, where there is a
            constant.
    """

    kept: Tensor
    gone: Tensor
    share: Tensor
    constant: Tensor
    left: float

    def columns(self, matrix: Tensor) -> Tensor:
        """`matrix` `[rows, columns]` with the columns that stay as they will be; those that go as they were."""
        kept, gone = self.kept.to(matrix.device), self.gone.to(matrix.device)
        added = matrix[:, gone].to(self.share) @ self.share
        made = matrix.clone()
        made[:, kept] = (matrix[:, kept].to(added) + added).to(matrix)
        return made

    def bias(self, bias: Tensor, matrix: Tensor) -> Tensor:
        """The bias of the rows of `matrix` as it will be."""
        added = matrix[:, self.gone.to(matrix.device)].to(self.constant) @ self.constant
        return (bias.to(added) + added).to(bias)


def absorb(moments: Moments, kept: Tensor, *, constant: bool, ridge: float) -> Absorption | None:
    """Regress the columns that go on those that stay.

    Args:
        moments: of what the weight meets, at the sizes before the shrink.
        kept: sorted LongTensor of the columns that stay.
        constant: whether there is a bias that may take up a constant.
        ridge: added to the diagonal of the second moments, as a share of its mean. With fewer positions than columns
            it decides how far what was seen is believed.

    Returns:
        None where the moments hold an inf or a NaN.
    """
    if moments.squares.device.type == "mps":  # it has no float64
        moments = Moments(moments.squares.cpu(), moments.sums.cpu(), moments.count)
    squares, sums = moments.squares.double() / moments.count, moments.sums.double() / moments.count
    if not bool(squares.isfinite().all()) or not bool(sums.isfinite().all()):
        return None
    if constant:
        squares = squares - torch.outer(sums, sums)
    kept = kept.to(squares.device)
    goes = torch.ones(len(squares), dtype=torch.bool, device=squares.device)
    goes[kept] = False
    gone = goes.nonzero().flatten()
    among, across = squares[kept][:, kept], squares[kept][:, gone]
    share = _solved(among, across, ridge).T
    whole = float(squares.diagonal()[gone].sum())
    left = whole - 2 * float((share.T * across).sum()) + float(((share @ among) * share).sum())
    rest = sums[gone] - share @ sums[kept] if constant else torch.zeros_like(sums[gone])
    return Absorption(kept, gone, share, rest, min(1.0, max(0.0, left / whole)) if whole > 0 else 0.0)


def _solved(among: Tensor, across: Tensor, ridge: float) -> Tensor:
    """`(among + ridge) ** -1 @ across`."""
    if not float(among.diagonal().mean()) > 0:
        return torch.zeros_like(across)
    return torch.cholesky_solve(across, factor(among, ridge))
