"""Elimination: the order in which weights can do without entries of an axis, if the entries that stay take over.

    y = W x,  x[gone] ~ C x[kept]  ->  the error of y is  W[:, gone] (x[gone] - C x[kept])
                                   ->  its sum of squares is tr(W[:, gone].T W[:, gone] S[gone | kept])

Alone, an entry costs `|w|**2 / inv(S)[j, j]` (the optimal brain surgeon, Hassibi & Stork 1993, of a layer's output;
Frantar & Alistarh 2022), and with each that goes all others cost more. So they go one by one. That is quick among a
few: a round takes the cheapest as candidates, keeps their part of the inverse and of `W.T W` up to date as entries go,
and then updates all columns at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .absorb import Moments
from .cholesky import factor

CANDIDATES = 2
"""Number of candidates in a round, as a multiple of the entries that go."""
LARGE = 1024
"""Number of columns above which float32 is good enough for an order; the ridge keeps the condition number low."""
LAZY = 32
"""Number of entries that go before matrices are brought up to date."""


@dataclass(frozen=True, eq=False)
class Summing:
    """A weight that sums over an axis, and the moments of its input.

    Attributes:
        matrix: `[rows, columns]`, the weight.
        moments: moments of the input, by column.
        unit: LongTensor `[columns]`, the unit (an entry in a context) that each column belongs to; -1 for none.
        constant: True if a bias may take up a constant.
    """

    matrix: Tensor
    moments: Moments
    unit: Tensor
    constant: bool


@dataclass(frozen=True, eq=False)
class Order:
    """The order in which entries go, and its cost.

    Attributes:
        order: LongTensor `[contexts, size]`, the entry that goes first, then the next, and so on.
        cost: float64 `[contexts, size]`, the squares of outputs that are lost with each, given those before it.
        alone: `[contexts, size]`, the cost of every entry where nothing takes over, by entry.
    """

    order: Tensor
    cost: Tensor
    alone: Tensor


@torch.no_grad()
def eliminate(
    summing: list[Summing], contexts: int, size: int, *, ridge: float, at_least: int, share: float = 1 / 8
) -> Order | None:
    """Order the entries by the loss of the outputs, as many in each context at a time.

    Args:
        summing: the weights; their losses add up.
        contexts: number of groups of entries, which lose equally many.
        size: entries in each group.
        ridge: see `passes.transform.absorb.absorb`.
        at_least: entries per context that are left after the rounds; one more round orders these.
        share: fraction of the entries left that go in a round.

    Returns:
        The order; None where some moments hold an inf or a NaN, or squares of them overflow.
    """
    states = [_State.of(each, contexts * size, ridge) for each in summing]
    finite = [state for state in states if state is not None]
    if len(finite) < len(states):
        return None
    alone = torch.stack([state.alone for state in finite]).sum(0).view(contexts, size)
    left = torch.ones(contexts, size, dtype=torch.bool)
    order = torch.empty(contexts, size, dtype=torch.long)
    cost = torch.empty(contexts, size, dtype=torch.float64)
    done = 0
    while done < size:
        count = size - done
        costs = torch.stack([state.costs() for state in finite]).sum(0).view(contexts, size)
        if not bool(costs[left].isfinite().all()):
            return None
        ranked = torch.where(left, costs, torch.inf).argsort(dim=-1, stable=True)[:, :count]
        if count <= max(1, at_least):  # the cost of each with all others left: a lower bound
            order[:, done:], cost[:, done:] = ranked, costs.gather(-1, ranked)
            break
        goes = max(1, min(round(share * count), count - max(1, at_least)))
        candidates = torch.zeros_like(left).scatter_(1, ranked[:, : CANDIDATES * goes], True)
        parts = [state.focus(candidates) for state in finite]
        for position in range(done, done + goes):
            for context in range(contexts):
                among = torch.zeros_like(candidates)
                among[context] = candidates[context]
                now = torch.stack([part.costs(among.flatten()) for part in parts]).sum(0).view(contexts, size)[context]
                entry = int(torch.where(candidates[context], now, torch.inf).argmin())
                order[context, position], cost[context, position] = entry, now[entry]
                candidates[context, entry] = left[context, entry] = False
                for part in parts:
                    part.remove(context * size + entry)
        for state in finite:
            state.drop(left)
        done += goes
    # Later entries are not cheaper than earlier ones: a curve that bends down would promise savings nobody gets.
    return Order(order, cost.cummax(-1).values, alone)


class _State:
    """A weight while entries go: its columns that are left, and the inverse of their second moments."""

    def __init__(self, matrix: Tensor, inverse: Tensor, unit: Tensor, units: int, alone: Tensor) -> None:
        self.matrix, self.inverse, self.unit, self.units, self.alone = matrix, inverse, unit, units, alone

    @classmethod
    def of(cls, given: Summing, units: int, ridge: float) -> _State | None:
        moments = given.moments
        squares, sums = moments.squares.double() / moments.count, moments.sums.double() / moments.count
        matrix, unit = given.matrix.double().to(squares.device), given.unit.to(squares.device)
        if not bool(squares.isfinite().all() & sums.isfinite().all() & matrix.isfinite().all()):
            return None
        alone = _over_units(matrix, squares, unit, units)
        if given.constant:
            squares = squares - torch.outer(sums, sums)
        squares = squares.clone()
        mean = max(float(squares.diagonal().mean()), 1e-300)
        squares.diagonal().mul_(1 + ridge).add_(1e-10 * mean)
        return cls(matrix, _inverse(squares), unit, units, alone.cpu())

    def costs(self) -> Tensor:
        """Return the cost of each unit that is left, if it goes alone, `[units]`."""
        return _over_units(self.matrix, self.inverse, self.unit, self.units, inverted=True).cpu()

    def focus(self, candidates: Tensor) -> _Narrow | _Wide:
        """Narrow the state down to the columns of some units."""
        mine = self._columns_of(candidates).nonzero().flatten()
        weights, unit = self.matrix[:, mine], self.unit[mine]
        kind = _Narrow if len(unit.unique()) == len(unit) else _Wide
        return kind(weights.T @ weights, self.inverse[mine][:, mine], unit, self.units)

    def drop(self, left: Tensor) -> None:
        """Remove the columns of all units that have gone, and let the others take them over."""
        stays = (self.unit < 0) | self._columns_of(left)
        gone, kept = (~stays).nonzero().flatten(), stays.nonzero().flatten()
        across = self.inverse[gone][:, kept]
        share = _solve(self.inverse[gone][:, gone], across)
        self.matrix = self.matrix[:, kept] - self.matrix[:, gone] @ share
        self.inverse = self.inverse[kept][:, kept] - across.T @ share
        self.unit = self.unit[kept]

    def _columns_of(self, units: Tensor) -> Tensor:
        return (self.unit >= 0) & units.flatten().to(self.unit.device)[self.unit.clamp(min=0)]


class _Wide:
    """Candidates of several columns each, of which there are few, as of heads."""

    def __init__(self, weights: Tensor, inverse: Tensor, unit: Tensor, units: int) -> None:
        self.weights, self.inverse, self.unit, self.units = weights, inverse, unit, units
        self.columns = list(_columns(unit))

    def costs(self, among: Tensor) -> Tensor:
        """Return the current cost of some candidates, `[units]`: of those for which `among` holds, `[units]`."""
        costs = torch.zeros(self.units, dtype=torch.float64, device=self.weights.device)
        among = among.to(costs.device)
        for same, columns in self.columns:
            columns, same = columns[among[same]], same[among[same]]
            rows, across = columns[:, :, None], columns[:, None, :]
            costs[same] = (self.weights[rows, across] * _inverses(self.inverse[rows, across])).sum((1, 2))
        return costs.cpu()

    def remove(self, unit: int) -> None:
        """Remove a candidate, and let the others take it over."""
        gone = (self.unit == unit).nonzero().flatten()
        share = _solve(self.inverse[gone][:, gone], self.inverse[gone])
        added = share.T @ (self.weights[gone] - 0.5 * self.weights[gone][:, gone] @ share)
        self.weights.sub_(added).sub_(added.T)
        self.inverse.sub_(self.inverse[:, gone] @ share)


class _Narrow:
    """Candidates of one column each, of which there are many: as `_Wide`, but matrices are updated now and then only.

    In between they lack a few products of vectors, `weights -= r q.T + q r.T` and `inverse -= d r r.T`.
    """

    def __init__(self, weights: Tensor, inverse: Tensor, unit: Tensor, units: int) -> None:
        self.weights, self.inverse, self.unit, self.units = weights, inverse, unit, units
        self.diagonals = weights.diagonal().clone(), inverse.diagonal().clone()
        self.place = torch.full((units,), -1).index_put_((unit.cpu(),), torch.arange(len(unit)))
        self.r = self.q = weights.new_empty(0, len(unit))
        self.d = weights.new_empty(0)

    def costs(self, among: Tensor) -> Tensor:
        """Return the current cost of each candidate, `[units]`."""
        above, below = self.diagonals
        costs = above.new_zeros(self.units)
        costs[self.unit] = above.clamp(min=0) / below.clamp(min=1e-300)
        return costs.cpu()

    def remove(self, unit: int) -> None:
        """Remove a candidate, and let the others take it over."""
        j = int(self.place[unit])
        weights = self.weights[j] - self.r[:, j] @ self.q - self.q[:, j] @ self.r
        inverse = self.inverse[j] - (self.d * self.r[:, j]) @ self.r
        d = inverse[j]
        r = inverse / d
        q = weights - 0.5 * weights[j] * r
        above, below = self.diagonals
        above.sub_(2 * r * q)
        below.sub_(d * r * r)
        self.r, self.q, self.d = (
            torch.cat([self.r, r[None]]),
            torch.cat([self.q, q[None]]),
            torch.cat([self.d, d[None]]),
        )
        if len(self.d) == LAZY:
            both = self.r.T @ self.q
            self.weights.sub_(both).sub_(both.T)
            self.inverse.sub_((self.d[:, None] * self.r).T @ self.r)
            self.r, self.q, self.d = self.r[:0], self.q[:0], self.d[:0]


def _over_units(matrix: Tensor, squares: Tensor, unit: Tensor, units: int, inverted: bool = False) -> Tensor:
    """Return `tr(W.T W S)` over the columns of each unit, `[units]`, of a matrix W `[rows, columns]`.

    S is the unit's block of `squares`, or its inverse.
    """
    traces = torch.zeros(units, dtype=torch.float64, device=matrix.device)
    for same, columns in _columns(unit):
        if columns.shape[1] == 1:  # as of a feed-forward network: too many for matrices of their own
            lengths, blocks = matrix.square().sum(0)[columns[:, 0]], squares.diagonal()[columns[:, 0]]
            traces[same] = lengths / blocks.clamp(min=1e-300) if inverted else lengths * blocks
            continue
        weights = matrix.T[columns]  # [units, columns, rows]
        blocks = squares[columns[:, :, None], columns[:, None, :]]
        traces[same] = ((weights @ weights.mT) * (_inverses(blocks) if inverted else blocks)).sum((1, 2))
    return traces


def _inverses(blocks: Tensor) -> Tensor:
    """Invert many small positive matrices at once, each by Cholesky; those with an inf or a NaN become NaN."""
    finite = blocks.isfinite().all(-1).all(-1)
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    inverses = torch.cholesky_inverse(factor(torch.where(finite[:, None, None], blocks, identity), 0.0))
    return torch.where(finite[:, None, None], inverses, torch.nan)


def _solve(block: Tensor, across: Tensor) -> Tensor:
    """Return `block ** -1 @ across` of a positive matrix, which rounding may have made singular."""
    if not bool(block.isfinite().all()):
        return torch.full_like(across, torch.nan)
    return torch.cholesky_solve(across, factor(block, 0.0))


def _columns(unit: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the units that have equally many columns, and these columns: LongTensors `[n]` and `[n, columns]`."""
    order = unit.argsort(stable=True)[int((unit < 0).sum()) :]
    counts = torch.bincount(unit[order])
    begins = counts.cumsum(0) - counts
    for width in counts.unique().tolist():
        if width:
            same = (counts == width).nonzero().flatten()
            yield same, order[begins[same][:, None] + torch.arange(width, device=unit.device)]


def _inverse(squares: Tensor) -> Tensor:
    """Invert by Cholesky, to float64: a large matrix in float32, in half the time; where that fails, with a ridge."""
    if len(squares) > LARGE:
        lower, failed = torch.linalg.cholesky_ex(squares.float())
        if not int(failed):
            return torch.cholesky_inverse(lower).double()
    return torch.cholesky_inverse(factor(squares, 0.0, 1e-10))
