"""Plot of loss and size over the steps of the runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .train import Run

COLOURS = {"dense": "#b0b0b0", "EcoSpa": "#0072b2", "uncoupled": "#d55e00"}
"""Colours that colour-blind people can tell apart (Okabe and Ito)."""

SMOOTHING = 0.9
"""Weight of the past in the running mean of the training loss; single batches are too noisy to compare."""


def save_plot(runs: Sequence[Run], path: Path, title: str) -> None:
    """Draw training and validation loss above the parameter count; dots mark the shrinks."""
    figure = Figure(figsize=(9, 7), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory, without a display
    loss, size = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for run in runs:
        colour = COLOURS.get(run.name, "#009e73")
        steps = range(1, len(run.losses) + 1)
        smooth = _running_mean(run.losses)
        width = 4.5 if run is runs[0] else 1.6  # the dense run stays visible under another one
        loss.plot(steps, smooth, color=colour, alpha=0.45, linewidth=1)
        loss.plot(
            *zip(*run.valid, strict=True), color=colour, marker="s", markersize=3.5, linewidth=width, label=run.name
        )
        loss.plot(run.shrinks, [smooth[step - 1] for step in run.shrinks], "o", color=colour, markersize=4)
        millions = [parameters / 1e6 for parameters in run.sizes]
        size.step(steps, millions, where="post", color=colour, linewidth=width, label=run.name)
        size.plot(run.shrinks, [millions[step - 1] for step in run.shrinks], "o", color=colour, markersize=4)
    lowest = min(min(_running_mean(run.losses)) for run in runs)
    highest = max(_running_mean(run.losses)[len(run.losses) // 12] for run in runs)
    loss.set_ylim(lowest - 0.05, highest)  # without the steep first steps, which would flatten the rest
    loss.set_ylabel("loss, nats per byte")
    loss.plot([], [], color="black", alpha=0.45, linewidth=1, label="training (running mean)")
    loss.plot([], [], color="black", marker="s", markersize=3.5, linewidth=1.6, label="validation")
    loss.plot([], [], "o", color="black", markersize=4, label="shrink")
    loss.set_title(title)
    loss.legend(loc="lower left", ncols=2, framealpha=0.9, edgecolor="none")
    size.set_ylabel("parameters, millions")
    size.set_xlabel("optimizer step")
    size.set_ylim(bottom=0)
    for axes in (loss, size):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _running_mean(values: Sequence[float]) -> list[float]:
    return list(accumulate(values, lambda mean, value: SMOOTHING * mean + (1 - SMOOTHING) * value))
