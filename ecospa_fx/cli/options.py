"""Options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
OutFile = Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="write to a file")]


def regions_of(text: str) -> str | list[str]:
    """Parse `--regions`: a mode, or submodule names with commas."""
    return text if text in ("auto", "blocks", "joined", "root") else [name.strip() for name in text.split(",")]
