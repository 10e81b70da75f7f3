"""ecospa-fx verify: the numeric proof that removal equals masking."""

from __future__ import annotations

import json

import typer
from rich.table import Table
from rich.text import Text

import ecospa_fx

from . import options as o
from .console import FAILED, CommandError, at_work, check_file, show, show_json, write

EPILOG = """\
\b
Examples:
  ecospa-fx verify hf/llama
  ecospa-fx verify timm/vit_tiny_patch16_224
  ecospa-fx verify my_model.py:make --json

Exit code 1 if any coupling differs from masking.
"""


def verify(
    model: o.Model,
    regions: o.Regions = "auto",
    fields: o.Set = None,
    inputs: o.Inputs = None,
    factory: o.Factory = None,
    as_json: o.Json = False,
    out: o.OutFile = None,
) -> None:
    """Check that removal equals masking.

    Half of each coupling is removed, and outputs and gradients are compared.
    """
    from ecospa_fx.model.compiled import MODEL

    from .models import named_model

    if out is not None:
        check_file(out)
    with at_work(f"verifying {model}"):
        named = named_model(model, fields=fields, inputs=inputs, factory=factory)
        if MODEL not in named.model.__dict__:
            ecospa_fx.compile(named.model, **named.call, regions=o.regions_of(regions))
        result = ecospa_fx.verify(named.model, **named.call)
    document = {
        "ok": result.ok,
        "comparisons": [
            {
                "name": name, "removed": c.removed, "output_error": c.output_error, "gradient_error": c.gradient_error,
                "tolerance": c.tolerance, "ok": c.ok,
            }
            for name, c in result.by_coupling.items()
        ],
    }  # fmt: skip
    table = Table(box=None, pad_edge=False)
    table.add_column("coupling", overflow="fold")
    for column in ("removed", "output", "gradient"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for name, c in result.by_coupling.items():
        verdict = Text("exact", style="green") if c.ok else Text("DIFFERS", style="bold red")
        table.add_row(Text(name), str(c.removed), f"{c.output_error:.1e}", f"{c.gradient_error:.1e}", verdict)
    if out is not None:
        write(out, json.dumps(document, indent=1) + "\n")
    if as_json:
        show_json(document)
    else:
        show(table, "", str(result))
    if not result.ok:
        raise CommandError("some couplings differ from masking; please report this model", FAILED)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(verify)
