"""Layer numbers: integers by which blocks that are otherwise equal find their own part of an object that all share.

A cache has an entry per layer, and every layer holds its number. If a forward uses the number for nothing else, the
graph of one layer is right for the others with their numbers in its place. To find out, the forward runs once more with
an `IntProxy` in place of each such integer; Python does not take it for an int, so every use of it is recorded.
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
    """Find the integers of a region that only select its own part of an object.

    Args:
        module: the region.
        seen: the tracker of a forward with the objects of a call.
        run: runs that forward again, and returns its tracker.
    """
    candidates = {
        (path, name): value
        for path, child in module.named_modules()
        for name, value in vars(child).items()
        if type(value) is int and value in seen.integers()
    }
    while candidates:
        proxies = [IntProxy(attribute, value) for attribute, value in candidates.items()]
        with _installed(module, proxies):
            try:
                tracker = run()
            except Exception:
                return IndexAttributes()
        used = {proxy.attribute for proxy in proxies if proxy.used}
        if not used:
            break
        candidates = {attribute: value for attribute, value in candidates.items() if attribute not in used}
    else:
        return IndexAttributes()
    entries, leaves = tracker.numbered()
    if entries is None:
        return IndexAttributes()
    indices = {attribute for attributes in entries.values() for attribute in attributes} | set(leaves.values())
    compared = [(proxy.attribute, *comparison) for proxy in proxies for comparison in proxy.compared]
    indices |= {attribute for attribute, *_ in compared}
    return IndexAttributes({a: value for a, value in candidates.items() if a in indices}, compared, entries, leaves)


@contextmanager
def _installed(module: nn.Module, proxies: Sequence[IntProxy]) -> Iterator[None]:
    named = dict(module.named_modules())
    try:
        for proxy in proxies:
            path, name = proxy.attribute
            named[path].__dict__[name] = proxy
        yield
    finally:
        for proxy in proxies:
            path, name = proxy.attribute
            named[path].__dict__[name] = proxy.value
