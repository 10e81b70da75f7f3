"""ecospa-fx report: the findings as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import ecospa_fx

from . import options as o
from .compare import read_training
from .console import at_work, check_file, show, show_json

EPILOG = """\
\b
Examples:
  ecospa-fx report hf/llama --out llama.html
  ecospa-fx report hf/llama --full --out llama.html
  ecospa-fx report runs/mine/model --training runs/mine/training.json
"""


def report(
    model: o.Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="the file")] = Path("report.html"),
    training: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="training.json of `ecospa-fx train`, for curves"),
    ] = None,
    regions: o.Regions = "auto",
    full: o.Full = False,
    fields: o.Set = None,
    inputs: o.Inputs = None,
    factory: o.Factory = None,
    as_json: o.Json = False,
) -> None:
    """Write the findings as one HTML file.

    It needs no network and no server.
    """
    from .models import named_model

    check_file(out)
    curves = read_training(training) if training is not None else None
    with at_work(f"looking at {model}"):
        named = named_model(model, full=full, fields=fields, inputs=inputs, factory=factory)
        explanation = ecospa_fx.explain(named.model, **named.call, regions=o.regions_of(regions))
        explanation.report(out, training=curves)
    size = out.stat().st_size
    if as_json:
        show_json({"out": str(out), "bytes": size, "couplings": len(explanation.couplings)})
    else:
        show(f"{out}: {len(explanation.couplings)} couplings, {size / 1e6:.1f} MB; open it in a browser")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(report)
