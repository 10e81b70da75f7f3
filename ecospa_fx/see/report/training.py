"""Training curves: loss and size, widths over time, importance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ecospa_fx.model.lookup import couplings

if TYPE_CHECKING:
    from ecospa_fx.train.trainer import EcoSpaTrainer

ROW = 18
"""Height of a heatmap row in pixels."""
POINTS = 60
"""Points of a forecast curve."""


def training_of(
    trainer: EcoSpaTrainer,
    losses: Sequence[float],
    *,
    sizes: Sequence[int | None] | None = None,
    valid: Sequence[tuple[int, float]] = (),
) -> dict[str, Any]:
    """Collect the data that a report shows of a training run, as plain values that JSON can hold.

    Args:
        trainer: the trainer after the run.
        losses: the loss of each step, as `EcoSpaTrainer.fit` returns them.
        sizes: parameters after each step; by default taken from the trainer's history.
        valid: (step, loss on held-out data) pairs.
    """
    history = trainer.history
    if sizes is None:
        steps = range(1, len(losses) + 1)
        first = trainer.size if not history else None
        sizes = [_size_at(step, history, first) for step in steps]
    original = {coupling.name: coupling.original_size for coupling in couplings(trainer.model)}
    return {
        "loss": [round(float(loss), 6) for loss in losses],
        "valid": [[step, round(float(loss), 6)] for step, loss in valid],
        "sizes": list(sizes),
        "history": history,
        "original": original,
        "forecast": _forecast(trainer),
    }


def _forecast(trainer: EcoSpaTrainer) -> dict[str, Any] | None:
    """Sample the last forecast: the expected rise of the loss per kind of coupling, by the share that is removed."""
    if trainer.forecast is None:
        return None
    kinds = {}
    for kind, rises in trainer.forecast.by_kind().items():
        entries = len(rises) - 1
        at = sorted({round(i * entries / POINTS) for i in range(POINTS + 1)})
        kinds[kind] = [[i / entries, float(rises[i])] for i in at]
    return {"in_nats": trainer.forecast.positions is not None, "kinds": kinds}


def _size_at(step: int, history: Sequence[Mapping[str, Any]], first: int | None) -> int | None:
    """Return the parameters after a step; `first` before the first shrink, None if that size was not recorded."""
    sizes = [entry["size"] for entry in history if entry["step"] <= step]
    return sizes[-1] if sizes else first


def widths_of(training: Mapping[str, Any]) -> tuple[list[int], dict[str, list[int]]]:
    """Return the steps of shrinks, after a step 0, and the entries of each coupling after each of them."""
    now = dict(training["original"])
    steps, widths = [0], {name: [size] for name, size in now.items()}
    for entry in training["history"]:
        steps.append(entry["step"])
        for name, removed in entry["removed"].items():
            now[name] -= removed
        for name, size in now.items():
            widths[name].append(size)
    return steps, widths


def figures_of(training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Build the figures for plotly.js: a title, traces and a layout each."""
    figures = [_loss(training), widths_figure(training)]
    names = list(training["original"])
    scored = [entry for entry in training["history"] if entry.get("importance")]
    if scored:
        at = [entry["step"] for entry in scored]
        values = [[_log(entry["importance"].get(name, 0.0)) for entry in scored] for name in names]
        texts = [[f"{entry['importance'].get(name, 0.0):.3g}" for entry in scored] for name in names]
        figures.append(_heatmap("Importance of each coupling, powers of ten", at, names, values, texts, None))
    flowing = [entry for entry in training["history"] if entry.get("flow")]
    if flowing:
        at = [entry["step"] for entry in flowing]
        shares = [[entry["flow"].get(name, 0.0) for entry in flowing] for name in names]
        words = [[f"{share:.0%}" for share in row] for row in shares]
        figures.append(_heatmap("Share of what flows that each shrink removed", at, names, shares, words, (0, 1)))
    if training.get("forecast"):
        figures.append(_expected(training["forecast"]))
    return figures


def widths_figure(training: Mapping[str, Any]) -> dict[str, Any]:
    """Build the figure of the widths of all couplings over time."""
    steps, widths = widths_of(training)
    original = training["original"]
    shares = [[size / original[name] for size in sizes] for name, sizes in widths.items()]
    words = [[f"{size} of {original[name]}" for size in sizes] for name, sizes in widths.items()]
    title = "Width of each coupling over time, share left"
    return _heatmap(title, steps, list(widths), shares, words, (0, 1))


def _expected(forecast: Mapping[str, Any]) -> dict[str, Any]:
    """Build the figure of the forecast: the expected rise of the loss by the share that is removed."""
    traces = [
        {
            "type": "scatter", "mode": "lines+markers", "name": kind, "marker": {"size": 4},
            "x": [share for share, rise in points if rise > 0], "y": [rise for _, rise in points if rise > 0],
        }
        for kind, points in forecast["kinds"].items()
    ]  # fmt: skip
    unit = "in the unit of the loss" if forecast["in_nats"] else "without a unit"
    layout = {
        "height": 360,
        "xaxis": {"title": {"text": "share of the entries removed, the cheapest first"}, "tickformat": ".0%"},
        "yaxis": {"title": {"text": f"expected rise, {unit}"}, "type": "log", "exponentformat": "power"},
        "legend": {"orientation": "h", "y": 1.15},
    }
    return {"title": "How far each kind can go: expected rise of the loss", "traces": traces, "layout": layout}


def _log(value: float) -> float | None:
    return math.log10(value) if value > 0 else None


def _loss(training: Mapping[str, Any]) -> dict[str, Any]:
    steps = list(range(1, len(training["loss"]) + 1))
    traces: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "name": "loss", "x": steps, "y": training["loss"], "line": {"width": 1}}
    ]
    if training.get("valid"):
        at, losses = zip(*training["valid"], strict=True)
        traces.append({"type": "scatter", "mode": "lines+markers", "name": "held out", "x": at, "y": losses})
    traces.append(
        {
            "type": "scatter", "mode": "lines", "name": "parameters", "x": steps, "y": training["sizes"],
            "yaxis": "y2", "line": {"dash": "dot", "shape": "hv"},
        }
    )  # fmt: skip
    layout = {
        "height": 360,
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": "loss"}},
        "yaxis2": {"title": {"text": "parameters"}, "overlaying": "y", "side": "right", "rangemode": "tozero"},
        "legend": {"orientation": "h", "y": 1.15},
    }
    return {"title": "Loss and size", "traces": traces, "layout": layout}


def _heatmap(
    title: str, steps: list[int], names: list[str], values: list[list[Any]], words: list[list[str]],
    limits: tuple[float, float] | None,
) -> dict[str, Any]:  # fmt: skip
    trace: dict[str, Any] = {
        "type": "heatmap", "x": [str(step) for step in steps], "y": names, "z": values, "text": words,
        "hovertemplate": "%{y}<br>step %{x}: %{text}<extra></extra>", "colorscale": "Viridis",
        "colorbar": {"thickness": 12},
    }  # fmt: skip
    if limits is not None:
        trace |= {"zmin": limits[0], "zmax": limits[1]}
    layout = {
        "height": max(260, 110 + ROW * len(names)),
        "xaxis": {"type": "category", "title": {"text": "step"}},
        "yaxis": {"automargin": True, "autorange": "reversed"},
    }
    return {"title": title, "traces": [trace], "layout": layout}
