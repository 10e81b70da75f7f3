"""Absorption: kept entries of an axis take over those that go, so that a weight that sums over it loses little.

    y = W x            W [rows, entries], x the input of the weight
    x[gone] ~ C x[kept] + c                   ridge regression, from the second moments of x alone
    W[:, kept] += W[:, gone] C;  b += W[:, gone] c

Where x was seen, the squared error is never larger than without it, for every row of W: C = 0, c = 0 is plain removal,
and the ridge pulls to it. Elsewhere it may be; `judged.py` chooses the ridge by positions that were held out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cholesky import factor


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of the input of a weight, as sums over positions.

    Attributes:
        squares: `[columns, columns]`, sum of the outer products.
        sums: `[columns]`, sum of the inputs.
        count: number of positions.
    """

    squares: Tensor
    sums: Tensor
    count: int

    def at(self, columns: Tensor) -> Moments:
        """Return the moments of some columns only."""
        columns = columns.to(self.squares.device)
        return Moments(self.squares[columns][:, columns], self.sums[columns], self.count)


@dataclass(frozen=True, eq=False)
class Absorption:
    """The way in which the columns that stay take over those that go.

    Attributes:
        kept: LongTensor of the columns that stay.
        gone: LongTensor of the others.
        share: `[gone, kept]`, float64, the coefficients of each column that goes in those that stay.
        constant: `[gone]`, the part of each column that goes which does not depend on the others; zeros where no bias
            may take it up.
        left: fraction of the squares of the columns that go which nothing takes over, 0 to 1; of their variances,
            where there is a constant.
    """

    kept: Tensor
    gone: Tensor
    share: Tensor
    constant: Tensor
    left: float

    def columns(self, matrix: Tensor) -> Tensor:
        """Let the columns of `matrix` `[rows, columns]` that stay take over the others, which are left as they are."""
        kept, gone = self.kept.to(matrix.device), self.gone.to(matrix.device)
        added = matrix[:, gone].to(self.share) @ self.share
        result = matrix.clone()
        result[:, kept] = (matrix[:, kept].to(added) + added).to(matrix)
        return result

    def bias(self, bias: Tensor, matrix: Tensor) -> Tensor:
        """Add to the bias of the rows of `matrix` the constant that it takes up."""
        added = matrix[:, self.gone.to(matrix.device)].to(self.constant) @ self.constant
        return (bias.to(added) + added).to(bias)


@dataclass(frozen=True, eq=False)
class Regression:
    """The regression of the columns that go on those that stay, at any ridge.

    Attributes:
        kept: LongTensor of the columns that stay.
        gone: LongTensor of the others.
        among: `[kept, kept]`, float64, mean products; of what varies, where a bias may take up a constant.
        across: `[kept, gone]`, likewise.
        total: sum of the mean squares of the columns that go, likewise.
        means: `[columns]`, means; None where no bias may take up a constant.
    """

    kept: Tensor
    gone: Tensor
    among: Tensor
    across: Tensor
    total: float
    means: Tensor | None

    @classmethod
    def of(cls, moments: Moments, kept: Tensor, *, constant: bool) -> Regression | None:
        """Prepare it; None where the moments hold an inf or a NaN. Arguments are those of `absorb`."""
        if moments.squares.device.type == "mps":  # it has no float64
            moments = Moments(moments.squares.cpu(), moments.sums.cpu(), moments.count)
        squares, sums = moments.squares, moments.sums.double() / moments.count
        if not bool(squares.isfinite().all()) or not bool(sums.isfinite().all()):
            return None
        kept = kept.to(squares.device)
        goes = torch.ones(len(squares), dtype=torch.bool, device=squares.device)
        goes[kept] = False
        gone = goes.nonzero().flatten()

        def products(rows: Tensor, columns: Tensor) -> Tensor:  # no whole matrix is made in float64
            part = squares[rows[:, None], columns].double().div_(moments.count)
            return part.sub_(torch.outer(sums[rows], sums[columns])) if constant else part

        alone = squares.diagonal()[gone].double() / moments.count
        total = float((alone - sums[gone].square() if constant else alone).sum())
        return cls(kept, gone, products(kept, kept), products(kept, gone), total, sums if constant else None)

    def solved(self, ridge: float, left: float | None = None) -> Absorption:
        """Solve it.

        Args:
            ridge: see `absorb`.
            left: the fraction that nothing takes over, if that is known or not asked for; None: computed.
        """
        share = _solve(self.among, self.across, ridge).T
        if left is None:
            error = self.total - 2 * float((share.T * self.across).sum()) + float(((share @ self.among) * share).sum())
            left = min(1.0, max(0.0, error / self.total)) if self.total > 0 else 0.0
        rest = share.new_zeros(len(self.gone))
        if self.means is not None:
            rest = self.means[self.gone] - share @ self.means[self.kept]
        return Absorption(self.kept, self.gone, share, rest, left)


def absorb(moments: Moments, kept: Tensor, *, constant: bool, ridge: float) -> Absorption | None:
    """Regress the columns that go on those that stay.

    Args:
        moments: moments of the weight's input, at the sizes before the shrink.
        kept: sorted LongTensor of the columns that stay.
        constant: True if there is a bias that may take up a constant.
        ridge: added to the diagonal of the second moments, as a share of each column's own. With fewer positions than
            columns, it decides how far these positions are trusted.

    Returns:
        The absorption; None where the moments hold an inf or a NaN.
    """
    regression = Regression.of(moments, kept, constant=constant)
    return None if regression is None else regression.solved(ridge)


def _solve(among: Tensor, across: Tensor, ridge: float) -> Tensor:
    """Return `(among + ridge * its diagonal) ** -1 @ across`."""
    if not float(among.diagonal().mean()) > 0:
        return torch.zeros_like(across)
    return torch.cholesky_solve(across, factor(among, 0.0, own=ridge))
