"""Eliminate: which entries of an axis the weights that sum over it can do without, in order, if what stays takes over.

    y = W x,  x[gone] ~ C x[kept]  ->  what is left of y is  W[:, gone] (x[gone] - C x[kept])
                                   ->  its sum of squares is tr(W[:, gone].T W[:, gone] S[gone | kept])

Alone, an entry costs `|w|**2 / inv(S)[j, j]` (the optimal brain surgeon, Hassibi & Stork 1993, of a layer's output;
Frantar & Alistarh 2022), and with each that goes all others come to cost more. So they go one by one. That is quick
among a few: a round takes the cheapest as candidates, keeps their part of the inverse and of `W.T W` up to date as
entries go, and then does the same for all columns at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .absorb import Moments
from .cholesky import factor

CANDIDATES = 2
"""Times as many as are to go in a round."""
LARGE = 1024
"""Columns from which on float32 is good enough for an order; the ridge keeps the condition number low."""
LAZY = 32
"""Entries that go before matrices are brought up to date."""


@dataclass(frozen=True, eq=False)
class Summing:
    """A weight that sums over an axis, and what it meets.

    Attributes:
        matrix: `[rows, columns]`.
        moments: of the columns.
        unit: LongTensor `[columns]`, which of the units (entries, in each context) a column belongs to; -1 for none.
        constant: whether a bias may take up what is constant.
    """

    matrix: Tensor
    moments: Moments
    unit: Tensor
    constant: bool


@dataclass(frozen=True, eq=False)
class Order:
    """In which order entries go, and what that costs.

    Attributes:
        order: LongTensor `[contexts, size]`, the entry that goes first, then the next, and so on.
        cost: float64 `[contexts, size]`, the squares of outputs that are lost with each, given those before it.
        alone: what every entry costs where nothing takes over, `[contexts, size]`, by entry.
    """

    order: Tensor
    cost: Tensor
    alone: Tensor


@torch.no_grad()
def eliminate(
    summing: list[Summing], contexts: int, size: int, *, ridge: float, at_least: int, share: float = 1 / 8
) -> Order | None:
    """Order the entries by what the outputs lose, as many in each context at a time.

    Args:
        summing: the weights; what they lose adds up.
        contexts: groups of entries that lose equally many.
        size: entries in each.
        ridge: see `passes.transform.absorb.absorb`.
        at_least: entries per context to which the order is found in rounds; the rest is ordered by one more round.
        share: of the entries left that go in a round.

    Returns:
        None where some moments hold an inf or a NaN.
    """
    states = [_State.of(each, contexts * size, ridge) for each in summing]
    if any(state is None for state in states):
        return None
    held = [state for state in states if state is not None]
    alone = torch.stack([state.alone for state in held]).sum(0).view(contexts, size)
    left = torch.ones(contexts, size, dtype=torch.bool)
    order = torch.empty(contexts, size, dtype=torch.long)
    cost = torch.empty(contexts, size, dtype=torch.float64)
    done = 0
    while done < size:
        count = size - done
        each = torch.stack([state.costs() for state in held]).sum(0).view(contexts, size)
        ranked = torch.where(left, each, torch.inf).argsort(dim=-1, stable=True)[:, :count]
        if count <= max(1, at_least):  # each next to all that are left: a lower bound
            order[:, done:], cost[:, done:] = ranked, each.gather(-1, ranked)
            break
        goes = max(1, min(round(share * count), count - max(1, at_least)))
        candidates = torch.zeros_like(left).scatter_(1, ranked[:, : CANDIDATES * goes], True)
        near = [state.focus(candidates) for state in held]
        for place in range(done, done + goes):
            for context in range(contexts):
                now = torch.stack([part.costs() for part in near]).sum(0).view(contexts, size)[context]
                entry = int(torch.where(candidates[context], now, torch.inf).argmin())
                order[context, place], cost[context, place] = entry, now[entry]
                candidates[context, entry] = left[context, entry] = False
                for part in near:
                    part.remove(context * size + entry)
        for state in held:
            state.drop(left)
        done += goes
    # What goes later is not cheaper: a curve that bends down would promise what cannot be had.
    return Order(order, cost.cummax(-1).values, alone)


class _State:
    """One weight as entries go: its columns that are left, and the inverse of their second moments."""

    def __init__(self, matrix: Tensor, inverse: Tensor, unit: Tensor, units: int, alone: Tensor) -> None:
        self.matrix, self.inverse, self.unit, self.units, self.alone = matrix, inverse, unit, units, alone

    @classmethod
    def of(cls, given: Summing, units: int, ridge: float) -> _State | None:
        moments = given.moments
        squares, sums = moments.squares.double() / moments.count, moments.sums.double() / moments.count
        matrix, unit = given.matrix.double().to(squares.device), given.unit.to(squares.device)
        if not bool(squares.isfinite().all() & sums.isfinite().all() & matrix.isfinite().all()):
            return None
        alone = _over_units(matrix, squares, unit, units, lambda block: block)
        if given.constant:
            squares = squares - torch.outer(sums, sums)
        squares = squares.clone()
        squares.diagonal().add_(max(ridge, 1e-10) * max(float(squares.diagonal().mean()), 1e-300))
        return cls(matrix, _inverse(squares), unit, units, alone.cpu())

    def costs(self) -> Tensor:
        """What each unit that is left costs alone, `[units]`."""
        return _over_units(self.matrix, self.inverse, self.unit, self.units, torch.linalg.inv).cpu()

    def focus(self, candidates: Tensor) -> _Narrow | _Wide:
        """The columns of some units alone."""
        mine = self._columns_of(candidates).nonzero().flatten()
        weights, unit = self.matrix[:, mine], self.unit[mine]
        kind = _Narrow if len(unit.unique()) == len(unit) else _Wide
        return kind(weights.T @ weights, self.inverse[mine][:, mine], unit, self.units)

    def drop(self, left: Tensor) -> None:
        """Let the columns of all units that have gone be taken over."""
        stays = (self.unit < 0) | self._columns_of(left)
        gone, kept = (~stays).nonzero().flatten(), stays.nonzero().flatten()
        across = self.inverse[gone][:, kept]
        share = torch.linalg.solve(self.inverse[gone][:, gone], across)
        self.matrix = self.matrix[:, kept] - self.matrix[:, gone] @ share
        self.inverse = self.inverse[kept][:, kept] - across.T @ share
        self.unit = self.unit[kept]

    def _columns_of(self, units: Tensor) -> Tensor:
        return (self.unit >= 0) & units.flatten().to(self.unit.device)[self.unit.clamp(min=0)]


class _Wide:
    """Candidates of several columns each: few, as heads are."""

    def __init__(self, weights: Tensor, inverse: Tensor, unit: Tensor, units: int) -> None:
        self.weights, self.inverse, self.unit, self.units = weights, inverse, unit, units

    def costs(self) -> Tensor:
        """What each candidate costs now, `[units]`."""
        found = torch.zeros(self.units, dtype=torch.float64, device=self.weights.device)
        for mine, columns in _columns(self.unit):
            rows, across = columns[:, :, None], columns[:, None, :]
            found[mine] = (self.weights[rows, across] * torch.linalg.inv(self.inverse[rows, across])).sum((1, 2))
        return found.cpu()

    def remove(self, unit: int) -> None:
        """Let the others take over what one did."""
        gone = (self.unit == unit).nonzero().flatten()
        share = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])
        added = share.T @ (self.weights[gone] - 0.5 * self.weights[gone][:, gone] @ share)
        self.weights.sub_(added).sub_(added.T)
        self.inverse.sub_(self.inverse[:, gone] @ share)
        self.unit[gone] = -1


class _Narrow:
    """Candidates of one column each: many. The same as `_Wide`, but matrices are brought up to date now and then only.

    In between they lack a few products of vectors, `weights -= r q.T + q r.T` and `inverse -= d r r.T`.
    """

    def __init__(self, weights: Tensor, inverse: Tensor, unit: Tensor, units: int) -> None:
        self.weights, self.inverse, self.unit, self.units = weights, inverse, unit, units
        self.diagonals = weights.diagonal().clone(), inverse.diagonal().clone()
        self.place = torch.full((units,), -1).index_put_((unit.cpu(),), torch.arange(len(unit)))
        self.r = self.q = weights.new_empty(0, len(unit))
        self.d = weights.new_empty(0)

    def costs(self) -> Tensor:
        """What each candidate costs now, `[units]`."""
        above, below = self.diagonals
        found = above.new_zeros(self.units)
        found[self.unit] = above.clamp(min=0) / below.clamp(min=1e-300)
        return found.cpu()

    def remove(self, unit: int) -> None:
        """Let the others take over what one did."""
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


def _over_units(matrix: Tensor, squares: Tensor, unit: Tensor, units: int, of: Callable[[Tensor], Tensor]) -> Tensor:
    """`tr(W.T W of(squares))` over the columns of each unit, `[units]`, of a matrix W `[rows, columns]`."""
    found = torch.zeros(units, dtype=torch.float64, device=matrix.device)
    for mine, columns in _columns(unit):
        weights = matrix.T[columns]  # [units, columns, rows]
        blocks = of(squares[columns[:, :, None], columns[:, None, :]])
        found[mine] = ((weights @ weights.mT) * blocks).sum((1, 2))
    return found


def _columns(unit: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Units that own equally many columns, and these: LongTensors `[n]` and `[n, columns]`."""
    order = unit.argsort(stable=True)[int((unit < 0).sum()) :]
    counts = torch.bincount(unit[order])
    begins = counts.cumsum(0) - counts
    for width in counts.unique().tolist():
        if width:
            mine = (counts == width).nonzero().flatten()
            yield mine, order[begins[mine][:, None] + torch.arange(width, device=unit.device)]


def _inverse(squares: Tensor) -> Tensor:
    """The inverse, float64, by Cholesky: large ones in float32, in half the time; where that fails, with a ridge."""
    if len(squares) > LARGE:
        lower, failed = torch.linalg.cholesky_ex(squares.float())
        if not int(failed):
            return torch.cholesky_inverse(lower).double()
    return torch.cholesky_inverse(factor(squares, 0.0, 1e-10))
