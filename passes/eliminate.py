"""Eliminate: which entries of an axis the weights that sum over it can do without, in order, if what stays takes over.

    y = W x,  x[gone] ~ C x[kept]  ->  what is left of y is  W[:, gone] (x[gone] - C x[kept])
                                   ->  its sum of squares is tr(W[:, gone].T W[:, gone] S[gone | kept])

Alone, an entry costs `|w|**2 / inv(S)[j, j]` (the optimal brain surgeon, Hassibi & Stork 1993, of a layer's output;
Frantar & Alistarh 2022), and with each that goes all others come to cost more. So they go one by one. That is quick
among a few: a round takes the cheapest as candidates, keeps their part of the inverse and of `W.T W` up to date as
entries go, and then does the same for all columns at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .absorb import Moments

CANDIDATES = 2
"""Times as many as are to go in a round."""


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
        ridge: see `passes.absorb.absorb`.
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
        each = torch.stack([state.costs(left) for state in held]).sum(0).view(contexts, size)
        ranked = torch.where(left, each, torch.inf).argsort(dim=-1, stable=True)[:, :count]
        if count <= max(1, at_least):  # each next to all that are left: a lower bound
            order[:, done:], cost[:, done:] = ranked, each.gather(-1, ranked)
            break
        goes = max(1, min(round(share * count), count - max(1, at_least)))
        candidates = torch.zeros_like(left).scatter_(1, ranked[:, : CANDIDATES * goes], True)
        for state in held:
            state.focus(candidates)
        for place in range(done, done + goes):
            for context in range(contexts):
                each = torch.stack([state.focused() for state in held]).sum(0).view(contexts, size)[context]
                entry = int(torch.where(candidates[context], each, torch.inf).argmin())
                order[context, place], cost[context, place] = entry, each[entry]
                candidates[context, entry] = left[context, entry] = False
                for state in held:
                    state.remove(context * size + entry)
        for state in held:
            state.drop(left)
        done += goes
    # What goes later is not cheaper: a curve that bends down would promise what cannot be had.
    return Order(order, cost.cummax(-1).values, alone)


class _State:
    """One weight as entries go: its columns that are left, and the inverse of their second moments."""

    def __init__(self, matrix: Tensor, squares: Tensor, unit: Tensor, units: int, alone: Tensor) -> None:
        self.matrix, self.squares, self.unit, self.units, self.alone = matrix, squares, unit, units, alone
        self.inverse = squares
        self.near = matrix, squares, unit

    @classmethod
    def of(cls, given: Summing, units: int, ridge: float) -> _State | None:
        moments = given.moments
        squares, sums = moments.squares.double() / moments.count, moments.sums.double() / moments.count
        matrix, unit = given.matrix.double().to(squares.device), given.unit.to(squares.device)
        if not bool(squares.isfinite().all() & sums.isfinite().all() & matrix.isfinite().all()):
            return None
        alone = _blocks(matrix.T @ matrix, squares, unit, units)
        if given.constant:
            squares = squares - torch.outer(sums, sums)
        squares = squares.clone()
        squares.diagonal().add_(max(ridge, 1e-10) * max(float(squares.diagonal().mean()), 1e-300))
        return cls(matrix, squares, unit, units, alone.cpu())

    def costs(self, left: Tensor) -> Tensor:
        """What each unit that is left costs alone, `[units]`."""
        self.inverse = _inverse(self.squares)
        return _costs(self.matrix.T @ self.matrix, self.inverse, self.unit, self.units).cpu()

    def focus(self, candidates: Tensor) -> None:
        """Look at the columns of some units alone."""
        mine = self._columns_of(candidates).nonzero().flatten()
        weights = self.matrix[:, mine]
        self.near = weights.T @ weights, self.inverse[mine][:, mine], self.unit[mine]

    def focused(self) -> Tensor:
        """What each candidate costs now, `[units]`."""
        return _costs(*self.near, self.units).cpu()

    def remove(self, unit: int) -> None:
        """Let the other candidates take over what one of them did."""
        weights, inverse, owner = self.near
        gone, kept = (owner == unit).nonzero().flatten(), (owner != unit).nonzero().flatten()
        share = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
        across = weights[gone][:, kept]
        added = share.T @ across
        weights = weights[kept][:, kept] - added - added.T + share.T @ weights[gone][:, gone] @ share
        self.near = weights, inverse[kept][:, kept] - inverse[kept][:, gone] @ share, owner[kept]

    def drop(self, left: Tensor) -> None:
        """Let the columns of all units that have gone be taken over."""
        stays = (self.unit < 0) | self._columns_of(left)
        gone, kept = (~stays).nonzero().flatten(), stays.nonzero().flatten()
        share = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone][:, kept])
        self.matrix = self.matrix[:, kept] - self.matrix[:, gone] @ share
        self.squares, self.unit = self.squares[kept][:, kept], self.unit[kept]

    def _columns_of(self, units: Tensor) -> Tensor:
        return (self.unit >= 0) & units.flatten().to(self.unit.device)[self.unit.clamp(min=0)]


def _costs(weights: Tensor, inverse: Tensor, unit: Tensor, units: int) -> Tensor:
    """`tr(W.T W inv(inverse))` over the columns of each unit, `[units]`."""
    found = torch.zeros(units, dtype=torch.float64, device=weights.device)
    for mine, columns in _columns(unit):
        if columns.shape[1] == 1:
            found[mine] = (weights.diagonal() / inverse.diagonal())[columns[:, 0]]
        else:
            rows, across = columns[:, :, None], columns[:, None, :]
            found[mine] = (weights[rows, across] * torch.linalg.inv(inverse[rows, across])).sum((1, 2))
    return found


def _blocks(a: Tensor, b: Tensor, unit: Tensor, units: int) -> Tensor:
    """Sum of `a * b` over the rows and columns of each unit, `[units]`."""
    found = torch.zeros(units, dtype=torch.float64, device=a.device)
    for columns, mine in _columns(unit):
        blocks = a[mine[:, :, None], mine[:, None, :]] * b[mine[:, :, None], mine[:, None, :]]
        found[columns] = blocks.sum((1, 2))
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
    factor, failed = torch.linalg.cholesky_ex(squares)
    raised = squares
    scale = float(squares.diagonal().mean())
    ridge = 1e-10
    while int(failed):
        raised = squares.clone()
        raised.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(raised)
        ridge *= 10
    return torch.cholesky_inverse(factor)
