"""Timing of steps that can be compared on a machine with other load."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .corpus import Corpus, training_batches
from .options import Options
from .train import Run, training_step

WARMUP_ROUNDS = 3
ROUNDS = 30


@dataclass(frozen=True)
class Ratio:
    """A step time relative to the dense model's: the median over rounds, and the middle half of the rounds."""

    median: float
    low: float
    high: float


def step_time_ratios(runs: Sequence[Run], corpus: Corpus, options: Options, rounds: int = ROUNDS) -> dict[str, Ratio]:
    """Time training steps of the finished models side by side, relative to the first run.

    Runs trained one after another meet different loads, so their step times cannot be compared. Here every round has
    one step of every model on the same batch, in rotating order, and ratios are taken within a round. The learning rate
    is 0, so weights stay as they are; the optimizer's moments do not: save first.

    Returns:
        The ratio of each run, by name.
    """
    for run in runs:
        for group in run.optimizer.param_groups:
            group["lr"] = 0.0
    ratios: dict[str, list[float]] = {run.name: [] for run in runs}
    batches = training_batches(corpus, WARMUP_ROUNDS + rounds, options.batch_size, options.context, options.seed + 1)
    for turn, (x, y) in enumerate(batches):
        seconds = {}
        first = turn % len(runs)
        for run in (*runs[first:], *runs[:first]):
            began = time.perf_counter()
            training_step(run, x, y)
            seconds[run.name] = time.perf_counter() - began
        if turn >= WARMUP_ROUNDS:
            for name, took in seconds.items():
                ratios[name].append(took / seconds[runs[0].name])
    return {name: _spread(values) for name, values in ratios.items()}


def _spread(values: list[float]) -> Ratio:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, low, high)
