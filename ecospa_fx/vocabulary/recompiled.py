"""Recompiled: a compiled model whose original sizes change, so that its graphs are captured anew.

Nothing shrunk yet    it waits for a call again, as after `compile` without inputs
shrunk                it is as after a load: the plan stays, in which the original sizes are others now
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ecospa_fx.model.compiled import MODEL, CompiledModel
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
    """Let a model that waits for its first call run its own forward, which captures nothing, for the time inside."""
    waits = compiled is not None and not compiled.regions
    if waits:
        model.__dict__.pop(MODEL, None)
    try:
        yield
    finally:
        if waits:
            model.__dict__[MODEL] = compiled


def wait_again(model: nn.Module, compiled: CompiledModel) -> None:
    """Let a model in which nothing has shrunk wait for a call, as it did before its first."""
    for name in compiled.regions:
        plain(model.get_submodule(name))
    plain(model)
    compiled.regions, compiled.not_captured = {}, {}
    state = compiled.state
    state.captures, state.joints, state.joint_refusals, state.flow = [], (), (), None
    state.withheld, state.elsewhere = frozenset(), frozenset()
    state.adopt(Plan(), {})
    compiled.attach(model)


def without_graphs(model: nn.Module, compiled: CompiledModel) -> None:
    """Drop all graphs of a model that has shrunk, as pickle does: calls are captured as they come."""
    for region in compiled.regions.values():
        region.__dict__.update(region.__getstate__())
    compiled.state.__dict__.update(compiled.state.__getstate__())
    if compiled.execution == "module":
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
