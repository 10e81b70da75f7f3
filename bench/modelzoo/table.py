"""Results of the zoo: a CSV, a table, a plot."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from machine import RESULTS, machine
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from modelzoo.expected import PARTS
from modelzoo.measure import COLUMNS, Row
from modelzoo.used import USED

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
        writer = csv.DictWriter(file, [*COLUMNS, "machine"], extrasaction="ignore")
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
    """Print the coverage and what is left with its cause, and draw how much of each model couplings hold."""
    found = list(rows)
    coverage = Table("", *LIBRARIES, title="coverage")
    for label, count in COVERAGE.items():
        coverage.add_row(label, *(count([row for row in found if row["library"] == name]) for name in LIBRARIES))
    console.print(coverage)
    console.print(most_used(found))
    left = Table("model", "how far", "cause", title="what is left")
    for row in found:
        if row["stage"] != "done" or int(row["inexact"] or 0):
            left.add_row(f"{row['library']}/{row['name']}", how_far(row), str(row["error"])[:160])
    console.print(left)
    plot(found)


def most_used(rows: list[Row]) -> Table:
    """Build the table of expected axes in each of the most used types."""
    by_name = {row["name"]: row for row in rows if row["library"] == "transformers"}
    title = f"the {len(USED)} most used types of transformers: axes found/refused/without a rule/unmet"
    narrow = [Column(name, no_wrap=True) for name in ("type", *PARTS)]
    because = Column("refused because", overflow="fold", ratio=1)
    table = Table(
        *narrow,
        because,
        box=SIMPLE,
        pad_edge=False,
        title=title,
    )
    for name in USED:
        row = by_name.get(name, {})
        counts = [_short(str(row.get(f"{part}_expected", ""))) for part in PARTS]
        table.add_row(name, *counts, str(row.get("refused_because", ""))[:70])
    return table


def _short(counts: str) -> str:
    """`found:2 unmet:1` as `2/0/0/1`."""
    held = dict(part.split(":") for part in counts.split())
    return "/".join(held.get(status, "0") for status in ("found", "refused", "missing", "unmet")) if held else "-"


def how_far(row: Row) -> str:
    """The last thing that succeeded."""
    if row["stage"] == "started":
        return "not built and run"
    if row["stage"] == "run":
        return "not captured" if row["captured"] == "no" else "over the limits"
    return "inexact" if int(row["inexact"] or 0) else "analysed, not verified"


def _ran(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["stage"] != "started"]


def _captured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["captured"] not in ("", "no")]


def _expected(part: str) -> Callable[[list[Row]], str]:
    """Count the expected axes (see `expected`) by their result."""

    def count(rows: list[Row]) -> str:
        total: Counter[str] = Counter()
        for row in rows:
            for each in str(row[f"{part}_expected"]).split():
                status, number = each.split(":")
                total[status] += int(number)
        return " / ".join(f"{total[status]:,}" for status in ("found", "refused", "missing", "unmet"))

    return count


# Description of a count -> function that counts the rows of one library.
COVERAGE: dict[str, Callable[[list[Row]], str]] = {
    "names": lambda rows: str(len(rows)),
    "built and run": lambda rows: str(len(_ran(rows))),
    "over a limit of time or memory before capture": lambda rows: str(sum(row["captured"] == "" for row in _ran(rows))),
    "captured whole": lambda rows: str(sum(row["captured"] == "whole" for row in rows)),
    "captured by regions": lambda rows: str(sum("regions" in str(row["captured"]) for row in rows)),
    "not captured": lambda rows: str(sum(row["captured"] == "no" for row in rows)),
    "couplings found": lambda rows: f"{sum(int(row['couplings'] or 0) for row in rows):,}",
    "models with an op that has no rule": lambda rows: str(sum(bool(row["missing"]) for row in rows)),
    "Q/K axes found / refused / without a rule / unmet": _expected("qk"),
    "V/O, likewise": _expected("vo"),
    "heads, likewise": _expected("heads"),
    "FFN, likewise": _expected("ffn"),
    "comparisons with masking (float64, or float32 where that is all it takes)": lambda rows: (
        f"{sum(int(row['verified'] or 0) for row in rows):,}"
    ),
    "inexact ones": lambda rows: str(sum(int(row["inexact"] or 0) for row in rows)),
    "models that took more than 5% of export to analyse": lambda rows: str(
        sum(float(row["analysis_share"] or 0) > 0.05 for row in rows)
    ),
}


def plot(rows: list[Row]) -> None:
    """Share of the parameters inside couplings, one bar per model, sorted."""
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, library in zip(figure.subplots(1, 2), LIBRARIES):
        shares = sorted(
            (float(row["parameters_inside"]) for row in _captured(rows) if row["library"] == library), reverse=True
        )
        axis.bar(range(len(shares)), shares, width=1.0, color="#0072b2")
        axis.set_title(f"{library}: {len(shares)} models", fontsize=10)
        axis.set_xlabel("models, sorted")
        axis.set_ylim(0, 1)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share of parameters inside couplings")
    figure.savefig(RESULTS / "zoo.png")
