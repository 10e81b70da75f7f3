"""Dry run: a region's own forward, run once at original sizes, to see how it uses the objects of a call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ecospa_fx.errors import CaptureError
from ecospa_fx.passes.graph.isolate import isolated
from ecospa_fx.passes.graph.tensors import at_original_sizes
from ecospa_fx.passes.ir.region_graph import Forward, Originals, described
from ecospa_fx.passes.ir.state_access import IndexAttributes, ObjectLeaf, ObjectPath, copy_objects, flattened, parted
from ecospa_fx.passes.objects.layer_numbers import index_attributes
from ecospa_fx.passes.objects.tracker import Tracker

from .export import refuse_foreign
from .options import CaptureOptions


@dataclass(frozen=True)
class DryRun:
    """The use that a forward makes of the objects of a call.

    Attributes:
        state: paths of the tensors in them that it reads.
        written: paths of those among them that it writes into.
        index_attributes: integers of the region that only select its own part of an object.
    """

    state: tuple[ObjectPath, ...] = ()
    written: frozenset[ObjectPath] = frozenset()
    index_attributes: IndexAttributes = field(default_factory=IndexAttributes)


def dry_run(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    region: str,
    forward: Forward,
    originals: Originals | None,
    options: CaptureOptions,
) -> DryRun:
    """Run a forward on copies of the objects of a call, and watch what it does with them.

    Raises:
        CaptureError: there are objects of which nothing can be known, or it does with them what no graph can do.
    """
    leaves, spec = flattened((args, kwargs))
    leaves, objects = parted(leaves) if options.objects else (leaves, [])
    refuse_foreign(module, region, leaves, "is called with", "pass None there")
    if not objects:
        return DryRun()

    def run() -> Tracker:
        tracker = Tracker(marking=False)
        proxies = tracker.proxies(copy_objects(objects, lambda _, t: t.detach().clone()))
        run_args, run_kwargs = pytree.tree_unflatten(
            [proxies[leaf.number] if isinstance(leaf, ObjectLeaf) else leaf for leaf in leaves], spec
        )
        forward(module, *run_args, **run_kwargs)
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
            attributes = index_attributes(module, tracker, run)
        for path in tracker.tensors:
            if not path.leads_somewhere(objects):
                raise CaptureError(f"reads `{path}`, which the same call has put there, and no graph does that")
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        raise CaptureError(
            f"{described(region)} ({type(module).__name__}) is called with a {names}, and cannot be captured so: it "
            f"{line if isinstance(error, CaptureError) else f'fails with {type(error).__name__}: {line}'}. Call it "
            "without one (for a cache, usually `use_cache=False`)"
        ) from error
    written = frozenset(path for path, tensor in tracker.tensors.items() if tensor._version)
    return DryRun(tuple(tracker.tensors), written, attributes)
