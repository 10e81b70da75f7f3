"""Guards: values that a forward read in Python while it was captured, and that a graph holds as constants.

    Read            the place of one such value: attributes, entries, globals, cells, classes
    first_changed   the first that is not as it was, and its value now
    told            that in words

The attributes of modules that are constants are `RegionGraph.settings`; everything else that was read is a `Read`.
Calls look at all of them in a generated function, see `unchanged`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import CellType
from typing import Any

from torch import Tensor, nn

from ecospa_fx.passes.graph.containers import looks_up, plain
from ecospa_fx.passes.graph.namespaces import ABSENT, put_in
from ecospa_fx.passes.graph.python_state import is_array, same
from ecospa_fx.passes.graph.stand_in_class import stands_for

from .state_access import Keys, Length, PathItem


@dataclass(frozen=True)
class ModuleRoot:
    """A submodule of the region, by its path."""

    path: str


@dataclass(frozen=True, eq=False)
class Contents:
    """A shallow copy of a list, dict, set or array; its items are compared by `same`.

    Attributes:
        copy: the copy.
        kind: the class of the container, where it is not that of the copy.
    """

    copy: Any
    kind: type | None = None

    @classmethod
    def of(cls, container: Any) -> Contents:
        """Copy a container, or keep one that is immutable."""
        held = plain(container)
        copied = held.copy() if held is container and not isinstance(held, (tuple, frozenset)) else held
        return cls(copied, type(container))


@dataclass(frozen=True)
class OfClass:
    """The class of an object on the way to a value."""

    cls: type


@dataclass(frozen=True, eq=False)
class Alias:
    """The object that another read names."""

    other: Read


@dataclass(frozen=True, eq=False)
class Read:
    """One value that a forward read.

    Attributes:
        root: a `ModuleRoot`, or the namespace itself: the globals of a function, one of its cells, a class.
        steps: from the root to the value.
        value: a constant, a tensor or function, which must be the same object, `Contents`, `OfClass`,
            `Alias` or `ABSENT`.
        where: the place in words.
    """

    root: Any
    steps: tuple[PathItem, ...]
    value: Any
    where: str

    @property
    def place(self) -> tuple[Any, tuple[PathItem, ...]]:
        """The root, by identity where it is not a submodule, and the steps."""
        return (self.root if isinstance(self.root, ModuleRoot) else id(self.root), self.steps)

    def now(self, modules: Mapping[str, nn.Module]) -> Any:
        """Return the value at this place now, `ABSENT` where there is none."""
        try:
            owner = modules[self.root.path] if isinstance(self.root, ModuleRoot) else self.root
            for number, step in enumerate(self.steps):
                if number == 0 and isinstance(self.root, ModuleRoot):
                    owner = attribute_of(owner, step.key)
                else:
                    owner = _step(owner, step)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            return ABSENT
        return owner

    def entries(self) -> tuple[Read, ...]:
        """Return a read for each entry of a list or dict; the read itself for any other value."""
        copy = self.value.copy if isinstance(self.value, Contents) else self.value
        if type(copy) not in (list, dict):
            return (self,)
        items = copy.items() if isinstance(copy, dict) else enumerate(copy)
        entries = [
            Read(self.root, (*self.steps, PathItem(key, entry=True)), value, f"{self.where}[{key!r}]")
            for key, value in items
        ]
        keys = Read(
            self.root, self.steps, Keys(tuple(copy)) if isinstance(copy, dict) else Length(len(copy)), self.where
        )
        return (keys, *entries)

    def put(self, modules: Mapping[str, nn.Module], value: Any) -> None:
        """Put a value at this place."""
        owner = modules[self.root.path] if isinstance(self.root, ModuleRoot) else self.root
        *way, last = self.steps
        for number, step in enumerate(way):
            first = number == 0 and isinstance(self.root, ModuleRoot)
            owner = attribute_of(owner, step.key) if first else _step(owner, step)
        if isinstance(owner, nn.Module):
            owner.__dict__[last.key] = value
        elif last.entry:
            owner[last.key] = value
        else:
            put_in(owner, last.key, value)

    def holds(self, modules: Mapping[str, nn.Module]) -> bool:
        """Return whether the value is as it was read."""
        if isinstance(self.value, Alias):
            return self.now(modules) is self.value.other.now(modules)
        return as_read(self.value, self.now(modules))


def attribute_of(module: nn.Module, name: str) -> Any:
    """Return an attribute of a module, or else of its class; `ABSENT` where neither has it.

    A module that has been made shrinkable computes some of its attributes, which its dict holds as they were read, and
    its class may have another forward.
    """
    value = module.__dict__.get(name, ABSENT)
    cls: Any = type(module)
    return getattr(stands_for(cls), name, ABSENT) if value is ABSENT else value


def _step(owner: Any, step: PathItem) -> Any:
    if isinstance(owner, CellType):
        return owner.cell_contents
    if step.entry and looks_up(owner):
        return dict.get(owner, step.key, ABSENT)
    return owner[step.key] if step.entry else getattr(owner, step.key)


def as_read(value: Any, now: Any) -> bool:
    """Return whether a value is as it was read; see `Read.value`."""
    if isinstance(value, OfClass):
        return type(now) is value.cls
    if isinstance(value, Keys):
        return tuple(now) == value.keys
    if isinstance(value, Length):
        return len(now) == value.number
    if isinstance(value, Contents):
        return type(now) is (value.kind or type(value.copy)) and same_contents(value.copy, plain(now))
    return same(value, now)


def same_contents(copy: Any, now: Any) -> bool:
    """Return whether a container or array still has the contents of its copy."""
    if type(copy) is not type(now):
        return False
    if not isinstance(copy, (dict, set, frozenset, list, tuple, deque)) and not is_array(copy):
        return False
    if isinstance(copy, dict):
        return list(copy) == list(now) and all(same(copy[key], now[key]) for key in copy)
    if isinstance(copy, (set, frozenset)):
        return bool(copy == now)
    if is_array(copy):
        return bool(copy.shape == now.shape and copy.dtype == now.dtype and copy.tobytes() == now.tobytes())
    return len(copy) == len(now) and all(map(same, copy, now))


def setting_read(path: str, name: str, value: Any) -> Read:
    """Return the read of a constant attribute of a submodule; a container of constants is compared by its contents."""
    held = Contents(value) if type(value) in (list, dict, set) else value
    return Read(ModuleRoot(path), (PathItem(name),), held, f"{path}.{name}" if path else name)


def forward_read(module: nn.Module, path: str) -> Read:
    """Return the read of the forward that a submodule runs: that of its class, or one that is put on the instance."""
    return Read(ModuleRoot(path), (PathItem("forward"),), attribute_of(module, "forward"), f"{path}.forward")


def first_changed(reads: Sequence[Read], modules: Mapping[str, nn.Module]) -> tuple[Read, Any] | None:
    """Return the first read that is other than it was, and its value now; None where all hold."""
    for read in reads:
        if not read.holds(modules):
            return read, read.now(modules)
    return None


def told(read: Read, now: Any) -> str:
    """Say that the value of a read has changed, with both values where they are short."""
    before = read.value.copy if isinstance(read.value, Contents) else read.value
    if isinstance(before, Alias):
        return f"`{read.where}` is no longer the same object as `{before.other.where}`"
    if isinstance(before, OfClass):
        return f"`{read.where}` is a {type(now).__name__} and was a {before.cls.__name__}"
    if isinstance(before, Tensor) or isinstance(now, Tensor):
        return f"`{read.where}` is another tensor" if isinstance(now, Tensor) else f"`{read.where}` is {_short(now)}"
    return f"`{read.where}` is {_short(now)} and was {_short(before)}"


def _short(value: Any) -> str:
    text = "a tensor" if isinstance(value, Tensor) else getattr(value, "__qualname__", None) or repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
