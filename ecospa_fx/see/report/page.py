"""Page: template, style, script and findings in one HTML file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ecospa_fx.arguments import check_state
from ecospa_fx.errors import EcoSpaError
from ecospa_fx.see.findings import Findings
from ecospa_fx.train.sensitivities import Sensitivity

from .document import document_of
from .latency import KEYS as LATENCY
from .latency import words_of
from .training import figures_of

KEYS = ("loss", "valid", "sizes", "history", "original", "forecast")
"""Keys of a training run."""


def write_report(
    findings: Findings,
    path: str | os.PathLike[str],
    training: Mapping[str, Any] | None = None,
    sensitivity: Sensitivity | None = None,
    latency: Mapping[str, Any] | None = None,
) -> None:
    """Write the report of findings. With a training run it includes plotly.js, which is 4.8 MB.

    Raises:
        EcoSpaError: jinja2 is not installed, or plotly is not and there are curves to draw.
    """
    if training is not None:
        check_state(training, KEYS, "report", "training", "ecospa_fx.report.training_of(trainer, losses)")
        latency = latency or training.get("latency")
    if latency is not None:
        check_state(latency, LATENCY, "report", "latency", "ecospa_fx.report.latency_of(before, after, (x,))")
    document = document_of(findings)
    document["latency"] = None if latency is None else words_of(latency)
    if training is not None:
        document["figures"] = figures_of(training)
    page = page_of(
        "page.html.j2", document, ("figures.js", "graph.js", "report.js"), title=document["title"],
        curves=training is not None, sensitivity=None if sensitivity is None else _measured(sensitivity),
    )  # fmt: skip
    write_page(page, path)


def page_of(template: str, document: Any, scripts: Sequence[str], *, curves: bool, **values: Any) -> str:
    """Fill a template with a document, the style, scripts and, for curves, plotly.js.

    Raises:
        EcoSpaError: jinja2 is not installed, or plotly is not and there are curves to draw.
    """
    try:
        import jinja2
    except ModuleNotFoundError:
        raise EcoSpaError("a report needs jinja2: pip install 'ecospa-fx[report]'") from None
    here = files(__package__)

    def read(name: str) -> str:
        return (here / name).read_text(encoding="utf-8")

    # Undefined names are mistakes, and everything that comes from a model is escaped.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(read(template)).render(
        style=read("report.css"), script="\n".join(map(read, scripts)), document=_inside_script(document),
        plotly=_plotly() if curves else "", curves=curves, **values,
    )  # fmt: skip


def write_page(page: str, path: str | os.PathLike[str]) -> None:
    """Write a page to a file.

    Raises:
        EcoSpaError: it cannot be written.
    """
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise EcoSpaError(f"the report cannot be written to {str(path)!r}: {error.strerror or error}") from error


def _measured(table: Sensitivity) -> dict[str, Any]:
    """Collect the table of a sensitivity: text of each cell, and how dark it is."""
    largest = max((row.rise for row in table.measured), default=0.0)

    def cell(rise: float | None) -> dict[str, Any]:
        if rise is None:
            return {"text": "", "heat": 0}
        return {"text": f"{rise:+.3g}", "heat": round(70 * max(0.0, rise) / largest) if largest > 0 else 0}

    rows = [
        {"name": name, "part": f"{table.part(*key):.2%} of all", "cells": [cell(rise) for rise in rises]}
        for (name, rises), key in zip(table.rows(), table.groups, strict=True)
    ]
    return {"headline": table.headline, "shares": [f"-{share:.0%}" for share in table.shares], "rows": rows}


def _inside_script(document: Any) -> str:
    """Format as JSON inside a script element, which no string in it can end."""
    text = json.dumps(document, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        raise EcoSpaError("curves in a report need plotly: pip install 'ecospa-fx[report]'") from None
    script: str = get_plotlyjs()
    return script
