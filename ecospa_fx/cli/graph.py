"""ecospa-fx graph: the coupling graph as DOT, SVG, Mermaid, GraphML or JSON."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

import ecospa_fx
from ecospa_fx.see import graphs

from . import options as o
from .console import at_work, check_file, show_json, write
from .models import named_model

EPILOG = """\
\b
Examples:
  ecospa-fx graph hf/llama --out llama.svg --format svg
  ecospa-fx graph hf/llama --format mermaid
  ecospa-fx graph hf/llama --level full --format graphml --out llama.graphml
"""


class Level(StrEnum):
    """How much of it."""

    blocks = "blocks"
    couplings = "couplings"
    full = "full"


class Format(StrEnum):
    """How it is written."""

    dot = "dot"
    svg = "svg"
    mermaid = "mermaid"
    graphml = "graphml"
    json = "json"


def graph(
    model: o.Model,
    level: Annotated[Level, typer.Option(help="equal blocks as one, each coupling, or each axis")] = Level.blocks,
    form: Annotated[Format, typer.Option("--format", "-f", help="svg needs graphviz")] = Format.dot,
    regions: o.Regions = "auto",
    full: o.Full = False,
    fields: o.Set = None,
    inputs: o.Inputs = None,
    factory: o.Factory = None,
    as_json: o.Json = False,
    out: o.OutFile = None,
) -> None:
    """Draw which weights are coupled."""
    if out is not None:
        check_file(out)
    if form is Format.svg:
        graphs.graphviz()  # before the work, not after it
    with at_work(f"looking at {model}"):
        named = named_model(model, full=full, fields=fields, inputs=inputs, factory=factory)
        explanation = ecospa_fx.explain(named.model, **named.call, regions=o.regions_of(regions))
        drawn = {
            Level.blocks: graphs.block_graph,
            Level.couplings: graphs.coupling_graph,
            Level.full: graphs.full_graph,
        }[level](explanation)
        writer = graphs.WRITERS["json" if as_json else form.value]
        text = writer(drawn)
    if out is None:
        show_json(text)
    else:
        write(out, text)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(graph)
