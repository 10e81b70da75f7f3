"""Uncompiled: functions and modules that torch.compile made run as the Python that they were made from.

A forward may call such a function: a helper with `@torch.compile`, flex_attention, which compiles itself. While a
forward is watched, traced or tried, its compiled code would be traced together with whatever watches it, and what it
stores in globals would look like state of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_here = threading.local()  # `depth`: how many times this thread is inside
_counting = threading.Lock()
_inside = 0  # of all threads


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what torch.compile made as Python, in this thread; others go on with their compiled code.

    `torch.compiler.set_stance("force_eager")` does the same in all of them.
    """
    global _inside
    import torch._dynamo.eval_frame  # here, for it takes long; a capture needs it anyway

    with _counting:
        if not _inside:
            torch._dynamo.eval_frame._stance = _Stance(torch._dynamo.eval_frame._stance)  # type: ignore[assignment]
        _inside += 1
    _here.depth = getattr(_here, "depth", 0) + 1
    try:
        yield
    finally:
        _here.depth -= 1
        with _counting:
            _inside -= 1
            ours = torch._dynamo.eval_frame._stance
            if not _inside and isinstance(ours, _Stance):
                torch._dynamo.eval_frame._stance = ours.others


class _Stance:
    """What torch.compile is to do: nothing in threads that are inside, in others what it did before."""

    def __init__(self, others: Any) -> None:
        self.others = others

    @property
    def stance(self) -> str:
        inside = getattr(_here, "depth", 0)
        return "force_eager" if inside else self.others.stance

    def __getattr__(self, name: str) -> Any:
        return getattr(self.others, name)
