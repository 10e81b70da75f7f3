"""Uncompiled: functions and modules that torch.compile made run as the Python that they were made from.

A forward may call such a function: a helper with `@torch.compile`, flex_attention, which compiles itself. While a
forward is watched, traced or tried, its compiled code would be traced together with whatever watches it, and what it
stores in globals would look like state of the model.

Ops that take functions (`torch.cond`) compile themselves, too, and compute gradients in no other way: they are left
alone. Of them, flex_attention alone cannot be traced with what watches, and computes the same when it is told not to.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_here = threading.local()  # `depth`: how many times this thread is inside
_counting = threading.Lock()
_inside = 0  # of all threads


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what torch.compile made as Python, in this thread; others go on with their compiled code.

    `torch.compiler.set_stance("force_eager")` does the same in all of them.
    """
    global _inside
    import torch._dynamo.eval_frame  # here, for they take long; a capture needs them anyway
    import torch.nn.attention.flex_attention as flex

    with _counting:
        if not _inside:
            torch._dynamo.eval_frame._stance = _Stance(torch._dynamo.eval_frame._stance)  # type: ignore[assignment]
            told: Any = _Told(flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG)
            flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = told
        _inside += 1
    _here.depth = getattr(_here, "depth", 0) + 1
    try:
        yield
    finally:
        _here.depth -= 1
        with _counting:
            _inside -= 1
            if not _inside and isinstance(stance := torch._dynamo.eval_frame._stance, _Stance):
                torch._dynamo.eval_frame._stance = stance.others
            if not _inside and isinstance(told := flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG, _Told):
                flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = told.others


def _is_inside() -> bool:
    return getattr(_here, "depth", 0) > 0


class _Told:
    """Whether flex_attention is told not to compile itself: in threads that are inside, in others as before."""

    def __init__(self, others: Any) -> None:
        self.others = others

    def __bool__(self) -> bool:
        return _is_inside() or bool(self.others)


class _Stance:
    """What torch.compile is to do: nothing in threads that are inside, in others what it did before."""

    def __init__(self, others: Any) -> None:
        self.others = others

    @property
    def stance(self) -> str:
        by_itself = torch._higher_order_ops.utils._in_hop_compile()
        return "force_eager" if _is_inside() and not by_itself else self.others.stance

    def __getattr__(self, name: str) -> Any:
        return getattr(self.others, name)
