"""Shared memory: the parameters and buffers of a model that are tied, read in one pass over its tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from .tensors import storage_key


class SharedMemory:
    """The names of tensors whose memory something else in the model uses too.

    Args:
        named: all tensors of the model, by every name that they have.

    Attributes:
        groups: the names of those that share memory, by memory.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        names: dict[Any, list[str]] = defaultdict(list)
        for name, tensor in named.items():
            names[storage_key(tensor)].append(name)
        self.groups = [group for group in names.values() if len(group) > 1]

    def outside(self, region: str) -> dict[str, str]:
        """Find the tensors of a region whose memory something outside it uses too: name in it -> where, in words."""
        if not region:
            return {}
        found: dict[str, str] = {}
        for group in self.groups:
            other = next((name for name in group if not name.startswith(f"{region}.")), None)
            if other is not None:
                found |= dict.fromkeys(_within(region, group), f"as `{other}`")
        return found

    def tied(self, region: str, names: Collection[str]) -> dict[str, str]:
        """Find the tied tensors among some of a region: name in it -> the first of `names` with its memory."""
        found: dict[str, str] = {}
        for group in self.groups:
            inside = set(_within(region, group))
            if len(inside) > 1:
                first, *others = [name for name in names if name in inside] or [""]
                found |= dict.fromkeys(others, first)
        return found


def _within(region: str, names: Iterable[str]) -> list[str]:
    return [
        name.removeprefix(f"{region}.") if region else name
        for name in names
        if not region or name.startswith(f"{region}.")
    ]
