"""ecospa-fx explain: the couplings of a model, the refusals, and the reasons."""

from __future__ import annotations

from typing import Annotated

import typer

import ecospa_fx
from ecospa_fx.model.execution import Execution

from . import options as o
from .console import CommandError, at_work, check_file, show, show_json, write

EPILOG = """\
\b
Examples:
  ecospa-fx explain hf/llama
  ecospa-fx explain timm/vit_tiny_patch16_224 --savings
  ecospa-fx explain hf/gpt2 --execution module
  ecospa-fx explain hf/qwen3 --why-not layers.1.self_attn.q_proj
  ecospa-fx explain hf/llama \\
      --why layers.0.self_attn.q_proj,layers.0.self_attn.k_proj
  ecospa-fx explain my_model.py:make --input 2x16:long --json
"""


def explain(
    model: o.Model,
    why: Annotated[str | None, typer.Option(metavar="A,B", help="how two weights are coupled, op by op")] = None,
    why_not: Annotated[str | None, typer.Option(metavar="NAME", help="what keeps a weight from shrinking")] = None,
    savings: Annotated[
        bool, typer.Option("--savings", help="the parameters, bytes and FLOPs that each coupling can save")
    ] = False,
    summary: Annotated[bool, typer.Option("--summary", help="the model layer by layer")] = False,
    regions: o.Regions = "auto",
    execution: Annotated[Execution, typer.Option(help="for graphs, or for the model's own Python")] = "graph",
    full: o.Full = False,
    fields: o.Set = None,
    inputs: o.Inputs = None,
    factory: o.Factory = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print Markdown")] = False,
    as_json: o.Json = False,
    out: o.OutFile = None,
) -> None:
    """Say what can shrink in a model, what cannot, and why. Changes nothing."""
    from .models import named_model

    if out is not None:
        check_file(out)
    if why is not None and why.count(",") != 1:
        raise CommandError(f"--why {why}: give two names of weights, separated by a comma: --why q_proj,k_proj")
    with at_work(f"looking at {model}"):
        named = named_model(model, full=full, fields=fields, inputs=inputs, factory=factory)
        explanation = ecospa_fx.explain(named.model, **named.call, regions=o.regions_of(regions), execution=execution)
    if out is not None:
        write(out, explanation.to_json() if as_json else explanation.to_markdown() if markdown else f"{explanation}\n")
    elif why is not None:
        answer = explanation.why(*(name.strip() for name in why.split(",")))
        if as_json:
            show_json({name: list(path.sentences()) for name, path in answer.paths.items()})
        else:
            show(str(answer))
    elif why_not is not None:
        reasons = explanation.why_not(why_not)
        show_json({"name": reasons.name, "sentences": list(reasons.sentences)}) if as_json else show(str(reasons))
    elif savings:
        show_json(explanation.savings().to_json()) if as_json else show(str(explanation.savings()))
    elif summary:
        show(ecospa_fx.summary(named.model))
    elif as_json:
        show_json(explanation.to_json())
    elif markdown:
        show_json(explanation.to_markdown())
    else:
        show(explanation)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(explain)
