"""Threads: calls of compiled models may come from several at once, as in a server; what changes a model is alone.

with in_call():  around what runs a program or reads what a change replaces; many threads at a time
with alone():    around captures and shrinks: waits until all others have left, and they wait until it is done

A capture gives a region its original sizes for a time, watches what its Python reads and stores, and runs torch.export,
which watches every module of the process. A model's own Python around regions goes on meanwhile.

Every thread has a lock that it takes for its calls, which costs it next to nothing; who is alone takes all of them.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

_turn: Any = threading.RLock()  # of who is alone
_locks: weakref.WeakSet[Any] = weakref.WeakSet()  # one of each thread that has made calls
_own = threading.local()
_changes = 0
_NOTHING = nullcontext()


def in_call() -> AbstractContextManager[Any]:
    """Return the context of a call, which no other thread is alone in."""
    if _in_backward():
        return _NOTHING
    try:
        lock: AbstractContextManager[Any] = _own.lock
    except AttributeError:
        with _turn:
            lock = _own.lock = threading.RLock()
            _locks.add(lock)
    return lock


@contextmanager
def alone() -> Iterator[bool]:
    """Stay until every other thread has left its calls, and keep them from new ones; inside of another, do nothing.

    Calls that this thread is in itself do not count: others may be alone before it is. It is told if they were.
    """
    global _changes
    if is_alone():
        yield False
        return
    before = _changes
    with _outside_own_calls(), _turn, ExitStack() as stack:
        for lock in [each for each in _locks if each is not getattr(_own, "lock", None)]:
            stack.enter_context(lock)
        waited = _changes != before
        _changes += 1
        yield waited


@contextmanager
def _outside_own_calls() -> Iterator[None]:
    """Leave the calls that this thread is in for a while: of two that are in one and want to be alone, one waits."""
    lock: Any = getattr(_own, "lock", None)
    state: Any = None
    try:
        if lock is not None and lock._is_owned():
            state = lock._release_save()
        yield
    finally:
        if state is not None:
            lock._acquire_restore(state)


def is_alone() -> bool:
    """Return whether this thread is alone, or computes gradients, perhaps for one that is alone and waits for them."""
    return bool(_turn._is_owned()) or _in_backward()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _begin_anew() -> None:
    """Forget the other threads, in a process that was forked: there are none."""
    global _turn
    if not _turn._is_owned():
        _turn = threading.RLock()
    _locks.clear()
    lock = getattr(_own, "lock", None)
    if lock is not None and lock._is_owned():
        _locks.add(lock)
    elif lock is not None:  # who was alone may have had it
        del _own.lock


os.register_at_fork(after_in_child=_begin_anew)
