"""ecospa-fx compare: training runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .console import CommandError, check_file, show, show_json

TRAINING = "training.json"
EPILOG = """\
\b
Examples:
  ecospa-fx compare runs/paper runs/adaptive
  ecospa-fx compare runs/paper runs/adaptive --out compared.html
"""


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="a directory of `ecospa-fx train`, or a training.json", show_default=False),
    ],
    as_json: o.Json = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="also write table and curves as HTML")
    ] = None,
) -> None:
    """Put two or more training runs side by side.

    Settings are listed where they differ.
    """
    from ecospa_fx.see.report.compare import compare_runs

    if out is not None:
        check_file(out)
    if len(runs) < 2:
        raise CommandError("name two or more runs: ecospa-fx compare runs/one runs/other")
    if len({run.resolve() for run in runs}) < len(runs):
        raise CommandError("a run is named twice")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    compared = compare_runs(dict(zip(names, map(read_training, runs), strict=True)))
    if out is not None:
        compared.report(out)
    if as_json:
        show_json(compared.to_json())
    else:
        show(compared)
        if out is not None:
            show("", f"{out}: table and curves; open it in a browser")


def read_training(path: Path) -> dict[str, Any]:
    """Read what `ecospa-fx train` wrote of a run.

    Raises:
        CommandError: it is not there, or something else.
    """
    file = path / TRAINING if path.is_dir() else path
    try:
        document = json.loads(file.read_text())
        if missing := [key for key in ("loss", "history", "sizes") if key not in document]:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except OSError as error:
        raise CommandError(f"{file} cannot be read as training.json: {error.strerror or error}") from None
    except (ValueError, TypeError) as error:
        raise CommandError(f"{file} cannot be read as training.json: {error}") from None
    result: dict[str, Any] = document
    return result


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(compare)
