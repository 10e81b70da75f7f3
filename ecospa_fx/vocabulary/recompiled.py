"""Recompiled: a compiled model whose original sizes change, so that its graphs are captured anew.

nothing shrunk yet  -> its own Python is compared; then its graphs are dropped
shrunk              -> its graphs are dropped, as after a load; the plan stays, with other original sizes
-> captured again, by the same regions: whoever watches them goes on
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ecospa_fx.model.compiled import MODEL, REGION, CompiledModel
from ecospa_fx.model.journal import Journal
from ecospa_fx.model.restore import plain
from ecospa_fx.passes.follow.trial import example_calls
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.plan import Plan

from .places import TokenCall


def note(journal: Journal, model: nn.Module, compiled: CompiledModel | None) -> None:
    """Note everything by which a model is compiled."""
    journal.note_modules(model)
    if compiled is None:
        return
    for held in (compiled, compiled.state, *compiled.regions.values()):
        journal.note_object(held)
    for region in compiled.regions.values():
        journal.note_list(region.specializations)
        journal.note_object(region.routing)
    journal.note_list(compiled.state.captures)


def captured_call(model: nn.Module) -> TokenCall | None:
    """Return a call like the first one of a model that is captured as a whole; None for others."""
    compiled: CompiledModel | None = model.__dict__.get(MODEL)
    region = None if compiled is None else compiled.regions.get("")
    if region is None or not region.specializations:
        return None
    args, kwargs = next(example_calls(region.naming_graph.axis_facts))
    return TokenCall(args, kwargs)


@contextmanager
def own_python(model: nn.Module, compiled: CompiledModel | None) -> Iterator[None]:
    """Let a model in which nothing has shrunk run its own forward for the time inside: nothing is captured or watched.

    A model that has shrunk runs its graphs, and is not watched either.
    """
    held: list[tuple[dict[str, Any], str, Any]] = []
    watchers = [] if compiled is None else [(region, region.watcher) for region in compiled.regions.values()]
    if compiled is not None and not compiled.plan.original_shapes:
        held = [
            (m.__dict__, key, m.__dict__[key]) for m in model.modules() for key in (MODEL, REGION) if key in vars(m)
        ]
    for region, _ in watchers:
        region.watcher = None
    for attributes, key, _ in held:
        del attributes[key]
    try:
        yield
    finally:
        for attributes, key, value in held:
            attributes[key] = value
        for region, watcher in watchers:
            region.watcher = watcher


def forget_graphs(model: nn.Module, compiled: CompiledModel) -> None:
    """Drop all graphs of a model: its calls are captured as they come.

    Where nothing has shrunk and nothing is watched, couplings across regions are found anew, as at the first call.
    """
    unwatched = all(region.watcher is None for region in compiled.regions.values())
    if compiled.state.joints and unwatched and not compiled.plan.original_shapes:
        _wait_again(model, compiled)
        return
    for region in compiled.regions.values():
        region.__dict__.update({**region.__getstate__(), "watcher": region.watcher})
    compiled.state.__dict__.update(compiled.state.__getstate__())
    compiled.guard_inner(model)
    if compiled.execution == "module" and compiled.regions:
        compiled.attach(model)


def _wait_again(model: nn.Module, compiled: CompiledModel) -> None:
    for name in compiled.regions:
        plain(model.get_submodule(name))
    plain(model)
    compiled.regions, compiled.not_captured = {}, {}
    state = compiled.state
    state.captures, state.joints, state.joint_refusals, state.flow = [], (), (), None
    state.withheld, state.elsewhere = frozenset(), frozenset()
    state.adopt(Plan(), {})
    compiled.attach(model)


def adopt_rows(model: nn.Module, compiled: CompiledModel, dims: Collection[tuple[str, int]], rows: int) -> None:
    """Let the plan take some dims for as large as they are now from the start."""
    plan, held = compiled.plan.copy(), named_tensors(model)
    for name, dim in dims:
        if name in plan.original_shapes:
            shape = list(plan.original_shapes[name])
            shape[dim] = rows
            plan.original_shapes[name] = tuple(shape)
    assert all(tuple(held[name].shape) == plan.shape(name) for name in plan.original_shapes if _plain(held.get(name)))
    compiled.state.adopt(plan, compiled.attributes)


def _plain(tensor: Tensor | None) -> bool:
    return tensor is not None
