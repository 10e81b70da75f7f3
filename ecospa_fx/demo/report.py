"""Results of the demo: a table for people, JSON and CSV for programs."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.table import Table

from .corpus import Corpus
from .options import Options
from .timing import Ratio
from .train import Run


@dataclass(frozen=True)
class Row:
    """The result of one run; every `_ratio` is relative to the first row.

    Attributes:
        run: name of the run.
        parameters: parameters at the end.
        validation_loss: validation loss in nats per byte.
        perplexity: exp of the loss, per byte.
        step_ms: median step time over the steps after the last shrink of any run, in milliseconds.
        step_ratio: median over rounds of step times measured side by side; `_low` and `_high` are its quartiles.
        state_bytes: bytes of parameters and optimizer state at the end.
    """

    run: str
    parameters: int
    parameters_ratio: float
    validation_loss: float
    validation_loss_ratio: float
    perplexity: float
    perplexity_ratio: float
    step_ms: float
    step_ratio: float
    step_ratio_low: float
    step_ratio_high: float
    state_bytes: int
    state_bytes_ratio: float


def rows_of(runs: Sequence[Run], ratios: Mapping[str, Ratio]) -> list[Row]:
    """Summarise each run relative to the first one, the dense one."""
    dense = runs[0]
    last = max((step for run in runs for step in run.shrinks), default=0)
    last = min(last, len(dense.seconds) - 1)
    return [
        Row(
            run=run.name,
            parameters=run.sizes[-1],
            parameters_ratio=run.sizes[-1] / dense.sizes[-1],
            validation_loss=run.final_loss,
            validation_loss_ratio=run.final_loss / dense.final_loss,
            perplexity=math.exp(run.final_loss),
            perplexity_ratio=math.exp(run.final_loss - dense.final_loss),
            step_ms=1e3 * statistics.median(run.seconds[last:]),
            step_ratio=ratios[run.name].median,
            step_ratio_low=ratios[run.name].low,
            step_ratio_high=ratios[run.name].high,
            state_bytes=run.state_bytes(),
            state_bytes_ratio=run.state_bytes() / dense.state_bytes(),
        )
        for run in runs
    ]


def table_of(rows: Sequence[Row]) -> Table:
    """Build a table for a terminal of 80 columns: each value, and below it its ratio to dense."""
    table = Table(
        title="after training",
        caption="x: relative to dense. Step: median after the last shrink; below it the ratio of steps timed side by "
        "side, with the middle half of the rounds.",
        show_lines=True,
    )
    table.add_column("run")
    for heading in (
        "parameters",
        "validation loss\nnats per byte",
        "perplexity\nper byte",
        "step\nms",
        "weights + optimizer\nMB",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        spread = f"\n({row.step_ratio_low:.2f}-{row.step_ratio_high:.2f})"
        table.add_row(
            row.run,
            f"{row.parameters:,}\nx {row.parameters_ratio:.3f}",
            f"{row.validation_loss:.3f}\nx {row.validation_loss_ratio:.3f}",
            f"{row.perplexity:.3f}\nx {row.perplexity_ratio:.3f}",
            f"{row.step_ms:.0f}\nx {row.step_ratio:.2f}" + (spread if row is not rows[0] else ""),
            f"{row.state_bytes / 1e6:.1f}\nx {row.state_bytes_ratio:.3f}",
        )
    return table


def write_results(out: Path, rows: Sequence[Row], runs: Sequence[Run], options: Options, corpus: Corpus) -> None:
    """Write `results.csv` (one line per run) and `results.json` (the same, the curves, options and machine)."""
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    results = {
        "options": {**asdict(options), "text": corpus.source, "out": options.out.name},
        "schedule": {"start": options.start, "end": options.end, "interval": options.interval},
        "corpus": {"source": corpus.source, "train_bytes": len(corpus.train), "valid_bytes": len(corpus.valid)},
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpu": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "rows": [asdict(row) for row in rows],
        "curves": {run.name: _curve(run) for run in runs},
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def _curve(run: Run) -> dict[str, object]:
    return {
        "train_loss": [round(loss, 5) for loss in run.losses],
        "parameters": run.sizes,
        "seconds": [round(seconds, 5) for seconds in run.seconds],
        "valid_loss": [[step, round(loss, 5)] for step, loss in run.valid],
        "shrinks": run.shrinks,
        "removed": [entry["removed"] for entry in run.trainer.history] if run.trainer else [],
    }
