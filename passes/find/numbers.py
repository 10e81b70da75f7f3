"""Numbers as inputs: a second capture at other numbers shows where a graph holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.errors import CaptureError
from ecospa_fx.passes.graph.python_state import PythonState
from ecospa_fx.passes.ir.guards import Read, setting_read
from ecospa_fx.passes.ir.numbers import TrackedFloat, as_inputs
from ecospa_fx.passes.ir.region_graph import Call, RegionGraph

from .analyse import _analyse_watched


def with_numbers(
    captured: RegionGraph,
    module: nn.Module,
    call: Call,
    reads: Sequence[Read],
    region: str,
    outside: Mapping[str, str],
    settled: dict[str, Any],
) -> RegionGraph | None:
    """Capture a region again, at the numbers that it holds now, and make inputs of them.

    Args:
        captured: its graph, at other numbers.
        module: the region.
        call: the arguments.
        reads: the numbers that have changed since.
        region: its name.
        outside: see `RegionGraph.shared_outside`.
        settled: see `analyse_once`.

    Returns:
        The graph with inputs for these numbers; None where it holds functions of them.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    every = [*(number.read for number in captured.numbers), *reads]
    now = [read.now(modules) for read in every]
    tracked = [TrackedFloat(value) for value in _apart(now, [read.value for read in every])]
    state = PythonState(module)
    try:
        for read, value in zip(every, tracked, strict=True):
            read.put(modules, value)
        analysis, _ = _analyse_watched(module, region, call, outside, **settled)
    except CaptureError:
        return None
    finally:
        for read, value in zip(every, now, strict=True):
            read.put(modules, value)
        state.restore()  # a value of a class is not one of the instance
    numbers = as_inputs(captured.graph, analysis.captured.graph, every, tracked)
    if numbers is None or not _alike(captured, analysis.captured) or not all(n.fits(modules) for n in numbers):
        return None
    places = {read.place for read in reads}
    settings = {}
    others = [entry for read in captured.reads for entry in _without(read, places)]
    for (path, name), value in captured.settings.items():
        read = setting_read(path, name, value)
        left = _without(read, places)
        if left == [read]:
            settings[path, name] = value
        else:
            others += left
    return replace(captured, settings=settings, reads=tuple(others), numbers=numbers)


def _without(read: Read, places: set[Any]) -> list[Read]:
    """Return a read without the numbers at some places: those of the entries that stay, where it is of a container."""
    if read.place in places:
        return []
    keys, *entries = read.entries()
    if all(entry.place not in places for entry in entries):
        return [read]
    return [keys, *(entry for entry in entries if entry.place not in places)]


def _apart(values: Sequence[float], before: Sequence[float]) -> list[float]:
    """Move numbers a little, so that all differ from each other and from those before."""
    taken = set(before)
    apart: list[float] = []
    for value in values:
        step = 1
        while value in taken:
            value, step = value * (1 - 1e-7 * step) if value else 1e-12 * step, step + 1
        taken.add(value)
        apart.append(value)
    return apart


def _alike(a: RegionGraph, b: RegionGraph) -> bool:
    """Return whether two graphs of a region hold the same constants and return the same structure."""
    if a.out_spec != b.out_spec or a.out_leaves != b.out_leaves or a.carried.reads or b.carried.reads:
        return False
    if (a.assigned, a.inputs, a.tensors) != (b.assigned, b.inputs, b.tensors):
        return False
    return a.constants.keys() == b.constants.keys() and all(_equal(a.constants[k], b.constants[k]) for k in a.constants)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    return a is b
