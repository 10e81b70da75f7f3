"""Cost of scoring on a CPU: training steps of the demo's model without the estimator and with each kind of input.

python bench/estimator.py [--rounds 40]

Every round has one step of each, in rotating order, of models that start equal; ratios are taken within a round.
"""

import argparse
import statistics
import time

import torch
from machine import machine, write_csv
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

import ecospa_fx
from ecospa_fx.demo.models import build_model
from ecospa_fx.demo.options import Options

WARMUP = 3
WAYS = ("none", "accumulate", "optimizer hook", "backward hooks")


class Subject:
    """A model in training, with the estimator's own time kept apart where it is called by itself."""

    def __init__(self, way: str, options: Options) -> None:
        torch.manual_seed(0)
        self.model = build_model(options)
        example = torch.zeros(options.batch_size, options.context, dtype=torch.long)
        ecospa_fx.compile(self.model, example_inputs=(example,))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.way, self.estimator = way, ecospa_fx.CoupledEstimator(self.model)
        if way == "optimizer hook":
            self.estimator.attach(self.optimizer)
        elif way == "backward hooks":
            self.estimator.attach_backward()

    def step(self, tokens: torch.Tensor) -> tuple[float, float]:
        """Seconds of a whole step, and of the call of `accumulate` in it."""
        began = time.perf_counter()
        logits = self.model(tokens[:, :-1]).logits
        cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        before = time.perf_counter()
        if self.way == "accumulate":
            self.estimator.accumulate()
        after = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began, after - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    options = Options()
    subjects = [Subject(way, options) for way in WAYS]
    draw = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    ratios: dict[str, list[float]] = {way: [] for way in WAYS}
    shares: list[float] = []
    for turn in range(WARMUP + rounds):
        tokens = torch.randint(0, 256, (options.batch_size, options.context + 1), generator=draw)
        order = subjects[turn % len(subjects) :] + subjects[: turn % len(subjects)]
        took = {subject.way: subject.step(tokens) for subject in order}
        if turn < WARMUP:
            continue
        for way, (whole, _) in took.items():
            seconds[way].append(whole)
            ratios[way].append(whole / took["none"][0])
        whole, own = took["accumulate"]
        shares.append(own / (whole - own))
    rows = [_row(f"step, {way}", seconds[way], ratios[way]) for way in WAYS]
    rows.append(_row("accumulate alone, share of a step", [], shares))
    table = Table(title=f"demo model, {rounds} rounds, ratio to a step without: median (middle half)")
    for column in ("what", "ms", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        table.add_row(str(row["what"]), str(row["ms"]), f"{row['ratio']} ({row['ratio_low']} to {row['ratio_high']})")
    console = Console()
    console.print(table)
    console.print(machine())
    write_csv("estimator", rows)
    console.print("written to bench/results/estimator.csv")


def _row(what: str, seconds: list[float], ratios: list[float]) -> dict[str, object]:
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "what": what,
        "ms": round(statistics.median(seconds) * 1e3, 2) if seconds else "",
        "ratio": round(middle, 4),
        "ratio_low": round(low, 4),
        "ratio_high": round(high, 4),
    }


if __name__ == "__main__":
    main()
