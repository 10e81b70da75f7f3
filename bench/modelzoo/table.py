"""The results: a CSV, a table, a plot."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from machine import RESULTS, machine
from rich.console import Console

from .measure import COLUMNS, Row

LIBRARIES = ("timm", "transformers")


def path_of(library: str) -> Path:
    """The CSV of one library: two sweeps may run side by side."""
    return RESULTS / f"zoo_{library}.csv"


def read() -> dict[str, Row]:
    """The rows there are, by library and name."""
    rows = {}
    for library in LIBRARIES:
        if path_of(library).exists():
            with path_of(library).open(newline="") as file:
                rows.update({f"{row['library']}/{row['name']}": dict(row) for row in csv.DictReader(file)})
    return rows


def write(rows: Iterable[Row], library: str) -> None:
    """Write the rows of a library, so that an interrupted sweep can go on where it was."""
    RESULTS.mkdir(exist_ok=True)
    part = path_of(library).with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "machine"], restval="", extrasaction="ignore")
        writer.writeheader()
        for row in sorted((row for row in rows if row["library"] == library), key=lambda row: str(row["name"])):
            writer.writerow({"machine": machine(), **row})
    part.replace(path_of(library))


def line(row: Row) -> str:
    """A row in a line, for the log."""
    exact = f"{row.get('inexact')}/{row.get('verified')} inexact" if row.get("verified") else "not verified"
    return (
        f"{row['library']}/{row['name']}: {row.get('stage')}, {row.get('captured', '-')}, "
        f"{row.get('couplings', 0)} couplings, {exact}, att {row.get('attentions_explained', '')} "
        f"ffn {row.get('ffns_explained', '')}, {row.get('total_s')} s "
        f"{row.get('missing', '')} {row.get('error', '')}"
    )


def report(rows: Iterable[Row], console: Console) -> None:
    """Print."""
