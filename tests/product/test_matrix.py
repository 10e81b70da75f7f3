"""The matrix of versions: a part of the suite in an environment becomes a row of its table."""

import csv
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.sweep
def test_a_chosen_part_becomes_a_row_and_failures_are_named(tmp_path):
    (tmp_path / "test_part.py").write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    table = tmp_path / "matrix.csv"
    others = {"python": "3.11.0", "torch": "2.0", "part": "all", "passed": "7"}
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*others, "failed", "skipped", "machine"])
        writer.writeheader()
        writer.writerow(others)
    command = [sys.executable, str(ROOT / "bench" / "matrix.py"), "--with", sys.executable, "--results", str(table)]
    part = ["-n0", "-k", "good or bad", str(tmp_path / "test_part.py")]
    done = subprocess.run([*command, *part], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 1, done.stderr  # as the failing test wants
    assert "1 passed, 1 failed, 0 skipped" in done.stdout
    kept, row = rows(table)
    assert {name: kept[name] for name in others} == others
    assert (row["python"], row["torch"]) == (platform.python_version(), torch.__version__)
    assert (row["passed"], row["failed"], row["failing"]) == ("1", "1", "test_part::test_bad")
    assert row["part"].startswith("-k 'good or bad' ") and row["environment"] == "as it was"


def test_the_committed_table_names_no_place_of_a_machine_and_every_row_its_part():
    table = rows(ROOT / "bench" / "results" / "matrix.csv")
    assert {"2.13", "2.14"} <= {row["torch"][:4] for row in table}
    for row in table:
        assert row["date"] and row["part"] and int(row["passed"]) > 0 and row["environment"] in ("clean", "as it was")
        assert not [word for word in row["part"].split() if word.startswith("/")]
