"""Widths of every layer over time, as one picture: a panel per kind of coupling, a line per layer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ecospa_fx.errors import EcoSpaError

from .training import widths_of

COLUMNS = 3


def save_widths(training: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the width of each layer at each step.

    Args:
        training: the result of `training_of` or `Watch.report`.
        path: the picture to write; its suffix is a format of matplotlib: png, svg, pdf.

    Raises:
        EcoSpaError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EcoSpaError("save_widths needs matplotlib: pip install matplotlib") from None
    steps, widths = widths_of(training)
    last = max(len(training["loss"]), steps[-1])
    kinds: dict[str, list[str]] = {}
    for name in widths:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    rows = max(1, -(-len(kinds) // COLUMNS))
    figure = Figure(figsize=(3.4 * min(COLUMNS, max(1, len(kinds))), 2.6 * rows + 0.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory, without a display
    panels = figure.subplots(rows, min(COLUMNS, max(1, len(kinds))), squeeze=False, sharex=True).flat
    colours = colormaps["viridis"]
    for (kind, names), panel in zip(kinds.items(), panels, strict=False):
        for number, name in enumerate(names):
            colour = colours(number / max(1, len(names) - 1))
            panel.step([*steps, last], [*widths[name], widths[name][-1]], where="post", color=colour, linewidth=1.2)
        panel.set_title(f"{kind}, {len(names)} layers" if len(names) > 1 else names[0], fontsize=9)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels:  # the panels without a kind
        panel.set_visible(False)
    figure.suptitle("entries of each coupling over training steps; first layers dark, last ones light", fontsize=9)
    figure.savefig(os.fspath(path))
