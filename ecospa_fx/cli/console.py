"""What all commands share: where they print, how they fail, how they show that they are at work."""

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

FAILED, WRONG, INTERRUPTED = 1, 2, 130


class CommandError(Exception):
    """Something that a command cannot go on with; its text is the one line that people see."""

    def __init__(self, message: str, code: int = WRONG) -> None:
        super().__init__(message)
        self.code = code


def complain(command: str, error: object, code: int) -> int:
    """Print what went wrong as one line and return the exit code."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    word = "" if code == INTERRUPTED else "error: "
    print(f"{command}: {word}{' '.join(line.strip() for line in lines)}", file=sys.stderr)
    return code


def show(*renderables: Any) -> None:
    """Print for people: in colour and at its width on a terminal, plain elsewhere."""
    console = Console(highlight=False, soft_wrap=False)
    for each in renderables:
        console.print(each, markup=False)


def show_json(document: Any) -> None:
    """Print for programs."""
    print(document if isinstance(document, str) else json.dumps(document, indent=1))


@contextmanager
def at_work(what: str) -> Iterator[None]:
    """A spinner with the seconds so far, on stderr, where that is a terminal."""
    with progress() as bar:
        bar.add_task(what, total=None)
        yield


def progress(*columns: Any) -> Progress:
    """A progress display on stderr that leaves nothing behind and stays away from what is no terminal."""
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
    """Refuse a file that cannot be written, before any work is done.

    Raises:
        CommandError: it cannot.
    """
    if path.is_dir():
        raise CommandError(f"{path} is a directory; name a file")
    _check_parent(path, path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise CommandError(f"{path} cannot be written: permission denied")


def check_directory(path: Path) -> None:
    """Refuse a directory that cannot be made or written to, before any work is done.

    Raises:
        CommandError: it cannot.
    """
    if path.exists() and not path.is_dir():
        raise CommandError(f"{path} is a file; name a directory")
    _check_parent(path, path)


def _check_parent(path: Path, start: Path) -> None:
    """Try to write below the nearest directory that is there."""
    there = start.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}") from None


def write(path: Path, text: str) -> None:
    """Write a file whose path `check_file` has seen.

    Raises:
        CommandError: it cannot be written after all.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}", FAILED) from None
