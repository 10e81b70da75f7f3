"""Text: numbers, sizes, names and tables as people read them."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text


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


class Hanging:
    """Lines for people: a line that is too long goes on further in than it began, at any width of the console."""

    def __init__(self, text: str, style: str = "") -> None:
        self.text = text
        self.style = style

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[Text]:
        for line in self.text.split("\n"):
            yield Text(hanging(line, options.max_width), style=self.style)


def hanging(line: str, width: int) -> str:
    """Wrap a line; what follows stands below the text behind its number or dash, or two columns further in."""
    mark = re.match(r" *(\d+\. +|- )?", line)
    begin = mark.end() if mark is not None else 0
    rest = begin if mark is not None and mark[1] else begin + 2
    return textwrap.fill(
        line[begin:], width, initial_indent=line[:begin], subsequent_indent=" " * rest, break_long_words=False,
        break_on_hyphens=False,
    ) or line  # fmt: skip


def starred(name: str) -> str:
    """Replace list positions in a name by `*`, so that `layers.3.mlp` and `layers.7.mlp` become equal."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def plural(count: int, noun: str) -> str:
    """Format a count with its noun, in the plural if needed."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
