"""Results of experiments: a table with spread, a CSV with a row per run, a plot."""

from __future__ import annotations

import argparse
import csv
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments.runs import Job, measured, run_all

COLOURS = {
    "dense": "#7f7f7f", "coupled": "#0072b2", "uncoupled": "#d55e00", "magnitude": "#882255",
    "activation": "#cc79a7", "random": "#e69f00", "compensated": "#56b4e9", "adaptive": "#009e73", "paper": "#0072b2",
    "small, same tokens": "#000000", "small, same FLOPs": "#999933",
}  # fmt: skip
"""Told apart with colour-blind eyes as well (Okabe and Ito)."""

Row = Mapping[str, Any]


def arguments(
    description: str | None, *, data: bool = False, steps: int, seeds: int = 3, workers: int = 2, **more: Any
) -> argparse.Namespace:
    """The options that every experiment has; `more` are its own: name -> options of `add_argument`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data:
        parser.add_argument(
            "--data", type=Path, help="folder with wikitext-2/ and cifar10/; without it, what needs it is left out"
        )
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu", help="gpu: larger models, longer runs")
    parser.add_argument("--device", default=None, help="where models are (default: cpu, with --scale gpu cuda)")
    parser.add_argument(
        "--steps", type=int, default=None, help=f"of each run (default: {steps}, with gpu ten times that)"
    )
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--workers", type=int, default=workers, help="processes, of one thread each")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/experiments"), help="what is under way; a second call goes on there"
    )
    for option, how in more.items():
        parser.add_argument(f"--{option}", **how)
    parser.add_argument("--report", action="store_true", help="run nothing; report the rows that there are")
    found = parser.parse_args()
    if found.steps is None:
        found.steps = steps * (10 if found.scale == "gpu" else 1)
    found.device = found.device or ("cuda" if found.scale == "gpu" else "cpu")
    if found.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"{found.device}, but torch sees no GPU here; --device cpu runs it all the same, slowly")
    return found


def run(name: str, jobs: Sequence[Job], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run an experiment's jobs and write its CSV.

    Rows of long jobs, with their curves, come one by one to `results/<name>.jsonl`, others to the folder `--runs`.

    Returns:
        A row per run, those of one job together, ordered as the jobs are.
    """
    jobs = [replace(job, device=options.device) for job in jobs]
    kept = RESULTS if any(job.save_every is not None for job in jobs) else options.runs
    out = kept / f"{name}.jsonl"
    if not options.report:
        chosen = vars(options).get("only") or [job.title for job in jobs]
        run_all([job for job in jobs if job.title in chosen], out, options.runs, options.workers)
    rows = measured(jobs, out)
    if not rows:
        raise SystemExit(f"{out} holds no row of these runs")
    order = {job.title: place for place, job in enumerate(jobs)}
    rows.sort(key=lambda row: (order[row["title"]], row["seed"]))
    columns = dict.fromkeys(key for row in rows for key in row if key not in NOT_COLUMNS)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *LAST_COLUMNS], restval="", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})
    return rows


LAST_COLUMNS = ("steps", "machine", "date")
NOT_COLUMNS = ("curve", "widths", "labels", *LAST_COLUMNS)


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation over seeds."""
    numbers = list(values)
    if len(numbers) < 2:
        return f"{numbers[0]:+.3f}"
    return f"{statistics.mean(numbers):+.3f} ± {statistics.stdev(numbers):.3f}"


def mean_of(values: Iterable[float]) -> str:
    """Their mean; nothing where there are none: a dense run reaches no target."""
    numbers = list(values)
    return f"{statistics.mean(numbers):.3f}" if numbers else ""


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that agree in `keys`, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def show(title: str, table: Table) -> None:
    table.title = title
    Console(width=120).print(table)


def over_dense_table(rows: Sequence[Row], *keys: str, also: Sequence[str] = ()) -> Table:
    """A line per group of runs: how far their loss lies over that of the dense run of the same seed."""
    table = Table(*keys, "runs", "parameters", "loss", "loss over dense", *also)
    for values, group in grouped(rows, *keys).items():
        first = next(row for row in rows if row["title"] == group[0]["title"] and row["variant"] == "dense")
        table.add_row(
            *("" if value is None else str(value) for value in values),
            str(len(group)),
            f"{statistics.mean(row['parameters'] for row in group) / first['parameters']:.3f}",
            f"{statistics.mean(row['loss'] for row in group):.3f}",
            spread(row["over_dense"] for row in group),
            *(mean_of(row[key] for row in group if row.get(key) is not None) for key in also),
        )
    return table


def difference(rows: Sequence[Row], variant: str, other: str) -> str:
    """Loss of one variant less that of another, seed by seed."""
    held = {(row["title"], row["seed"]): row["loss"] for row in rows if row["variant"] == other}
    pairs = [row["loss"] - held[row["title"], row["seed"]] for row in rows if row["variant"] == variant]
    return f"{spread(pairs)}, below in {sum(pair < 0 for pair in pairs)} of {len(pairs)}"


def dots(
    rows: Sequence[Row], path: Path, panel: str, across: str, *, title: str, label: str = "loss over dense, nats"
) -> None:
    """A panel per value of `panel`; in each a dot per run over the values of `across`, and a bar at their mean."""
    panels = grouped([row for row in rows if row["variant"] != "dense"], panel)
    across_page = min(4, len(panels))
    down = -(-len(panels) // across_page)
    figure = Figure(figsize=(max(7.0, 3.0 * across_page), 3.9 * down), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across_page, sharey="row", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((name,), members) in zip(axes.flat, panels.items()):
        for place, ((value,), runs) in enumerate(grouped(members, across).items()):
            colour = COLOURS.get(str(value), "#0072b2")
            heights = [row["over_dense"] for row in runs]
            axis.plot([place] * len(heights), heights, "o", color=colour, alpha=0.6, markersize=5)
            axis.plot([place - 0.3, place + 0.3], [statistics.mean(heights)] * 2, color=colour, linewidth=2.5)
        values = [str(value) for (value,) in grouped(members, across)]
        axis.set_xticks(range(len(values)), values, rotation=40, ha="right")
        axis.set_title(textwrap.fill(str(name), 26), fontsize=10)
        axis.axhline(0, color="#7f7f7f", linewidth=1)
        axis.grid(alpha=0.25, axis="y")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel(label)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def curves(rows: Sequence[Row], path: Path, panel: str, *, title: str) -> None:
    """Validation loss over steps, the mean over seeds, a panel per value of `panel`; dense in each."""
    panels = grouped([row for row in rows if row["variant"] != "dense"], panel)
    figure = Figure(figsize=(max(7.0, 3.6 * len(panels)), 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, ((name,), members) in zip(axes, panels.items()):
        titles = {row["title"] for row in members}
        dense = [row for row in rows if row["variant"] == "dense" and row["title"] in titles]
        for (variant,), runs in grouped([*dense, *members], "variant").items():
            steps = [point["step"] for point in runs[0]["curve"]]
            heights = [statistics.mean(run["curve"][place]["loss"] for run in runs) for place in range(len(steps))]
            axis.plot(steps, heights, color=COLOURS.get(variant), label=variant, linewidth=1.8, marker=".")
        axis.set_title(textwrap.fill(str(name), 26), fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation loss, nats")
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def report(
    name: str, title: str, jobs: Sequence[Job], options: argparse.Namespace, *keys: str, **how: Any
) -> list[Row]:
    """Run an experiment and show it: a table over `keys`, a dot per run and curves in `results/`.

    Args:
        name: of its files.
        title: what was trained.
        jobs: what to run.
        options: from `arguments`; `only`, where an experiment has it, are the titles of jobs to run.
        keys: columns that tell its rows apart, beside the job's title; the last is what runs are compared over.
        how: `also`, more columns of the table.
    """
    rows = run(name, jobs, options)
    show(
        f"{title}, {options.steps} steps, {options.seeds} seeds; loss in nats",
        over_dense_table(rows, "title", *keys, **how),
    )
    heading = f"{title}, {options.steps} steps, {options.seeds} seeds"
    for row in rows:
        row["panel"] = " ".join([f"{row[key]} {key}" for key in keys[:-1] if key in row] or [row["title"]])
    dots(rows, RESULTS / f"{name}.png", "panel", keys[-1], title=f"{heading}: final loss over dense")
    return rows


def over_steps_flops_seconds(rows: Sequence[Row], path: Path, *measured: str, title: str) -> None:
    """A line per run over steps, over FLOPs and over seconds; a row of panels per task and per thing measured.

    Args:
        rows: of one seed.
        path: file to write.
        measured: what of the curve's points is drawn.
        title: of the figure.
    """
    panels = [(name, what) for (name,) in grouped(rows, "title") for what in measured]
    figure = Figure(figsize=(12.6, 3.9 * len(panels)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    lines: dict[str, Any] = {}
    across = (("step", "step", 1), ("flops", "10¹² FLOPs", 1e12), ("seconds", "seconds of one core", 1))
    for line, (name, what) in zip(figure.subplots(len(panels), 3, squeeze=False), panels):
        members = [row for row in rows if row["title"] == name]
        ends = [row["curve"][-1][what] for row in members]
        spread_of = max(ends) - min(ends)
        for axis, (key, label, unit) in zip(line, across):
            for row in members:
                points = row["curve"]
                colour = COLOURS.get(row["variant"])
                (drawn,) = axis.plot(
                    [point[key] / unit for point in points], [point[what] for point in points],
                    color=colour, linewidth=1.8, marker=".", markersize=4,
                )  # fmt: skip
                axis.plot(points[-1][key] / unit, points[-1][what], "o", color=drawn.get_color())
                lines.setdefault(row["variant"], drawn)
            axis.set(xlabel=label, title=f"{name}: {what.replace('_', ' ')}")
            if what == "accuracy":
                axis.set_ylim(bottom=max(0.0, min(ends) - max(0.15, 3 * spread_of)))
            else:
                axis.set_ylim(min(ends) - 0.1, max(ends) + max(0.8, 3 * spread_of))
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(7, len(lines)))
    figure.suptitle(title, fontsize=12)
    figure.savefig(path)
