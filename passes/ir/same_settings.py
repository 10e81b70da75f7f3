"""Same settings: a generated function that says whether constants in attributes are as they were read, to be traced.

torch.compile traces the code of a program, in which constants are numbers. So something must read the attributes that
they come from, or a change of one would not be noticed. `unchanged` names the objects of one region, and equal blocks
would each be compiled; this names none: torch.compile has one graph of equal blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .guards import Contents, ModuleRoot, Read, attribute_of


def same_settings(reads: Sequence[Read]) -> Callable[[nn.Module], bool]:
    """Return a function of a region that says whether numbers, texts and the like are as these reads have them.

    Args:
        reads: values that a forward reads. Those that begin elsewhere than in a submodule of the region, and those of
            objects, are left out.
    """
    return _function("".join(f"        if not ({condition}): return False\n" for condition in _conditions(reads)))


@functools.lru_cache(maxsize=1 << 12)
def _function(lines: str) -> Callable[[nn.Module], bool]:
    scope: dict[str, Any] = {"attribute_of": attribute_of, "torch": torch}
    failures = "AttributeError, KeyError, IndexError, TypeError"
    exec(
        f"def holds(m):\n    try:\n{lines}        return True\n    except ({failures}):\n        return False\n", scope
    )
    holds: Callable[[nn.Module], bool] = scope["holds"]
    return holds


def _conditions(reads: Sequence[Read]) -> Iterator[str]:
    for read in reads:
        value = read.value
        if isinstance(value, Contents) and value.kind in (None, list, dict):
            value = value.copy
        if not isinstance(read.root, ModuleRoot) or not read.steps or not _is_plain(value):
            continue
        module = "m"
        for name in read.root.path.split(".") if read.root.path else ():
            module = f"{module}.{name}" if name.isidentifier() else f"getattr({module}, {name!r})"
        first, *more = read.steps
        place = f"attribute_of({module}, {first.key!r})"
        for step in more:
            place += f"[{step.key!r}]" if step.entry else f".{step.key}"
        if value is None or type(value) is bool or isinstance(value, torch.dtype):
            yield f"{place} is {value}"
        else:
            yield f"type(v := {place}) is {type(value).__name__} and v == {value!r}"


def _is_plain(value: Any) -> bool:
    """Return whether Python reads a value back from its text."""
    if isinstance(value, (tuple, list)):
        return type(value) in (tuple, list) and all(map(_is_plain, value))
    if type(value) is dict:
        return all(_is_plain(key) and _is_plain(entry) for key, entry in value.items())
    finite = type(value) is float and math.isfinite(value)
    return value is None or finite or type(value) in (bool, int, str) or isinstance(value, torch.dtype)
