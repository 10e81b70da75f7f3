"""Whether an experiment gives today what its committed table says: run again, in part, and compared row by row.

PYTHONPATH=bench python -m experiments.repeat NAME [what the experiment takes, as --seeds 1 --data DIR]

A table holds as long as the rules that made it: seeds are fixed, so that a row that comes again to the last digits was
made by the same rules. Each row that was run again is a row of `results/repeated.csv`, with the loss as committed and
now. The committed table stays as it is.
"""

from __future__ import annotations

import csv
import importlib
import sys
import tempfile
from datetime import date
from pathlib import Path

import machine
from rich.console import Console
from rich.table import Table

COMMITTED = machine.RESULTS
KEYS = ("title", "arch", "what", "when", "removed", "top_k", "theta", "variant", "way", "seed", "steps")
COLUMNS = ("experiment", "row", "committed", "committed_on", "now", "machine", "date")


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    """Rows of a table, by what they are of."""
    with path.open(newline="") as file:
        return {" ".join(row[key] for key in KEYS if row.get(key)): row for row in csv.DictReader(file)}


def again(name: str, arguments: list[str]) -> dict[str, dict[str, str]]:
    """Run an experiment with its tables and plots in a folder that is left behind, and return its rows."""
    with tempfile.TemporaryDirectory() as folder:
        machine.RESULTS = Path(folder)  # before it is imported there
        sys.argv = [name, *arguments]
        importlib.import_module(f"experiments.{name}").main()
        return rows_of(Path(folder) / f"{name}.csv")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    name = sys.argv[1]
    before, now = rows_of(COMMITTED / f"{name}.csv"), again(name, sys.argv[2:])
    path, column = COMMITTED / "repeated.csv", "over_dense" if name == "one_stroke" else "loss"
    found = [
        {
            "experiment": name, "row": row, "committed": before[row][column], "committed_on": before[row]["date"],
            "now": now[row][column], "machine": machine.machine(), "date": date.today().isoformat(),
        }
        for row in now
        if row in before
    ]  # fmt: skip
    if not found:
        raise SystemExit(f"{name}: no row that was run now is in its committed table; run with the same --steps")
    others = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([row for row in others if row["experiment"] != name] + found)
    table = Table("row", "committed", "now", "difference", title=f"{name}, {column}")
    for row in found:
        difference = float(row["now"]) - float(row["committed"])
        table.add_row(row["row"], row["committed"], row["now"], f"{difference:+.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
