"""ecospa-fx compress: a trained model at a target size, with a text or batches of the data that it is for."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import ecospa_fx

from . import options as o
from .console import FAILED, CommandError, at_work, check_directory, show, show_json

if TYPE_CHECKING:
    from ecospa_fx.couple.constraints import Uniform
    from ecospa_fx.train.deployable import Deployable

    from .models import Named

EPILOG = """\
\b
Examples:
  ecospa-fx compress llama/ --text calibration.txt --target 0.7 --out small
  ecospa-fx compress llama/model.Q4_1.gguf --text calibration.txt \\
      --kinds glu --out small
  ecospa-fx compress my_model.py:make --batches my_model.py:batches \\
      --out small

Nothing is trained. Tens of thousands of tokens of the text that the model is for are a good number.
"""


def compress(
    model: o.Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="directory for the smaller model")],
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="text that the model is for")] = None,
    batches: Annotated[
        str | None, typer.Option(metavar="FILE.PY:NAME", help="function that returns calls of the model")
    ] = None,
    target: o.Target = "0.7",
    tokens: Annotated[int, typer.Option(min=1, help="tokens of the text to look at, at most")] = 16384,
    context: Annotated[int, typer.Option(min=2, help="tokens per call")] = 512,
    kinds: Annotated[str | None, typer.Option(metavar="KINDS", help="kinds that may shrink: glu,vo")] = None,
    steps: Annotated[int, typer.Option(min=1, help="strokes, each with fresh statistics")] = 1,
    prunable: Annotated[bool, typer.Option("--prunable", help="the share is of what can shrink, not of all")] = False,
    uniform: o.Uniform = None,
    deployable: o.Deploy = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="also write pretrained/ for transformers")] = False,
    fields: o.Set = None,
    factory: o.Factory = None,
    as_json: o.Json = False,
) -> None:
    """Make a trained model smaller without training.

    It is saved where `--out` says.
    """
    from .models import gguf_model, named_model, remember_source, write_pretrained

    check_directory(out)
    if (text is None) == (batches is None):
        raise CommandError("pass either --text FILE or --batches FILE.PY:NAME, the data that the model is for")
    with at_work(f"compressing {model}"):
        path = Path(model)
        named = gguf_model(path) if path.suffix == ".gguf" else named_model(model, fields=fields, factory=factory)
        calls = _windows(model, named, text, tokens, context) if text is not None else _made(str(batches))
        report = ecospa_fx.compress(
            named.model, calls, o.target_of(target), among="prunable" if prunable else "all",
            kinds=None if kinds is None else [kind.strip() for kind in kinds.split(",")],
            uniform=cast("Uniform | None", uniform), deployable=cast("Deployable | None", deployable), steps=steps,
        )  # fmt: skip
        try:
            ecospa_fx.save(named.model, out)
            remember_source(out, model, fields)
            if pretrained or deployable is not None:
                write_pretrained(named.model, out)
        except OSError as error:
            raise CommandError(f"{out} cannot be written: {error.strerror or error}", FAILED) from None
    if as_json:
        show_json(
            {
                "parameters": report.parameters[1], "original_parameters": report.parameters[0],
                "loss": report.loss[1], "original_loss": report.loss[0],
                "widths": {name: list(sizes) for name, sizes in report.removed.items()},
                "seconds": report.seconds, "notes": list(report.notes), "out": str(out),
            }
        )  # fmt: skip
    else:
        plain = f", and plain transformers {out / 'pretrained'}" if pretrained or deployable is not None else ""
        show(str(report), f"saved to {out}; ecospa_fx.load reads it{plain}")


def _windows(name: str, named: Named, text: Path, tokens: int, context: int) -> Iterable[dict[str, Any]]:
    """Cut a text into calls of a language model."""
    import torch

    from .models import tokenizer_of

    if not text.is_file():
        raise CommandError(f"--text {text}: no such file")
    try:
        words = text.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CommandError(f"--text {text} cannot be read: {error.strerror or error}") from None
    ids = torch.tensor(tokenizer_of(name)(words, add_special_tokens=False)["input_ids"], dtype=torch.long)[:tokens]
    count = len(ids) // context
    if count == 0:
        raise CommandError(f"--text {text} holds {len(ids)} tokens; --context {context} needs as many at least")
    others = {key: value for key, value in (named.kwargs or {}).items() if not isinstance(value, torch.Tensor)}
    return [{**others, "input_ids": row[None]} for row in ids[: count * context].view(count, context)]


def _made(name: str) -> Iterable[Any]:
    """Make batches by a function in a file."""
    from .models import imported_name

    function = imported_name(name)
    try:
        return list(islice(iter(function()), 4096))
    except Exception as error:  # it is the user's code
        line = (str(error).strip().splitlines() or [""])[0]
        raise CommandError(f"--batches {name} failed with {type(error).__name__}: {line:.200}", FAILED) from error


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(compress)
