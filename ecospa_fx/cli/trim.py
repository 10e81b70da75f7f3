"""ecospa-fx trim-vocabulary: a directory of transformers without the tokens that nobody uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

import ecospa_fx

from . import options as o
from .console import FAILED, CommandError, at_work, check_directory, show, show_json

EPILOG = """\
\b
Examples:
  ecospa-fx trim-vocabulary llama/ --texts corpus.txt --size 16000 --out small
  ecospa-fx trim-vocabulary bert/ --texts corpus.txt --out small

The text should be what the model is for: tokens that it does not hold may go. Plain transformers loads the result.
"""


def trim_vocabulary(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a model and its tokenizer, of transformers")],
    texts: Annotated[Path, typer.Option(metavar="FILE", help="text whose tokens stay, line by line")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="directory for the smaller model")],
    size: Annotated[int | None, typer.Option(min=1, help="how many tokens stay; by default all of the text")] = None,
    as_json: o.Json = False,
) -> None:
    """Remove tokens from a model and its tokenizer.

    Both are of transformers, and both are saved.
    """
    from .models import pretrained_model, tokenizer_of

    check_directory(out)
    if not texts.is_file():
        raise CommandError(f"--texts {texts}: no such file")
    with at_work(f"trimming {directory}"):
        model, tokenizer = pretrained_model(directory), tokenizer_of(str(directory))
        trimmed = ecospa_fx.trim_vocabulary(model, tokenizer, texts=_lines(texts), size=size)
        try:
            model.save_pretrained(out)
            trimmed.tokenizer.save_pretrained(out)
        except OSError as error:
            raise CommandError(f"{out} cannot be written: {error.strerror or error}", FAILED) from None
    if as_json:
        show_json(
            {
                "tokens": len(trimmed.kept), "original_tokens": trimmed.rows,
                "parameters": trimmed.change.parameters_after,
                "original_parameters": trimmed.change.parameters_before,
                "notes": list(trimmed.notes), "out": str(out),
            }
        )  # fmt: skip
    else:
        show(str(trimmed), f"saved to {out}; AutoModel and AutoTokenizer of transformers read it")


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from file


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("trim-vocabulary", epilog=EPILOG)(trim_vocabulary)
