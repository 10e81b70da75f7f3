"""ecospa-fx shrink: a model at a target size in one step, by the magnitude of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

import ecospa_fx
from ecospa_fx.model.execution import Execution

from . import options as o
from .console import FAILED, CommandError, at_work, check_directory, show, show_json

if TYPE_CHECKING:
    from ecospa_fx.couple.constraints import Uniform
    from ecospa_fx.train.deployable import Deployable

EPILOG = """\
\b
Examples:
  ecospa-fx shrink runs/mine/model --target 0.5 --out smaller
  ecospa-fx shrink hf/llama --target 0.7 --out smaller
  ecospa-fx shrink hf/llama --target 0.7 --deployable transformers \\
      --multiple-of heads=2 --out smaller
  ecospa-fx shrink hf/llama --target glu=0.5,heads=0.75 --out smaller
  ecospa-fx shrink saved --factory my_model.py:make --target 0.5 --out smaller

Without data, the magnitude of the weights is the only score: train afterwards, or use `ecospa-fx train`.
"""


def shrink(
    model: o.Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="directory for the smaller model")],
    target: o.Target = "0.5",
    min_keep: Annotated[int, typer.Option(help="entries that every coupling keeps")] = 1,
    round_to: Annotated[int, typer.Option(help="widths are multiples of this")] = 1,
    uniform: o.Uniform = None,
    multiple_of: o.MultipleOf = None,
    deployable: o.Deploy = None,
    regions: o.Regions = "auto",
    fields: o.Set = None,
    inputs: o.Inputs = None,
    factory: o.Factory = None,
    as_json: o.Json = False,
) -> None:
    """Shrink a model in one step, without data.

    The weakest rows and columns go first, until a share of the parameters is left; it is saved where `--out` says.
    """
    from ecospa_fx.model.compiled import MODEL
    from ecospa_fx.train.deployable import check_deployable, deployment

    from .models import named_model, remember_source, write_pretrained

    check_directory(out)
    # Both are checked where they are used.
    blocks, purpose = cast("Uniform | None", uniform), cast("Deployable | None", deployable)
    constraints = ecospa_fx.Constraints(min_keep, round_to, uniform=blocks, multiple_of=o.multiples_of(multiple_of))
    with at_work(f"shrinking {model}"):
        named = named_model(model, fields=fields, inputs=inputs, factory=factory)
        if MODEL not in named.model.__dict__:
            execution: Execution = "graph" if deployable is None else "module"
            ecospa_fx.compile(named.model, **named.call, regions=o.regions_of(regions), execution=execution)
        elif not named.model.__dict__[MODEL].captured:
            ecospa_fx.explain(named.model, **named.call)  # a loaded model is captured at its first call
        if purpose is not None:
            check_deployable(named.model, purpose)
            constraints = deployment(named.model, purpose, constraints).constraints
        sparsifier = ecospa_fx.CoupledSparsifier(named.model, target=o.target_of(target), constraints=constraints)
        estimator = ecospa_fx.CoupledEstimator(named.model, "magnitude")
        while not sparsifier.reached():
            keeps = sparsifier.decide(estimator.importance(), sparsifier.target_size(sparsifier.sizes()))
            if not keeps:
                break
            ecospa_fx.shrink(named.model, keeps)
        try:
            ecospa_fx.save(named.model, out)
            remember_source(out, model, fields)
            if deployable is not None:
                write_pretrained(named.model, out)
        except OSError as error:
            raise CommandError(f"{out} cannot be written: {error.strerror or error}", FAILED) from None
    change = ecospa_fx.diff(named.model)
    if as_json:
        show_json(
            {
                "parameters": change.parameters_after,
                "original_parameters": change.parameters_before,
                "layers": {n: [list(s), list(change.after[n])] for n, s in change.before.items()},
                "out": str(out),
            }
        )
    else:
        show(change, "", f"saved to {out}; ecospa_fx.load reads it")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(shrink)
