"""ecospa-fx graph: the coupling graph as DOT, SVG, Mermaid, GraphML or JSON."""

from __future__ import annotations

from typing import Annotated

import typer

import ecospa_fx
from ecospa_fx.see.drawings import Format, Level

from . import options as o
from .console import at_work, check_file, show_json, write

EPILOG = """\
\b
Examples:
  ecospa-fx graph hf/llama --out llama.svg --format svg
  ecospa-fx graph hf/llama --format mermaid
  ecospa-fx graph hf/llama --level full --format graphml --out llama.graphml
"""


def graph(
    model: o.Model,
    level: Annotated[Level, typer.Option(help="equal blocks as one, each coupling, or each axis")] = "blocks",
    form: Annotated[Format, typer.Option("--format", "-f", help="svg needs graphviz")] = "dot",
    regions: o.Regions = "auto",
    full: o.Full = False,
    fields: o.Set = None,
    inputs: o.Inputs = None,
    factory: o.Factory = None,
    as_json: o.Json = False,
    out: o.OutFile = None,
) -> None:
    """Draw which weights are coupled."""
    from ecospa_fx.see import graphs

    from .models import named_model

    if out is not None:
        check_file(out)
    graphs.check_format(form)
    with at_work(f"looking at {model}"):
        named = named_model(model, full=full, fields=fields, inputs=inputs, factory=factory)
        explanation = ecospa_fx.explain(named.model, **named.call, regions=o.regions_of(regions))
        text = graphs.WRITERS["json" if as_json else form](graphs.LEVELS[level](explanation))
    if out is None:
        show_json(text)
    else:
        write(out, text)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(graph)
