"""Text: numbers, sizes, names and tables as people read them."""

from __future__ import annotations

import io
import re

from rich.console import Console
from rich.table import Table


def count(number: int) -> str:
    """A count in five letters or so: 1,234 or 12.3M."""
    for unit, scale in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= scale and number >= 10_000:
            return f"{number / scale:.3g}{unit}" if number < 999.5 * scale else f"{number / scale:.0f}{unit}"
    return f"{number:,}"


def size(number: int) -> str:
    """Bytes in words: `12.3 MB`."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} bytes"


def plain(table: Table, width: int = 80) -> str:
    """A table as text without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def starred(name: str) -> str:
    """A name with its list positions blotted out: `layers.3.mlp` and `layers.7.mlp` are alike."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def plural(count: int, noun: str) -> str:
    """A count and its noun."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
