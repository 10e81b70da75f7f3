"""Models of eight libraries that were not made for this one, as a user meets them: compiled, verified, shrunk, trained.

python bench/libraries.py [PATTERN ...] [--jobs 1] [--seconds 120] [--memory 8] [--again] [--report]

The libraries are those of `modelzoo.others.LIBRARIES`; install the ones to measure. Each model runs in a process of
its own. PATTERNs are regular expressions for names such as `torchvision/resnet18`. Models in `results/libraries.csv`
are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import re
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import date
from typing import Any

import torch
import torch.utils._pytree as pytree
from machine import RESULTS, machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops

tolerate_missing_torchvision_ops()

from modelzoo import measure, others, worker  # noqa: E402

import ecospa_fx  # noqa: E402

PATH = RESULTS / "libraries.csv"
COLUMNS = (
    "library", "name", "model", "stage", "dtype", "parameters",
    "couplings", "share", "compile_s", "verified", "inexact", "worst_error", "trained",
    "root_couplings", "root_share", "root_compile_s", "root_verified", "root_inexact", "root_worst_error",
    "root_trained", "total_s", "error", "root_error", "machine", "date",
)  # fmt: skip


def parts(name: str, budget: float) -> Iterator[measure.Row]:
    """Parts of the row of a model."""
    warnings.filterwarnings("ignore")  # of the libraries, which this does not judge
    torch.manual_seed(0)
    model, args, kwargs = others.MODELS[name]()
    model.eval()
    measure.stir(model)
    yield {"stage": "built", "model": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
    model, args, kwargs, dtype = measure.in_double(model, args, kwargs)
    yield {"stage": "run", "dtype": str(dtype).removeprefix("torch.")}
    for prefix, how in (("", "auto"), ("root_", "root")):
        try:
            yield from compiled(copy.deepcopy(model), args, kwargs, how, prefix)
        except Exception as error:
            yield {f"{prefix}error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    yield {"stage": "done"}


def compiled(model: nn.Module, args: Any, kwargs: Any, how: str, prefix: str) -> Iterator[measure.Row]:
    """Compile, verify, shrink every coupling to half, and take a training step."""
    start = time.process_time()
    model = ecospa_fx.compile(model, example_inputs=args, example_kwargs=kwargs, regions=how)
    found = ecospa_fx.couplings(model)
    on = {member.parameter for coupling in found for member in coupling.members}
    named = dict(model.named_parameters())
    share = sum(p.numel() for name, p in named.items() if name in on) / max(1, sum(p.numel() for p in named.values()))
    yield {
        f"{prefix}couplings": len(found),
        f"{prefix}share": round(share, 3),
        f"{prefix}compile_s": round(time.process_time() - start, 2),
    }
    result = ecospa_fx.verify(model, example_inputs=args, example_kwargs=kwargs)
    comparisons = list(result.by_coupling.values())
    worst = max((max(c.output_error, c.gradient_error) for c in comparisons), default=0.0)
    bad = [f"{c.coupling}: {max(c.output_error, c.gradient_error):.0e}" for c in comparisons if not c.ok]
    yield {
        f"{prefix}verified": len(comparisons),
        f"{prefix}inexact": len(bad),
        f"{prefix}worst_error": f"{worst:.1e}",
        **({f"{prefix}error": "; ".join(bad)[:300]} if bad else {}),
    }
    yield {f"{prefix}trained": trained(model, args, kwargs)}


def trained(model: nn.Module, args: Any, kwargs: Any) -> str:
    """Take a step, shrink every coupling to half, take another: `yes`, or how far it came."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    for shrunk in (False, True):
        if shrunk:
            keeps = {c: torch.arange(max(1, c.size // 2)) for c in ecospa_fx.couplings(model)}
            ecospa_fx.shrink(model, keeps, optimizer=optimizer)
        output = model(*args, **kwargs)
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        loss = sum(leaf.float().square().mean() for leaf in leaves)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return "yes" if torch.isfinite(torch.as_tensor(loss)) else "loss is not finite"


def read() -> dict[str, measure.Row]:
    """The rows there are."""
    if not PATH.exists():
        return {}
    with PATH.open(newline="") as file:
        return {f"{row['library']}/{row['name']}": dict(row) for row in csv.DictReader(file)}


def write(rows: dict[str, measure.Row]) -> None:
    """Write the rows, so that an interrupted sweep can go on."""
    with PATH.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for name in sorted(rows):
            writer.writerow(rows[name])


def report(rows: dict[str, measure.Row], console: Console) -> None:
    """Print a line per library, and each model that is not exact, not captured, or below half."""
    table = Table("library", "models", "compiled", "inexact", "trained", "share", "by root", title="libraries")
    for library in others.LIBRARIES:
        mine = [row for row in rows.values() if row["library"] == library]
        done = [row for row in mine if row.get("couplings")]
        shares = [statistics.median(float(r[k]) for r in mine if r.get(k)) if done else 0 for k in
                  ("share", "root_share")]  # fmt: skip
        inexact = sum(int(row.get(k) or 0) for row in mine for k in ("inexact", "root_inexact"))
        trained = sum(row.get("trained") == "yes" for row in mine)
        cells = [str(cell) for cell in (len(mine), len(done), inexact, trained)]
        table.add_row(library, *cells, *(f"{share:.2f}" for share in shares))
    console.print(table)
    left = Table("model", "share", "by root", "cause", title="below half, or not done")
    for name, row in sorted(rows.items()):
        low = float(row.get("share") or 0) < 0.5
        wrong = any(int(row.get(k) or 0) for k in ("inexact", "root_inexact"))
        if low or wrong or row.get("trained") != "yes" or row.get("root_trained") != "yes":
            cause = " / ".join(str(row[k]) for k in ("error", "root_error") if row.get(k))
            left.add_row(name, str(row.get("share", "")), str(row.get("root_share", "")), cause[:400])
    console.print(left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120, help="limit per model")
    parser.add_argument("--memory", type=float, default=8, help="limit per model, GiB of address space")
    parser.add_argument("--again", action="store_true", help="measure again what the CSV has")
    parser.add_argument("--report", action="store_true", help="only print what the CSV has")
    options = parser.parse_args()
    rows = read()
    if not options.report:
        missing = [pip for name, pip in others.LIBRARIES.items() if importlib.util.find_spec(name) is None]
        if missing:
            print(f"not installed, left out: pip install --no-deps {' '.join(missing)}", file=sys.stderr)
        there = {name for name in others.LIBRARIES if importlib.util.find_spec(name) is not None}
        names = [n for n in others.MODELS if any(re.fullmatch(p, n) for p in options.patterns or [".*"])]
        todo = [n for n in names if n.partition("/")[0] in there and (options.again or n not in rows)]
        print(f"{len(todo)} of {len(names)} models to measure", file=sys.stderr)
        for library in sorted({name.partition("/")[0] for name in todo}):
            importlib.import_module(library)  # once, before the processes are forked
        limit = int(options.memory * 2**30)
        for row in worker.measure_all(todo, options.jobs, options.seconds, limit, parts):
            name = f"{row['library']}/{row['name']}"
            rows[name] = row | {"machine": machine(), "date": date.today().isoformat()}
            print({key: value for key, value in row.items() if key != "library"}, flush=True)
            write(rows)
    report(rows, Console())


if __name__ == "__main__":
    main()
