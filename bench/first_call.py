"""Where the time of a first call goes, and what a quicker tracer could save of it.

PYTHONPATH=bench python bench/first_call.py [--rounds 5] [--only NAME ...]

The models of `perf.py`, compiled with the same calls. Each part is counted without the others inside it:

export      torch.export of each region, with its sizes as symbols
comparison  each region's graph beside its own Python: results, gradients, random numbers
inference   axes of the graph, and the couplings in it
rest        the forward in which regions are found, programs, everything else

and beside them, for the same regions and arguments: torch.export with numbers for sizes, and `make_fx` on fake tensors,
with numbers too. `floor` is what would be left with that in place of the export. CPU seconds of one thread, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from machine import write_csv
from perf import MODELS, compiled, seconds
from rich.console import Console
from rich.table import Table
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops
from ecospa_fx.passes.capture import capture
from ecospa_fx.passes.find import analyse

PARTS = (
    (capture, "export"),
    (capture, "difference_from_eager"),
    (analyse, "difference_from_eager"),  # of blocks that share a graph
    (analyse, "infer_axes"),
    (analyse, "discover"),
)
NAMES = {"export": "export", "difference_from_eager": "comparison", "infer_axes": "inference", "discover": "inference"}


@contextmanager
def parts() -> Iterator[tuple[Counter[str], list[tuple[Any, ...]]]]:
    """Count the seconds of each part for the time inside, and keep the arguments of each export."""
    taken: Counter[str] = Counter()
    exported: list[tuple[Any, ...]] = []
    inner = [0.0]

    def counted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if name == "export":
                exported.append(args[:2])
            inner.append(0.0)
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.process_time() - began
                taken[name] += whole - inner.pop()
                inner[-1] += whole

        return run

    patches = [patch.object(where, name, counted(getattr(where, name), NAMES[name])) for where, name in PARTS]
    for each in patches:
        each.start()
    try:
        yield taken, exported
    finally:
        for each in patches:
            each.stop()


def with_numbers(flat: torch.nn.Module, tensors: list[torch.Tensor]) -> None:
    torch.export.export(flat, tuple(t.detach() for t in tensors), strict=False)


def on_fake_tensors(flat: torch.nn.Module, tensors: list[torch.Tensor]) -> None:
    def call(state: dict[str, torch.Tensor], *args: torch.Tensor) -> Any:
        return functional_call(flat, state, args)

    state = {name: t.detach() for name, t in (*flat.named_parameters(), *flat.named_buffers())}
    make_fx(call, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(state, *tensors)


def measured(name: str, rounds: int) -> dict[str, object]:
    make, call, goal = MODELS[name]
    compiled(make, call)  # what only the first call does
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        with parts() as (taken, exported):
            whole = compiled(make, call)
        one = {"whole": whole, **taken, "rest": whole - taken.total()}
        one["export with numbers"] = sum(seconds(lambda e=each: with_numbers(*e)) for each in exported)
        one["make_fx"] = sum(seconds(lambda e=each: on_fake_tensors(*e)) for each in exported)
        one["floor"] = one["whole"] - one["export"] + one["make_fx"]
        for part, value in one.items():
            found.setdefault(part, []).append(value)
    medians = {part: f"{statistics.median(values):.3g}" for part, values in found.items()}
    return {"model": name, "regions exported": len(exported), **medians, "goal": goal, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    tolerate_missing_torchvision_ops()
    rows = []
    for name in options.only:
        rows.append(measured(name, options.rounds))
        print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    table = Table(*rows[0], title="CPU seconds of a first call on one thread")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=170).print(table)
    print(write_csv("first_call", rows))


if __name__ == "__main__":
    main()
