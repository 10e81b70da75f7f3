"""Latency: the measured time of a forward, as the cost that a target is a share of.

    Latency(inputs) -> the model in turn with a copy for each kind of coupling, narrower, and one without sublayers
                    -> seconds per FLOP of each kind, and what goes with a whole sublayer -> corrected at each shrink

FLOPs are known for any widths, seconds only where they were measured. A FLOP of a kind costs what it does not cost of
another: one of a wide product of matrices less than one of a narrow one, and of heads also what runs beside products,
such as the softmax. So each kind has a rate of its own. With the last entry of a coupling ops go whole, which FLOPs do
not show: that is measured apart. The model itself is timed again whenever it has shrunk, so that forecasts begin where
it is.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ecospa_fx.arguments import FUNCTION, INPUTS, KEYWORDS, MODULE, instance, optional, takes
from ecospa_fx.couple.constraints import Constraints
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.couple.ties import TiedCouplings
from ecospa_fx.errors import EcoSpaError, TargetError
from ecospa_fx.model.cost import CostModel
from ecospa_fx.model.lookup import couplings, plan
from ecospa_fx.model.shrinking import shrink

from .timing import in_turn

NARROWER = 0.6
"""Share of the entries of a kind in the copy that its rate is measured on."""

NANO = 1e9


class Latency:
    """Seconds of a forward, as a cost: `EcoSpaTrainer(model, optimizer, cost=Latency((x,)), target=0.6)`.

    Args:
        inputs: positional arguments of the call to time.
        kwargs: keyword arguments of it.
        repeats: number of calls of each copy, and of the model in turn with it; medians count.
        clock: returns seconds. With `time.thread_time`, on one thread of a CPU, other load does not count.
        measure: in place of all that: `measure(model)` -> seconds, or any other number that should come down.

    Attributes:
        points: (FLOPs, seconds) of the model itself, at first and whenever it had shrunk since.
        rates: kind of coupling -> seconds that go with a FLOP of it.
        rate: that of all kinds together.
        fixed: kind of coupling -> seconds that go beside its FLOPs with the last entry of one, once that is measured:
            whole ops are not called any more.
        slower: kinds of coupling of which fewer entries took no less time. A fast attention, for one, may want queries
            and values of one width.
    """

    @takes(inputs=INPUTS, kwargs=optional(KEYWORDS), clock=FUNCTION, measure=optional(FUNCTION))
    def __init__(
        self,
        inputs: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        repeats: int = 20,
        clock: Callable[[], float] = time.perf_counter,
        measure: Callable[[nn.Module], float] | None = None,
    ) -> None:
        if measure is None and not inputs and not kwargs:
            raise TargetError("Latency() has nothing to time; pass the inputs of a call, or measure=")
        if not isinstance(repeats, int) or repeats < 1:
            raise TargetError(f"repeats={repeats!r} is out of range; it is a whole number of calls, at least 1")
        self.inputs, self.kwargs, self.repeats, self.clock = tuple(inputs), dict(kwargs or {}), repeats, clock
        self._measured_by = measure
        self.measure = measure or self._timed
        self.points: list[tuple[int, float]] = []
        self.rates: dict[str, float] = {}
        self.rate = 0.0
        self.fixed: dict[str, float] = {}
        self.slower: list[str] = []

    @takes(
        model=MODULE,
        flops=instance("a CostModel of FLOPs", CostModel),
        constraints=optional(instance("an ecospa_fx.Constraints", Constraints)),
    )
    def observe(self, model: nn.Module, flops: CostModel, constraints: Constraints | None = None) -> None:
        """Measure the model as it is, unless it was so the last time; the first time also smaller copies of it.

        Args:
            model: a compiled model.
            flops: its FLOPs.
            constraints: what may shrink, and to which sizes. With `min_keep=0` copies without whole sublayers are
                measured too.

        Raises:
            EcoSpaError: the model is not compiled.
            TargetError: it cannot be called with these inputs.
        """
        plan(model)
        now = flops.total({})
        if not self.points:
            whole = self._observe_kinds(model, flops, constraints or Constraints())
            self.points = [(now, statistics.median(whole) if whole else self.measure(model))]
        elif now != self.points[-1][0]:
            self.points = [*self.points, (now, self.measure(model))]

    def _observe_kinds(self, model: nn.Module, flops: CostModel, constraints: Constraints) -> list[float]:
        """Measure copies for each kind; return the seconds of the model in turn with them."""
        found: list[tuple[float, float, float]] = []

        def saved(keeps: Mapping[str, int]) -> tuple[float, float]:
            """Return the seconds and the FLOPs that sizes save."""
            smaller = copy.deepcopy(model)
            entries = {name: torch.arange(keep) for name, keep in keeps.items()}
            shrink(smaller, entries, constraints=None if all(keeps.values()) else Constraints(min_keep=0))
            seconds, less = self._beside(model, smaller)
            work = flops.total({}) - flops.total(keeps)
            found.append((seconds, less, work))
            return less, work

        rates: dict[str, float] = {}
        slower: list[str] = []
        narrowed: dict[str, tuple[float, float]] = {}
        units, _ = constraints.units(model, couplings(model))
        for kinds, same in _by_kinds(units).items():
            narrower = {unit: size for unit in same if (size := _narrower(unit)) is not None}
            seconds, work = saved(_sizes(narrower)) if narrower else (0.0, 0.0)
            if narrower and seconds <= 0:
                slower += kinds
            narrowed |= dict.fromkeys(kinds, (seconds, work))
            rates |= dict.fromkeys(kinds, max(0.0, seconds) / max(1.0, work))
        beside: dict[str, list[float]] = {}
        for sublayers in _that_may_go(units):
            gone = [coupling for each in sublayers for coupling in each]
            all_seconds, _ = saved({c.name: 0 for c in gone})
            for kind in dict.fromkeys(c.kind for c in gone):
                all_work = flops.total({}) - flops.total({c.name: 0 for c in gone if c.kind == kind})
                # Seconds are a line of FLOPs, beside which the last entries take some more with them: a kind's rate is
                # the slope. If they seem to take less, that is noise, and the line goes between both measurements.
                if all_seconds < rates[kind] * all_work:
                    seconds, work = narrowed[kind]
                    rates[kind] = max(0.0, seconds * work + all_seconds * all_work) / max(1.0, work**2 + all_work**2)
                beside.setdefault(kind, []).append(max(0.0, all_seconds - rates[kind] * all_work) / len(sublayers))
        fixed = {kind: statistics.mean(each) for kind, each in beside.items()}
        self.rates, self.fixed, self.slower = rates, fixed, slower
        self.rate = max(0.0, sum(less for _, less, _ in found)) / max(1.0, sum(work for *_, work in found))
        return [seconds for seconds, *_ in found]

    def _beside(self, model: nn.Module, smaller: nn.Module) -> tuple[float, float]:
        """Measure a model in turn with a smaller copy: its seconds, and how many fewer the copy takes."""
        if self._measured_by is not None:
            seconds = self._measured_by(model)
            return seconds, seconds - self._measured_by(smaller)
        found = in_turn((model, smaller), self._call, self.repeats, self.clock)
        seconds = statistics.median(a for a, _ in found)
        return seconds, seconds * (1 - statistics.median(b / a for a, b in found if a > 0))

    def readings(self) -> dict[str, Any]:
        """Return all that was measured, as plain values."""
        return {
            "points": [list(point) for point in self.points], "rate": self.rate, "rates": self.rates,
            "fixed": self.fixed, "slower": self.slower,
        }  # fmt: skip

    def take(self, readings: Mapping[str, Any]) -> None:
        """Go on with what was measured elsewhere, or before."""
        self.points = [(int(flops), float(seconds)) for flops, seconds in readings["points"]]
        self.rate, self.rates = float(readings["rate"]), dict(readings["rates"])
        self.fixed, self.slower = dict(readings["fixed"]), list(readings["slower"])

    def units(self, units: Sequence[TiedCouplings]) -> tuple[list[TiedCouplings], dict[str, str]]:
        """Return the units that may save time, and the reason for each coupling that stays as it is, by its name.

        Those of kinds in `slower` may still go as a whole where that is allowed, or must shrink where that is due.
        """
        left: list[TiedCouplings] = []
        whole: dict[str, str] = {}
        for unit in units:
            if unit.due or not any(c.kind in self.slower for c in unit.couplings):
                left.append(unit)
            elif unit.sizes[0] == 0 < unit.sizes[-1]:
                left.append(replace(unit, sizes=(0, unit.sizes[-1])))
            else:
                kind = next(c.kind for c in unit.couplings if c.kind in self.slower)
                whole |= {
                    c.name: f"with fewer entries of each {kind} a forward took no less time" for c in unit.couplings
                }
        return left, whole

    def _call(self, model: nn.Module) -> None:
        try:
            model(*self.inputs, **self.kwargs)
        except EcoSpaError:
            raise
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            raise TargetError(
                f"{type(model).__name__} cannot be called with the inputs of this Latency, it fails with "
                f"{type(error).__name__}: {line:.200}; make one with inputs of the model"
            ) from error

    def _timed(self, model: nn.Module) -> float:
        return statistics.median(seconds for (seconds,) in in_turn((model,), self._call, self.repeats, self.clock))


class LatencyModel:
    """The interface of `CostModel` in measured nanoseconds.

    Args:
        flops: FLOPs of the model as it is now.
        latency: has observed it.
        among: its couplings.
    """

    def __init__(self, flops: CostModel, latency: Latency, among: Sequence[Coupling]) -> None:
        self.flops, self.latency = flops, latency
        self._kind = {c.name: c.kind for c in among}
        self._sublayer = {c.name: name for c, name in sublayer_of([c for c in among if c.size]).items()}
        self._rate = {c.name: latency.rates.get(c.kind, latency.rate) for c in among}
        # Where axes of two kinds multiply each other, the dearer one goes first: it takes all FLOPs of both with it.
        self._rates = sorted(set(self._rate.values()), reverse=True)
        self.sizes = flops.sizes
        (first, seconds), (_, self._now) = latency.points[0], latency.points[-1]
        self.original = round(NANO * (seconds + latency.rate * max(0, flops.original - first)))
        self.prunable = min(self.original, round(NANO * latency.rate * flops.prunable))

    def total(self, sizes: Mapping[str, int]) -> int:
        """Return the nanoseconds of a forward with couplings at `sizes`; those not named stay as they are."""
        saved, before = 0.0, self.flops.total({})
        smaller: dict[str, int] = {}
        for rate in self._rates:
            here = {name: size for name, size in sizes.items() if self._rate[name] == rate}
            if here:
                smaller |= here
                after = self.flops.total(smaller)
                saved += rate * (before - after)
                before = after
        # Of one sublayer the coupling that has taken the FLOPs counts: its ops go once.
        first: dict[str, str] = {}
        for name in (name for name, size in sizes.items() if not size and name in self._sublayer):
            sublayer = self._sublayer[name]
            first[sublayer] = max(first.get(sublayer, name), name, key=self._rate.__getitem__)
        saved += sum(self.latency.fixed.get(self._kind[name], 0.0) for name in first.values())
        return max(0, round(NANO * (self._now - saved)))


def _by_kinds(units: Sequence[TiedCouplings]) -> dict[tuple[str, ...], list[TiedCouplings]]:
    """Group units by the kinds of their couplings; kinds that are tied anywhere are one group."""
    groups: dict[tuple[str, ...], list[TiedCouplings]] = {}
    for unit in units:
        kinds: set[str] = {c.kind for c in unit.couplings}
        same = [unit]
        for other in [other for other in groups if kinds & set(other)]:
            kinds |= set(other)
            same = [*groups.pop(other), *same]
        groups[tuple(sorted(kinds))] = same
    return groups


def _narrower(unit: TiedCouplings) -> int | None:
    """Return the allowed size of a unit that is next to the share to measure at; None where there is none between."""
    between = [size for size in unit.sizes[:-1] if size]
    return min(between, key=lambda size: abs(size - NARROWER * unit.sizes[-1]), default=None)


def _sizes(units: Mapping[TiedCouplings, int]) -> dict[str, int]:
    return {c.name: keep for unit, size in units.items() for c, keep in unit.keeps(size).items()}


def _that_may_go(units: Sequence[TiedCouplings]) -> list[list[list[Coupling]]]:
    """Return the sublayers that may go as a whole, as the couplings of each that may lose all entries.

    Returns:
        For each sort of sublayer, by the kinds in it, every other one; all, where some go in step.
    """
    may_go = [unit for unit in units if unit.sizes[0] == 0 < unit.sizes[-1]]
    members: dict[str, list[Coupling]] = {}
    for coupling, name in sublayer_of([c for unit in may_go for c in unit.couplings]).items():
        members.setdefault(name, []).append(coupling)
    sorts: dict[frozenset[str], list[list[Coupling]]] = {}
    for each in members.values():
        sorts.setdefault(frozenset(c.kind for c in each), []).append(each)
    single = all(len(unit.couplings) == 1 for unit in may_go)
    return [same[::2] if single else same for same in sorts.values()]


def sublayer_of(among: Sequence[Coupling]) -> dict[Coupling, str]:
    """Return the name of the sublayer that each coupling is of: that of the first one which lies on a weight of it."""
    found: dict[Coupling, str] = {}
    first: dict[str, str] = {}
    for coupling in among:
        weights = [m.parameter for m in coupling.members]
        found[coupling] = next((first[weight] for weight in weights if weight in first), coupling.name)
        first |= dict.fromkeys(weights, found[coupling])
    return found
