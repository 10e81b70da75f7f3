"""Console: output, errors, progress displays and checks of paths, shared by all commands."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ecospa_fx.text import Hanging

FAILED, WRONG, INTERRUPTED = 1, 2, 130


class CommandError(Exception):
    """An error that ends a command; its text is the one line that people see."""

    def __init__(self, message: str, code: int = WRONG) -> None:
        super().__init__(message)
        self.code = code


def complain(command: str, error: object, code: int) -> int:
    """Print an error as one line and return the exit code."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    word = "" if code == INTERRUPTED else "error: "
    print(f"{command}: {word}{' '.join(line.strip() for line in lines)}", file=sys.stderr)
    return code


def show(*renderables: Any) -> None:
    """Print for people: in colour and at full width on a terminal, plain elsewhere."""
    console = Console(highlight=False, soft_wrap=False)
    for each in renderables:
        console.print(Hanging(each) if isinstance(each, str) else each, markup=False)


def show_json(document: Any) -> None:
    """Print for programs."""
    print(document if isinstance(document, str) else json.dumps(document, indent=1))


@contextmanager
def at_work(task: str) -> Iterator[None]:
    """Show a spinner with the elapsed seconds on stderr, if that is a terminal."""
    with progress() as bar:
        bar.add_task(task, total=None)
        yield


def progress(*columns: Any) -> Progress:
    """Create a progress display on stderr that is removed at the end, and is shown on a terminal only."""
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def check_file(path: Path) -> None:
    """Check before any work that a file can be written.

    Raises:
        CommandError: it cannot be written.
    """
    if path.is_dir():
        raise CommandError(f"{path} is a directory; name a file")
    _check_parent(path, path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise CommandError(f"{path} cannot be written: permission denied")


def check_directory(path: Path) -> None:
    """Check before any work that a directory can be made and written to.

    Raises:
        CommandError: it cannot.
    """
    if path.exists() and not path.is_dir():
        raise CommandError(f"{path} is a file; name a directory")
    _check_parent(path, path)


def _check_parent(path: Path, start: Path) -> None:
    """Try to write into the nearest directory that exists."""
    nearest = start.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}") from None


def write(path: Path, text: str) -> None:
    """Write a file whose path has passed `check_file`.

    Raises:
        CommandError: it cannot be written after all.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}", FAILED) from None
