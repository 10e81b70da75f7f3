"""Outside numbers: those that a forward reads in Python while no region runs.

Around its regions a model's own Python goes on. What it computes there with a number of its configuration is in no
graph, so that a model made with another number may compute something else, and no program would show it.

    OutsideNumbers.watching(model)      records the reads of forwards
    OutsideNumbers.places(regions)      -> where the numbers are that are read outside of these regions
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ecospa_fx.passes.graph.python_state import is_record
from ecospa_fx.passes.graph.stand_in_class import stand_in_class

from .outside_uses import running_hooks

Place = tuple[str, tuple[str, ...]]
"""Path of a submodule, and the attributes that lead from it to a number, or to numbers in a list."""


class OutsideNumbers:
    """The numbers that the forwards of a model read in attributes of its modules and of objects that these hold."""

    def __init__(self) -> None:
        self._read: dict[Place, set[frozenset[str]]] = {}  # with the submodules that were running
        self._running: list[str] = []

    def places(self, regions: Collection[str]) -> frozenset[Place]:
        """Return the places of the numbers that are read while none of these submodules runs."""
        regions = set(regions)
        if "" in regions:
            return frozenset()
        return frozenset(place for place, reads in self._read.items() if any(not each & regions for each in reads))

    @contextmanager
    def watching(self, model: nn.Module, closed: Collection[str] = ()) -> Iterator[None]:
        """Record the reads of the forwards inside the `with` block.

        Args:
            model: the model.
            closed: submodules in which no reads are recorded, since they would be regions themselves, as a whole.
        """
        handles: list[Any] = []
        swapped: list[tuple[Any, type]] = []
        watched: set[int] = set()
        modules = dict(model.named_modules())
        below = tuple(f"{name}." for name in closed)
        try:
            for path, module in modules.items():
                if not path.startswith(below):
                    self._watch(module, path, (), swapped, watched)
            handles += running_hooks(modules, self._running)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for owner, cls in reversed(swapped):
                object.__setattr__(owner, "__class__", cls)
            self._running.clear()

    def _watch(
        self, owner: Any, path: str, names: tuple[str, ...], swapped: list[tuple[Any, type]], watched: set[int]
    ) -> None:
        """Hear what is read of an object, and of those that it holds once they are read."""
        cls: Any = type(owner)
        watched.add(id(owner))

        def getattribute(self_: Any, name: str) -> Any:
            found = cls.__getattribute__(self_, name)
            if name[:2] != "__":
                hear(name, found)
            return found

        def hear(name: str, value: Any) -> None:
            if _is_number(value):
                self._read.setdefault((path, (*names, name)), set()).add(frozenset(self._running))
            elif id(value) not in watched and is_record(value) and name[:1] != "_":
                self._watch(value, path, (*names, name), swapped, watched)

        try:
            stand_in = stand_in_class(cls, {"__getattribute__": getattribute})
            object.__setattr__(owner, "__class__", stand_in)
        except TypeError:  # its class is built in, or allows no other
            return
        swapped.append((owner, cls))


def numbers_at(model: nn.Module, place: Place) -> Any:
    """Return what is at a place in a model.

    Raises:
        AttributeError: nothing is.
    """
    path, names = place
    return functools.reduce(getattr, names, model.get_submodule(path))


def _is_number(value: Any) -> bool:
    if type(value) in (list, tuple):
        return len(value) > 0 and all(type(item) in (int, float) for item in value)
    return type(value) in (int, float)
