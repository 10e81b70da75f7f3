"""AdaptiveSparsifier: how much to remove from each coupling, by the expected rise of the loss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.couple.ties import TiedCouplings

from .sparsifier import CoupledSparsifier, named_sizes
from .targets import AnyCost

MOST_UNEVEN = 1.15
"""No coupling loses more than so many times the mean share of its kind; `docs/absorption.md` has the numbers."""

FREE = 1e-3
"""Entries that are worth less than this share of the median of their kind do nothing: they go wherever they are."""

KNOTS = 16
"""Sizes of tied couplings at which the cost is computed exactly."""


class AdaptiveSparsifier(CoupledSparsifier):
    """Removes the entries by which the loss would rise least per unit of cost saved, over all couplings at once.

    The number of entries that go from a coupling depends on the saliency of its entries alone, without compensation.
    One price, loss per unit of cost, holds for all couplings: each loses the entries that are worth less than it, and
    the price is as low as the size that is due allows. There is nothing to set: neither a share of couplings nor one
    of scores.

    But of several couplings of a kind none loses more than `MOST_UNEVEN` times the mean share: the worth of single
    entries is less and less true as more of their neighbours go, and says too little of the couplings that seem cheap.

    An entry that others can replace now costs nothing now. But a model that goes on training uses it, and would miss
    it: deciding by the loss after compensation cost more in the end, above all early in training
    (docs/absorption.md).

    Settings, attributes and errors are those of `CoupledSparsifier`.
    """

    def widths(
        self, worth: Mapping[Coupling, Tensor], at_most: int, wholes: Mapping[Coupling, float] = MappingProxyType({})
    ) -> dict[Coupling, int]:
        """Decide how many entries of each coupling stay.

        Args:
            worth: coupling -> `[size]`, the rise of the loss by its cheapest entry, by the next, and so on; a coupling
                that is not in it stays as it is.
            at_most: the cost that the model may have after this step; if the target is larger, the target.
            wholes: coupling -> the rise of the loss without any of its entries, where more is known of that than what
                they are worth one by one. All that is left of a coupling is one step, beside those of single entries.

        Returns:
            Coupling -> entries that stay, for those that shrink.
        """
        if self.parts:
            return {
                coupling: width
                for part in self.parts.values()
                if isinstance(part, AdaptiveSparsifier)
                for coupling, width in part.widths(worth, self._due(at_most, part) or 0, wholes).items()
            }
        sizes = self.sizes()
        at_most = max(at_most, self.target_size(sizes))
        units = [unit for unit in self._units() if all(c in worth for c in unit.couplings)]
        prices = {unit: _prices(unit, worth, sizes, wholes) for unit in units}
        keeps = self._cheapest(units, prices, sizes, at_most)
        gone = {unit for unit, size in keeps.items() if size == 0}  # as a whole: how uneven that is says nothing
        least = _least([unit for unit in units if unit not in gone], keeps, worth)
        least |= {c: 0 for unit in gone for c in unit.couplings}
        within = {u: p if u in gone else p[: _steps(u, least)] for u, p in prices.items()}
        due = {unit: unit.sizes[-1] for unit in units if unit.due}
        while True:
            keeps = self._cheapest(units, within, sizes, at_most)
            order = sorted(keeps, key=lambda unit: (_last(prices[unit], unit, keeps[unit]), unit.name))
            taken = self._stop_at_target(order, keeps, sizes, due)
            missed = [unit for unit, size in keeps.items() if size == 0 and taken[unit]]
            if not missed:
                break
            # All of it would pass the target, and a part of it is not worth its price.
            within |= {unit: within[unit][: _before_all(unit, within[unit])] for unit in missed}
        keeps = taken
        if sizes.total(named_sizes(keeps, keeps)) > at_most:  # whole entries left a little over: the next cheapest ones
            keeps = self._fill(units, prices, least, keeps, sizes, at_most)
        return {
            coupling: keep
            for unit, size in keeps.items()
            for coupling, keep in unit.keeps(size).items()
            if keep < coupling.size
        }

    def _cheapest(
        self,
        units: list[TiedCouplings],
        prices: Mapping[TiedCouplings, list[float]],
        sizes: AnyCost,
        at_most: int,
    ) -> dict[TiedCouplings, int]:
        """Return the size of each unit once enough of the cheapest steps are taken, or all there are."""
        steps = sorted((price, place, number) for number, unit in enumerate(units)
                       for place, price in enumerate(prices[unit]))  # fmt: skip

        whole = {number: _before_all(unit, prices[unit]) for number, unit in enumerate(units)}

        def after(count: int) -> dict[TiedCouplings, int]:
            taken = Counter(number for _, _, number in steps[:count])  # the steps of one unit come in order
            for number, first in whole.items():
                if taken[number] < len(prices[units[number]]):
                    taken[number] = min(taken[number], first)
            return {
                unit: unit.sizes[-1 - taken[number]] for number, unit in enumerate(units) if taken[number] or unit.due
            }

        low, high = 0, len(steps)
        while low < high:
            middle = (low + high) // 2
            keeps = after(middle)
            if sizes.total(named_sizes(keeps, keeps)) <= at_most:
                high = middle
            else:
                low = middle + 1
        return after(low)

    def _fill(
        self,
        units: list[TiedCouplings],
        prices: Mapping[TiedCouplings, list[float]],
        least: Mapping[Coupling, int],
        keeps: Mapping[TiedCouplings, int],
        sizes: AnyCost,
        at_most: int,
    ) -> dict[TiedCouplings, int]:
        """Take the next cheapest units one allowed size down until enough has gone; none that would pass the target."""
        taken = dict(keeps)
        total, target = sizes.total(named_sizes(taken, taken)), self.target_size(sizes)

        def place(number: int) -> tuple[bool, float, str, int]:
            unit = units[number]
            return _beyond(unit, taken, least), _next(prices[unit], unit, taken), unit.name, number

        order = [place(number) for number in range(len(units))]
        heapify(order)
        while total > at_most and order:
            *_, number = heappop(order)
            unit = units[number]
            now = unit.sizes.index(taken.get(unit, unit.sizes[-1]))
            trial = {**taken, unit: unit.sizes[max(0, now - 1)]}
            after = sizes.total(named_sizes(trial, trial))
            if now and after >= target:
                taken, total = trial, after
                heappush(order, place(number))
        return taken


def _before_all(unit: TiedCouplings, prices: list[float]) -> int:
    """Return the number of steps before the last ones, at one price, if they take all that is left at once."""
    if unit.sizes[0] or len(prices) < len(unit.sizes) - 1:
        return len(prices)
    return next((i for i, price in enumerate(prices) if price == prices[-1]), len(prices))


def _least(
    units: list[TiedCouplings], keeps: Mapping[TiedCouplings, int], worth: Mapping[Coupling, Tensor]
) -> dict[Coupling, int]:
    """Return the size that each coupling keeps at least, if as much of each kind goes as in `keeps`."""
    after = {c: c.size for unit in units for c in unit.couplings}
    after |= {c: keep for unit, size in keeps.items() for c, keep in unit.keeps(size).items()}
    kinds: dict[str, list[Coupling]] = {}
    for coupling in after:
        kinds.setdefault(coupling.kind, []).append(coupling)
    least = {}
    for same in kinds.values():
        whole = sum(c.original_size for c in same)
        share = MOST_UNEVEN * sum(c.original_size - after[c] for c in same) / whole
        median = torch.cat([worth[c] for c in same]).median()
        for c in same:
            free = int((worth[c] <= FREE * median).sum())
            least[c] = min(math.ceil(c.original_size * (1 - share)), c.size - free) if len(same) > 1 else 0
    return least


def _steps(unit: TiedCouplings, least: Mapping[Coupling, int]) -> int:
    """Return the number of allowed sizes that a unit may go down by."""
    within = [size for size in unit.sizes if all(keep >= least[c] for c, keep in unit.keeps(size).items())]
    return max(0, len(within) - 1)


def _beyond(unit: TiedCouplings, keeps: Mapping[TiedCouplings, int], least: Mapping[Coupling, int]) -> bool:
    """Return whether a unit is at the least size that it should have."""
    return len(unit.sizes) - 1 - unit.sizes.index(keeps.get(unit, unit.sizes[-1])) >= _steps(unit, least)


def _prices(
    unit: TiedCouplings,
    worth: Mapping[Coupling, Tensor],
    sizes: AnyCost,
    wholes: Mapping[Coupling, float] = MappingProxyType({}),
) -> list[float]:
    """Compute the loss per cost saved of each allowed size of a unit, from the largest down; it never falls.

    A cheap step after a dear one is priced together with it: the lower convex hull of loss over cost.
    """
    rises = {c: [0.0, *worth[c].cumsum(0).tolist()] for c in unit.couplings}
    costs = _costs(unit, sizes)
    points = []
    for size in reversed(unit.sizes):
        rise = sum(
            wholes[c] if not keep and c in wholes else rises[c][c.size - keep] for c, keep in unit.keeps(size).items()
        )
        points.append((costs[unit.sizes[-1]] - costs[size], rise))
    return _slopes(points)


def _costs(unit: TiedCouplings, sizes: AnyCost) -> dict[int, float]:
    """Return the cost of the model at each size of a unit, the others as they are.

    A cost is linear in one width. Tied widths may multiply each other: between a number of sizes it is a straight line.
    """
    last = len(unit.sizes) - 1
    knots = min(last, 1 if len(unit.couplings) == 1 else KNOTS)
    positions = [round(last * i / max(1, knots)) for i in range(knots + 1)]
    if unit.sizes[0] == 0 and last > 1:  # with the last entries whole ops go
        positions = sorted({*positions, 1})
    exact = [sizes.total(named_sizes([unit], {unit: unit.sizes[position]})) for position in positions]
    costs = {unit.sizes[positions[0]]: float(exact[0])}
    for (a, b), (x, y) in zip(pairwise(positions), pairwise(exact), strict=True):
        for position in range(a + 1, b + 1):
            share = (unit.sizes[position] - unit.sizes[a]) / max(1, unit.sizes[b] - unit.sizes[a])
            costs[unit.sizes[position]] = x + (y - x) * share
    return costs


def _slopes(points: list[tuple[float, float]]) -> list[float]:
    """Return the slopes of the lower convex hull over `(saved, rise)`, one for each step between two points."""
    hull: list[int] = []
    for i, (x, y) in enumerate(points):
        while len(hull) > 1:
            (x1, y1), (x2, y2) = points[hull[-2]], points[hull[-1]]
            if (y2 - y1) * (x - x1) >= (y - y1) * (x2 - x1):
                hull.pop()
            else:
                break
        hull.append(i)
    slopes = []
    for a, b in pairwise(hull):
        (x1, y1), (x2, y2) = points[a], points[b]
        slopes += [(y2 - y1) / max(x2 - x1, 1e-9)] * (b - a)
    return slopes


def _last(prices: list[float], unit: TiedCouplings, size: int) -> float:
    """Return the price of the last step down to a size."""
    gone = len(unit.sizes) - 1 - unit.sizes.index(size)
    return prices[gone - 1] if gone else 0.0


def _next(prices: list[float], unit: TiedCouplings, keeps: Mapping[TiedCouplings, int]) -> float:
    """Return the price of the step below the size that is taken."""
    gone = len(unit.sizes) - 1 - unit.sizes.index(keeps.get(unit, unit.sizes[-1]))
    return prices[gone] if gone < len(prices) else float("inf")
