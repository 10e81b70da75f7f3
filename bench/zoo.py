"""Zoo of every model that timm and transformers can build: captured, inferred, exact or refused.

python bench/zoo.py [PATTERN ...] [--jobs 1] [--seconds 90] [--memory 6] [--again] [--report]

One smallest model per timm module family and one per transformers type, each in a process of its own with
limits of computing time and memory. Models in `results/zoo_*.csv` are not measured again. PATTERNs are regular
expressions for names such as `timm/beit` or `transformers/llama`.
"""

from __future__ import annotations

import argparse
import re
import sys

from rich.console import Console

from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops

tolerate_missing_torchvision_ops()

from modelzoo import build, measure, table, worker  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=90, help="limit per model")
    parser.add_argument("--memory", type=float, default=6, help="limit per model, GiB of address space")
    parser.add_argument("--again", action="store_true", help="measure again what the CSV has")
    parser.add_argument("--report", action="store_true", help="only print and plot what the CSV has")
    options = parser.parse_args()
    rows = table.read()
    if not options.report:
        names = [n for n in build.names() if any(re.fullmatch(p, n) for p in options.patterns or [".*"])]
        todo = [name for name in names if options.again or name not in rows]
        print(f"{len(todo)} of {len(names)} models to measure", file=sys.stderr)
        for row in worker.measure_all(todo, options.jobs, options.seconds, int(options.memory * 2**30)):
            rows[f"{row['library']}/{row['name']}"] = dict.fromkeys(measure.COLUMNS, "") | row
            print(table.line(row), flush=True)
            table.write(rows.values(), str(row["library"]))
    table.report(rows.values(), Console())


if __name__ == "__main__":
    main()
