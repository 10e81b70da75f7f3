"""Containers: what dicts, lists and sets hold, past classes of them that look entries up, make or guard them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

_OWN = (dict.__getitem__, OrderedDict.__getitem__)


def plain(container: Any) -> Any:
    """Return a container; of one whose class may look up in its own way, its items as a dict, list or set."""
    if type(container).__module__ in ("builtins", "collections"):
        return container
    if isinstance(container, OrderedDict):  # whose order its dict does not know
        return dict(OrderedDict.items(container))
    kinds: tuple[Any, ...] = (dict, list, set)
    return next((kind.copy(container) for kind in kinds if isinstance(container, kind)), container)


def looks_up(container: Any) -> bool:
    """Decide whether a dict is of a class that makes or computes entries where they are looked up.

    A `defaultdict` makes them; some registries hold classes and give out instances.
    """
    cls = type(container)
    return isinstance(container, dict) and (hasattr(cls, "__missing__") or cls.__getitem__ not in _OWN)
