"""Comparison: several training runs side by side, as a table, as plain values and as one HTML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ecospa_fx.arguments import NAMED, PATH, check_state, takes
from ecospa_fx.errors import ArgumentError
from ecospa_fx.text import plain

from .page import KEYS, page_of, write_page
from .training import widths_figure, widths_of

LAST = 10
"""Steps whose mean is the loss at the end."""


@dataclass(frozen=True)
class SideBySide:
    """Training runs side by side; `print` shows a table.

    Attributes:
        names: of the runs.
        rows: what is compared -> a value per run, None where it was not recorded.
        differ: settings in which the runs differ -> a value per run.
        runs: the results of `training_of`, by name.
    """

    names: tuple[str, ...]
    rows: Mapping[str, tuple[float | None, ...]]
    differ: Mapping[str, tuple[Any, ...]]
    runs: Mapping[str, Mapping[str, Any]]

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        for name in self.names:
            table.add_column(name, justify="right", overflow="fold")
        for cells in self.cells():
            table.add_row(*cells)
        return table

    def __str__(self) -> str:
        return plain(self.__rich__())

    def cells(self) -> list[tuple[str, ...]]:
        """Return the rows as text: the name of a row, then a cell per run."""
        rows = [(name, *(_shown(name, value) for value in values)) for name, values in self.rows.items()]
        return rows + [
            (name, *("-" if value is None else str(value) for value in values)) for name, values in self.differ.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values."""
        return {"names": list(self.names), "rows": _lists(self.rows), "settings": _lists(self.differ)}

    @takes(path=PATH)
    def report(self, path: str | os.PathLike[str]) -> None:
        """Write table and curves as one HTML file, which opens from disk and needs no network. It has 4.8 MB.

        Raises:
            EcoSpaError: jinja2 or plotly is not installed, or the file cannot be written.
        """
        title = " and ".join(self.names) if len(self.names) == 2 else f"{len(self.names)} runs"
        document = {"figures": figures_of(self.runs)}
        page = page_of(
            "compare.html.j2", document, ("figures.js", "compare.js"), title=title, names=self.names,
            cells=self.cells(), curves=True,
        )  # fmt: skip
        write_page(page, path)


@takes(runs=NAMED)
def compare_runs(runs: Mapping[str, Mapping[str, Any]]) -> SideBySide:
    """Put training runs side by side.

    >>> print(ecospa_fx.report.compare_runs({"paper": training, "adaptive": other}))

    Args:
        runs: name -> the result of `training_of`, or the content of a `training.json`.

    Raises:
        ArgumentError: there are fewer than two, or one is nothing of that kind.
    """
    if len(runs) < 2:
        raise ArgumentError(f"compare_runs: `runs` has {len(runs)} of the two or more runs that are compared")
    for name, run in runs.items():
        check_state(run, KEYS, "compare_runs", f"runs[{name!r}]", "ecospa_fx.report.training_of(trainer, losses)")
    settings = [run.get("settings") or {} for run in runs.values()]
    names = dict.fromkeys(name for each in settings for name in each)
    differ = {name: tuple(each.get(name) for each in settings) for name in names}
    facts = [_facts(run) for run in runs.values()]
    labels = dict.fromkeys(label for each in facts for label in each)
    return SideBySide(
        names=tuple(runs),
        rows={label: tuple(each.get(label) for each in facts) for label in labels},
        differ={name: values for name, values in differ.items() if any(value != values[0] for value in values)}
        if all(settings)  # else they are not known of all
        else {},
        runs=runs,
    )


def _facts(run: Mapping[str, Any]) -> dict[str, float | None]:
    """Collect the numbers of a run, in the order in which people read them."""
    sizes = [size for size in run["sizes"] if size is not None]
    losses, valid = run["loss"][-LAST:], [loss for _, loss in run.get("valid") or ()]
    latency = run.get("latency") or {}
    whole = run.get("parameters") or (sizes[0] if sizes else None)
    _, widths = widths_of(run)
    kinds: dict[str, list[str]] = {}
    for name in widths:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    return {
        "steps": len(run["loss"]),
        "shrinks": len(run["history"]),
        "parameters at first": whole,
        "parameters": sizes[-1] if sizes else None,
        "share left": sizes[-1] / whole if whole else None,
        f"loss, mean of the last {LAST}": sum(losses) / len(losses) if losses else None,
        "held-out loss": valid[-1] if valid else None,
        "lowest held-out loss": min(valid, default=None),
        "forward before, ms": 1e3 * latency["before"] if latency else None,
        "forward, ms": 1e3 * latency["after"] if latency else None,
        **{
            f"{kind}, share of entries left": _total(widths, names, -1) / _total(widths, names, 0)
            for kind, names in kinds.items()
        },
    }


def _total(widths: Mapping[str, Sequence[int]], names: Sequence[str], at: int) -> int:
    return sum(widths[name][at] for name in names)


def _lists(rows: Mapping[str, tuple[Any, ...]]) -> dict[str, list[Any]]:
    return {name: list(values) for name, values in rows.items()}


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if "share" in name:
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def figures_of(runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Build the figures for plotly.js: the losses of all runs in one, their sizes in one, and widths of each."""
    losses, held, sizes = [], [], []
    for number, (name, run) in enumerate(runs.items()):
        line = {"color": COLOURS[number % len(COLOURS)]}
        steps = list(range(1, len(run["loss"]) + 1))
        losses.append(_line(name, steps, run["loss"], {**line, "width": 1}))
        if run.get("valid"):
            at, values = zip(*run["valid"], strict=True)
            held.append(_line(name, at, values, line))
        sizes.append(_line(name, steps, run["sizes"], {**line, "shape": "hv"}))
    figures = [_figure("Loss", "loss", losses)]
    if held:
        figures.append(_figure("Held-out loss", "loss", held))
    figures.append(_figure("Size", "parameters", sizes, rangemode="tozero"))
    for name, run in runs.items():
        figure = widths_figure(run)
        figures.append({**figure, "title": f"{name}: {figure['title'][0].lower()}{figure['title'][1:]}"})
    return figures


COLOURS = ("#4269d0", "#e08b2d", "#2a9d8f", "#c26fb0", "#7a8b3c", "#b8475a")


def _line(name: str, x: Sequence[int], y: Sequence[Any], line: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines", "name": name, "x": list(x), "y": list(y), "line": dict(line)}


def _figure(title: str, label: str, traces: list[dict[str, Any]], **axis: Any) -> dict[str, Any]:
    layout = {
        "height": 320, "xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": label}, **axis},
        "legend": {"orientation": "h", "y": 1.15}, "showlegend": True,
    }  # fmt: skip
    return {"title": title, "traces": traces, "layout": layout}
