"""Text: numbers, sizes, names and tables as people read them."""

from __future__ import annotations

import io
import re

from rich.console import Console
from rich.table import Table


def count(number: int) -> str:
    """Format a count in about five characters: 1,234 or 12.3M."""
    for unit, scale in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= scale and number >= 10_000:
            return f"{number / scale:.3g}{unit}" if number < 999.5 * scale else f"{number / scale:.0f}{unit}"
    return f"{number:,}"


def size(number: int) -> str:
    """Format a number of bytes: `12.3 MB`."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} bytes"


def plain(table: Table, width: int = 80) -> str:
    """Format a table as text without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def starred(name: str) -> str:
    """Replace list positions in a name by `*`, so that `layers.3.mlp` and `layers.7.mlp` become equal."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def plural(count: int, noun: str) -> str:
    """Format a count with its noun, in the plural if needed."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
