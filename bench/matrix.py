"""Matrix: the suite, or a part of it, with each Python and each torch, in clean environments.

make matrix ARGS="[--python 3.12] [--torch 'torch==2.13.*'] [--with PYTHON] [--keep] [what pytest takes]"

By default Python 3.11 to 3.14, those that are on this machine, each with torch 2.13 and with the newest; of
transformers, timm and all others pip takes the newest that fit. An environment takes 3 GB and more below build/matrix,
and is deleted afterwards. `--with` takes an environment that is there, as it is. Every run is a row of
results/matrix.csv, in place of one of the same versions and the same part of the suite. It needs nothing but Python:
torch is in the environments.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "matrix.csv"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
TORCHES = ("torch==2.13.*", "torch")
COLUMNS = (
    "python", "torch", "transformers", "timm", "part", "passed", "failed", "skipped", "seconds",
    "private_parts_missing", "environment", "failing", "machine", "date",
)  # fmt: skip
KEY = ("python", "torch", "part")
LOOK = """
import importlib.metadata, json, platform
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
import torch
from ecospa_fx.testing.private_parts import missing, private_parts
from machine import machine
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "transformers": version("transformers"),
    "timm": version("timm"), "private_parts_missing": " ".join(missing(private_parts())), "machine": machine(),
}))
"""
"""The versions of an environment, and the private names of torch that this library reads and it does not have."""


def interpreter(version: str) -> str | None:
    """The path of a Python of this version that starts: on the path, or one of pyenv's."""
    on_path = [sys.executable, shutil.which(f"python{version}")]
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for candidate in filter(None, [*on_path, *map(str, reversed(pyenv))]):
        ask = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() == version:
            return candidate
    return None


def environments(pythons: list[str], torches: list[str], keep: bool) -> Iterator[str]:
    """The Python of each clean environment, which is gone when the next is asked for."""
    for version in pythons:
        found = interpreter(version)
        if found is None:
            print(f"Python {version}: not on this machine, left out", flush=True)
            continue
        for torch in torches:
            folder = ROOT / "build" / "matrix" / f"python{version}-{''.join(c for c in torch if c.isalnum())}"
            print(f"Python {version}, {torch}: installing", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([found, "-m", "venv", str(folder)], check=True)
            python = str(folder / "bin" / "python")
            pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
            try:
                done = subprocess.run([*pip, "-e", f"{ROOT}[test]", torch], check=False)
                if done.returncode:
                    print(f"Python {version}, {torch}: pip cannot install it, left out", flush=True)
                    continue
                yield python
            finally:
                if not keep:
                    shutil.rmtree(folder, ignore_errors=True)


def row_of(python: str, arguments: list[str], environment: str) -> dict[str, object]:
    """The row of a run of pytest."""
    within = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "80"}
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "bench")]))
    look = subprocess.run(
        [python, "-c", LOOK], cwd=ROOT, env={**within, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if look.returncode:
        raise SystemExit(f"{environment} environment: {look.stderr.strip().splitlines()[-1]}")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.xml"
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={log}", *arguments]
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=within, check=False)
        seconds = time.monotonic() - start
        if not log.exists():
            raise SystemExit(f"pytest ended with {done.returncode} and wrote no results")
        cases = list(ET.parse(log).getroot().iter("testcase"))
    outcome = {tag: [case for case in cases if case.find(tag) is not None] for tag in ("failure", "error", "skipped")}
    bad = outcome["failure"] + outcome["error"]
    # The number of tests that run side by side does not matter here.
    part = [word for i, word in enumerate(arguments) if word[:2] != "-n" and (i == 0 or arguments[i - 1] != "-n")]
    return {
        **json.loads(look.stdout.splitlines()[-1]),
        "part": shlex.join(part) or "all",
        "passed": len(cases) - len(bad) - len(outcome["skipped"]),
        "failed": len(bad),
        "skipped": len(outcome["skipped"]),
        "seconds": round(seconds),
        "environment": environment,
        "failing": " ".join(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}" for case in bad[:20]),
        "date": date.today().isoformat(),
    }


def add(row: dict[str, object], path: Path) -> None:
    """Write a row into the table, in place of one of the same versions and part."""
    rows: list[dict[str, object]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [dict(old) for old in csv.DictReader(file) if any(old[name] != row[name] for name in KEY)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*rows, row], key=lambda each: [str(each[name]) for name in KEY]))


def main() -> int:
    """Run the suite in each environment; 1 if a test failed in one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", choices=PYTHONS, help="only this version; repeatable")
    parser.add_argument("--torch", action="append", help="only this torch, as pip takes it; repeatable")
    parser.add_argument("--with", dest="existing", metavar="PYTHON", help="an environment that is there, as it is")
    parser.add_argument("--keep", action="store_true", help="leave the environments below build/matrix")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="the table to write")
    options, arguments = parser.parse_known_args()
    if not any(word.startswith("-n") for word in arguments):
        arguments += ["-n", "auto"]
    found = environments(options.python or list(PYTHONS), options.torch or list(TORCHES), options.keep)
    runs = [(options.existing, "as it was")] if options.existing else ((python, "clean") for python in found)
    failed = count = 0
    for python, environment in runs:
        row = row_of(python, arguments, environment)
        add(row, options.results)
        count += 1
        failed += bool(row["failed"])
        print(
            "Python {python}, torch {torch}, transformers {transformers}, timm {timm}: {passed} passed, "
            "{failed} failed, {skipped} skipped in {seconds} s".format(**row),
            flush=True,
        )
    if not count:
        raise SystemExit("no environment could be made")
    print(f"{count} runs, {failed} with failures: {options.results.name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
