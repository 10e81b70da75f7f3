"""Numbers: integers by which blocks that are equal otherwise find their own part of an object that all are given.

A cache has an entry per layer, and every layer knows its number. If that is all that a forward does with it, what was
captured of one layer is right for the others with their numbers in its place. To see what it does, numbers are put in
the place of the integers that are no integers for Python, so that nothing uses them unseen, and the forward runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from ecospa_fx.passes.ir.state_access import IndexAttributes

from .int_proxy import IntProxy

if TYPE_CHECKING:
    from .tracker import Tracker


def index_attributes(module: nn.Module, seen: Tracker, run: Callable[[], Tracker]) -> IndexAttributes:
    """Which integers of a region only say which part of an object is its own.

    Args:
        module: the region.
        seen: what a forward did with the objects of a call.
        run: does it again.
    """
    candidates = {
        (path, name): value
        for path, child in module.named_modules()
        for name, value in vars(child).items()
        if type(value) is int and value in seen.integers()
    }
    while candidates:
        stand_ins = [IntProxy(attribute, value) for attribute, value in candidates.items()]
        with _installed(module, stand_ins):
            try:
                tracker = run()
            except Exception:
                return IndexAttributes()
        used = {number.attribute for number in stand_ins if number.used}
        if not used:
            break
        candidates = {attribute: value for attribute, value in candidates.items() if attribute not in used}
    else:
        return IndexAttributes()
    entries, leaves = tracker.numbered()
    if entries is None:
        return IndexAttributes()
    met = {attribute for attributes in entries.values() for attribute in attributes} | set(leaves.values())
    compared = [(n.attribute, *what) for n in stand_ins for what in n.compared]
    met |= {attribute for attribute, *_ in compared}
    return IndexAttributes({a: value for a, value in candidates.items() if a in met}, compared, entries, leaves)


@contextmanager
def _installed(module: nn.Module, stand_ins: Sequence[IntProxy]) -> Iterator[None]:
    named = dict(module.named_modules())
    try:
        for number in stand_ins:
            path, name = number.attribute
            named[path].__dict__[name] = number
        yield
    finally:
        for number in stand_ins:
            path, name = number.attribute
            named[path].__dict__[name] = number.value
