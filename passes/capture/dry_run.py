"""Dry: run a region's own forward once, at original sizes, to see what it does with the objects of a call."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ecospa_fx.errors import CaptureError
from ecospa_fx.passes.graph.isolate import isolated
from ecospa_fx.passes.graph.tensors import at_original_sizes
from ecospa_fx.passes.ir.captured import Forward, Originals, described
from ecospa_fx.passes.ir.state_access import Held, IndexAttributes, ObjectPath, copies, flattened, parted
from ecospa_fx.passes.objects.layer_numbers import numbers
from ecospa_fx.passes.objects.tracker import Tracker

from .export import refuse_foreign
from .options import CaptureOptions


def read_and_written(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    region: str,
    forward: Forward,
    originals: Originals | None,
    options: CaptureOptions,
) -> tuple[tuple[ObjectPath, ...], frozenset[ObjectPath], IndexAttributes]:
    """Which tensors in the objects of a call a forward reads, into which it writes, and by which numbers it finds them.

    Raises:
        CaptureError: there are objects of which nothing can be known, or it does with them what no graph can do.
    """
    leaves, spec = flattened((args, kwargs))
    leaves, objects = parted(leaves) if options.objects else (leaves, [])
    refuse_foreign(module, region, leaves, "is called with", "pass None there")
    if not objects:
        return (), frozenset(), IndexAttributes()

    def run() -> Tracker:
        tracker = Tracker(marking=False)
        shadows = tracker.shadows(copies(objects, lambda _, t: t.detach().clone()))
        called = [shadows[leaf.number] if isinstance(leaf, Held) else leaf for leaf in leaves]
        own_args, own_kwargs = pytree.tree_unflatten(called, spec)
        forward(module, *own_args, **own_kwargs)
        tracker.carried()
        return tracker

    names = " and a ".join(sorted({type(value).__name__ for value in objects}))
    try:
        with (
            at_original_sizes(module, originals.values() if originals else None),
            isolated(module),
            torch.no_grad(),
        ):
            tracker = run()
            found = numbers(module, tracker, run)
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        raise CaptureError(
            f"{described(region)} ({type(module).__name__}) is called with a {names}, and cannot be captured so: it "
            f"{line if isinstance(error, CaptureError) else f'fails with {type(error).__name__}: {line}'}. Call it "
            "without one (of a cache, `use_cache=False` as a rule)"
        ) from error
    written = {place for place, tensor in tracker.tensors.items() if tensor._version}
    return tuple(tracker.tensors), frozenset(written), found
