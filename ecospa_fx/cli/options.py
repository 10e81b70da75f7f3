"""Options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import CommandError

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="hf/TYPE, timm/NAME, a directory, or file.py:factory", show_default=False),
]
Full = Annotated[
    bool, typer.Option("--full", help="the type's default configuration, on the meta device: no memory, no values")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="a field of the configuration, or an argument of the factory"),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="SHAPE", help="an input of file.py:factory: 2x16:long or 1x3x32x32, repeatable"),
]
Factory = Annotated[
    str | None, typer.Option("--factory", metavar="FILE.PY:NAME", help="makes the original of a saved model")
]
Regions = Annotated[str, typer.Option(metavar="HOW", help="auto, blocks, joined, root, or submodule names with commas")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Uniform = Annotated[str | None, typer.Option(metavar="layers", help="repeated blocks keep the same sizes")]
MultipleOf = Annotated[
    list[str] | None,
    typer.Option(metavar="KIND=N", help="widths of a kind are multiples: heads=2, glu=256; repeatable"),
]
Deploy = Annotated[
    str | None,
    typer.Option("--deployable", metavar="transformers", help="only sizes that plain transformers loads (pretrained/)"),
]
OutFile = Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="write to a file")]


Target = Annotated[
    str, typer.Option(metavar="SHARE", help="share of the parameters that remains, or of kinds: ffn=0.5,heads=0.75")
]


def target_of(text: str) -> float | dict[str, float]:
    """Parse `--target`.

    Raises:
        CommandError: a text is neither a number nor kinds with numbers.
    """
    try:
        if "=" not in text:
            return float(text)
        pairs = [pair.rpartition("=") for pair in text.split(",")]
        return {key.strip(): float(share) for key, _, share in pairs}
    except ValueError:
        raise CommandError(f"--target {text} is neither a share nor kinds with shares, ffn=0.5,heads=0.75") from None


def multiples_of(texts: list[str] | None) -> dict[str, int]:
    """Parse `--multiple-of`.

    Raises:
        CommandError: a text is not a kind and a number.
    """
    multiples = {}
    for text in texts or []:
        kind, _, number = text.partition("=")
        if not number.isdecimal():
            raise CommandError(f"--multiple-of {text} is not a kind and a number, heads=2")
        multiples[kind] = int(number)
    return multiples


def regions_of(text: str) -> str | list[str]:
    """Parse `--regions`: a mode, or submodule names with commas."""
    return text if text in ("auto", "blocks", "joined", "root") else [name.strip() for name in text.split(",")]
