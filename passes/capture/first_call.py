"""First calls: what a forward does once, such as filling a cache or setting weights from the first batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.passes.graph.isolate import Draws, restored_parameters
from ecospa_fx.passes.graph.namespaces import WHOLE
from ecospa_fx.passes.graph.python_state import PythonState, StateChange, put_back, put_item
from ecospa_fx.passes.graph.tensors import parameters_of


def make(change: StateChange) -> None:
    """Make a change that a forward made."""
    owner, key, after = change.owner, change.key, change.after
    if key is WHOLE:
        put_back(owner, after)
    else:
        put_item(owner, key, after)


@contextmanager
def after_first_call(module: nn.Module, filled: Sequence[StateChange]) -> Iterator[None]:
    """Let a module be, for a time, as its first call leaves it, but for parameters and buffers."""
    before = PythonState(module)
    try:
        before.lend()
        for change in filled:
            make(change)
        yield
    finally:
        before.restore()


def first_only(
    module: nn.Module,
    filled: Sequence[StateChange],
    run: Callable[[], Any],
    isolated: Callable[[], AbstractContextManager[None]],
) -> str | None:
    """Say what the first call of a forward does beside filling caches; None if nothing.

    A call from the same state, with the caches filled, shows the difference.

    Args:
        module: the module, before its first call.
        filled: the changes to caches that the first call makes.
        run: runs a call.
        isolated: makes a context that puts back all that happens in it.
    """
    with isolated():
        first = _outcome(module, run)
    with isolated(), after_first_call(module, filled):
        later = _outcome(module, run)
    named = dict(parameters_of(module))
    for kind, number in first.draws.items():
        if number != later.draws[kind]:
            return f"draws from the random generator of {kind}"
    for name in {**first.written, **later.written}:
        a, b = (each.written[name] if name in each.written else named[name] for each in (first, later))
        if not _close(a, b):
            return f"changes `{name}`"
    same = len(first.results) == len(later.results) and all(map(_close, first.results, later.results))
    return None if same else "gives other results"


@dataclass(frozen=True)
class _Outcome:
    """The results of a call, the buffers and the parameters that it leaves, and the generators."""

    results: list[Tensor]
    written: dict[str, Tensor]
    draws: dict[str, Any]


def _outcome(module: nn.Module, run: Callable[[], Any]) -> _Outcome:
    before = PythonState(module)
    try:
        with restored_parameters(module) as writes:
            result = run()
            written = {name: p.detach().clone() for name, p in parameters_of(module) if writes.wrote(p)}
            written |= {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
        results = [leaf.detach().clone() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        return _Outcome(results, written, Draws().state())
    finally:
        before.restore()


def _close(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.layout) != (b.shape, b.dtype, b.layout):
        return False
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    return torch.equal(a, b) or torch.allclose(a, b, equal_nan=True)
