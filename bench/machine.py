"""Machine description, which every benchmark writes beside its numbers."""

import csv
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """The machine in words: processor, cores, accelerator if any, versions of Python and torch."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{cpu}, {torch.get_num_threads()} threads{gpu}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def kept_rows(name: str) -> list[dict[str, str]]:
    """Read the rows of `results/<name>.csv`, with the machine and the date that each has; none where there is none."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(name: str, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write `rows` to `results/<name>.csv`, each with the machine and the date: its own, or those of now."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        now = {"machine": machine(), "date": date.today().isoformat()}
        writer = csv.DictWriter(file, [name for name in rows[0] if name not in now] + list(now))
        writer.writeheader()
        writer.writerows({**now, **row} for row in rows)
    return path
