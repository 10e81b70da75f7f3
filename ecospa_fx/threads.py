"""Threads: calls of compiled models may come from several at once, as in a server; what changes a model is alone.

enter, leave   around each call that runs a program or reads what a change replaces; many threads at a time
alone          around captures and shrinks: waits until all others have left, and they wait until it is done

A capture gives a region its original sizes for a time, watches what its Python reads and stores, and runs torch.export,
which watches every module of the process. A model's own Python around regions goes on meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

import torch

_free = threading.Condition()
_inside: dict[int, int] = {}  # thread -> calls that it is in
_changing: int | None = None  # the thread that is alone


def enter() -> None:
    """Begin a call, once no other thread changes anything. Follow it with `leave`, whatever is raised between."""
    me = get_ident()
    _inside[me] = _inside.get(me, 0) + 1
    # In this order: a thread that is to be alone says so first, and then looks who is inside.
    if _changing is not None and _changing != me and not _in_backward():
        _wait(me)


def leave() -> None:
    """End a call."""
    me = get_ident()
    count = _inside[me] - 1
    if count:
        _inside[me] = count
    else:
        del _inside[me]
    if _changing is not None and _changing != me:
        with _free:
            _free.notify_all()


@contextmanager
def alone() -> Iterator[bool]:
    """Stay until every other thread has left its calls, and keep them from new ones; inside of another, do nothing.

    Calls that this thread is in itself do not count: others may be alone before it is. It is told if they were.
    """
    global _changing
    me = get_ident()
    if _changing == me or (_changing is not None and _in_backward()):
        yield False
        return
    with _free:
        calls = _inside.pop(me, 0)
        _free.notify_all()
        waited = _changing is not None
        while _changing is not None:
            _free.wait()
        _changing = me
    try:
        with _free:
            while any(each != me for each in list(_inside)):
                _free.wait()
        yield waited
    finally:
        with _free:
            _changing = None
            if calls:
                _inside[me] = calls
            _free.notify_all()


def is_alone() -> bool:
    """Return whether this thread is alone, or computes gradients for one that may be."""
    return _changing == get_ident() or _in_backward()


def _wait(me: int) -> None:
    with _free:
        calls = _inside.pop(me)
        _free.notify_all()
        while _changing is not None:
            _free.wait()
        _inside[me] = calls


def _in_backward() -> bool:
    """Return whether this thread computes gradients: for another, perhaps, that waits for it and is alone."""
    return torch._C._current_graph_task_id() != -1


def _begin_anew() -> None:
    """Forget the other threads, in a process that was forked: there are none."""
    global _free, _changing
    me = get_ident()
    calls = _inside.get(me, 0)
    _inside.clear()
    _inside.update({me: calls} if calls else {})
    _free, _changing = threading.Condition(), None if _changing != me else me


os.register_at_fork(after_in_child=_begin_anew)
