"""Latency: the measured time of a forward, as the cost that a target is a share of.

    Latency(inputs) -> a few copies at smaller widths, timed -> seconds by FLOPs -> corrected at each shrink

FLOPs are known for any widths, seconds only where they were measured; between measurements the curve is straight. The
model itself is timed before every decision, so that the curve is exact where it matters. With the last entries of a
coupling ops go whole, which FLOPs do not show: that is measured apart.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ecospa_fx.arguments import FUNCTION, INPUTS, KEYWORDS, MODULE, NUMBER, instance, optional, takes
from ecospa_fx.couple.constraints import Constraints
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import EcoSpaError, TargetError
from ecospa_fx.model.cost import CostModel
from ecospa_fx.model.lookup import couplings, plan
from ecospa_fx.model.shrinking import shrink

WIDTHS = (0.7, 0.4, 0.15)
"""Shares of the entries in the copies that the first curve is measured on."""

NANO = 1e9


class Latency:
    """Seconds of a forward, as a cost: `EcoSpaTrainer(model, optimizer, cost=Latency((x,)), target=0.6)`.

    Args:
        inputs: positional arguments of the call to time.
        kwargs: keyword arguments of it.
        repeats: number of calls; their median counts.
        measure: in place of all that: `measure(model)` -> seconds, or any other number that should come down.

    Attributes:
        points: (FLOPs, seconds) of every measurement, ascending; of the same FLOPs the last one counts.
        fixed: kind of coupling -> seconds that go beside its FLOPs with the last entry of one, once that is measured:
            whole ops are not called any more.
    """

    @takes(inputs=INPUTS, kwargs=optional(KEYWORDS), measure=optional(FUNCTION))
    def __init__(
        self,
        inputs: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        repeats: int = 20,
        measure: Callable[[nn.Module], float] | None = None,
    ) -> None:
        if measure is None and not inputs and not kwargs:
            raise TargetError("Latency() has nothing to time; pass the inputs of a call, or measure=")
        if not isinstance(repeats, int) or repeats < 1:
            raise TargetError(f"repeats={repeats!r} is out of range; it is a whole number of calls, at least 1")
        self.inputs, self.kwargs, self.repeats = tuple(inputs), dict(kwargs or {}), repeats
        self.measure = measure or self._timed
        self.points: list[tuple[int, float]] = []
        self.fixed: dict[str, float] = {}
        self._gone = 0.0

    @takes(model=MODULE, flops=instance("a CostModel of FLOPs", CostModel))
    def observe(self, model: nn.Module, flops: CostModel, *, depth: bool = False) -> None:
        """Measure the model as it is; the first time also copies of it at smaller widths.

        Args:
            model: a compiled model.
            flops: its FLOPs.
            depth: measure also what goes with the last entry of a coupling, in a copy for each kind.

        Raises:
            EcoSpaError: the model is not compiled.
            TargetError: it cannot be called with these inputs.
        """
        plan(model)
        if not self.points:
            for share in WIDTHS:
                smaller = copy.deepcopy(model)
                keeps = {c: torch.arange(max(1, math.ceil(share * c.size))) for c in couplings(smaller) if c.size}
                shrink(smaller, keeps)
                # Equal blocks in the copy have the names that they have in the model.
                self._add(flops.total({c.name: len(keep) for c, keep in keeps.items()}), self.measure(smaller))
        gone = sum(self.saved(couplings(model), {c.name for c in couplings(model) if not c.size}).values())
        if gone != self._gone:  # sublayers have gone since the other measurements
            self.points = [(x, max(0.0, y - gone + self._gone)) for x, y in self.points]
            self._gone = gone
        self._add(flops.total({}), self.measure(model))
        if depth and not self.fixed:
            self._observe_depth(model, flops)

    def _observe_depth(self, model: nn.Module, flops: CostModel) -> None:
        """Measure a copy without every other coupling of a kind, for each kind of which some may lose all entries."""
        kinds: dict[str, list[Coupling]] = {}
        for coupling in couplings(model):
            if coupling.size and coupling.last_stays is None:
                kinds.setdefault(coupling.kind, []).append(coupling)
        for kind, same in kinds.items():
            smaller, names = copy.deepcopy(model), [c.name for c in same[::2]]
            shrink(smaller, dict.fromkeys(names, torch.arange(0)), constraints=Constraints(min_keep=0))
            by_flops = self.seconds(flops.total(dict.fromkeys(names, 0)))
            self.fixed[kind] = max(0.0, by_flops - self.measure(smaller)) / len(names)

    def saved(self, among: Sequence[Coupling], gone: Collection[str]) -> dict[str, float]:
        """Return the seconds that go beside FLOPs with each sublayer of which a coupling has no entry left.

        Couplings that lie on one weight are of one sublayer: its ops go once.
        """
        sublayers: dict[str, float] = {}
        first: dict[str, str] = {}
        for coupling in among:
            weights = [m.parameter for m in coupling.members]
            name = next((first[weight] for weight in weights if weight in first), coupling.name)
            first |= dict.fromkeys(weights, name)
            if coupling.name in gone:
                sublayers[name] = max(sublayers.get(name, 0.0), self.fixed.get(coupling.kind, 0.0))
        return sublayers

    @takes(flops=NUMBER)
    def seconds(self, flops: float) -> float:
        """Return the seconds for FLOPs: on the line between two measurements, beyond all of them on the last line."""
        if len(self.points) == 1:
            return self.points[0][1] * flops / max(1, self.points[0][0])
        # Noise may not make a smaller model slower: a search for the width would go astray.
        xs, ys, highest = [x for x, _ in self.points], [], 0.0
        for _, y in self.points:
            highest = max(highest, y)
            ys.append(highest)
        i = min(max(1, bisect_left(xs, flops)), len(xs) - 1)
        slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
        return max(0.0, ys[i - 1] + slope * (flops - xs[i - 1]))

    def _add(self, flops: int, seconds: float) -> None:
        self.points = sorted([point for point in self.points if point[0] != flops] + [(flops, seconds)])

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

    @torch.no_grad()
    def _timed(self, model: nn.Module) -> float:
        training, seconds = model.training, []
        model.eval()
        try:
            for i in range(self.repeats + 3):
                _wait(model)
                begun = time.perf_counter()
                self._call(model)
                _wait(model)
                if i >= 3:  # the first calls capture, allocate and tune
                    seconds.append(time.perf_counter() - begun)
        finally:
            model.train(training)
        return statistics.median(seconds)


class LatencyModel:
    """The interface of `CostModel` in measured nanoseconds."""

    def __init__(self, flops: CostModel, latency: Latency, among: Sequence[Coupling] = ()) -> None:
        self.flops, self.latency = flops, latency
        self._there = [coupling for coupling in among if coupling.size]
        self.sizes = flops.sizes
        self.original = self._nano(flops.original)
        self.prunable = self.original - self._nano(flops.original - flops.prunable)

    def total(self, sizes: Mapping[str, int]) -> int:
        """Return the nanoseconds of a forward with couplings at `sizes`; those not named stay as they are."""
        gone = {name for name, size in sizes.items() if not size}
        saved = sum(self.latency.saved(self._there, gone).values()) if gone and self.latency.fixed else 0.0
        return max(0, self._nano(self.flops.total(sizes)) - round(NANO * saved))

    def _nano(self, flops: int) -> int:
        return round(NANO * self.latency.seconds(flops))


def _wait(model: nn.Module) -> None:
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.is_cuda:
        torch.cuda.synchronize(parameter.device)
