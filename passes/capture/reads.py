"""Reads: everything that a forward reads in Python, recorded while it runs.

    with recorded_reads(module, codes) as reads:
        forward(...)
    reads.attributes    names of the attributes of each submodule
    reads.others()      values in objects, containers, globals, cells and classes, as `Read`s

Attributes are seen through a subclass that each module, and each object that one of them holds, is of for that time.
The code that runs is known from a profile of an earlier call (`executed`), and with it the globals that it names.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from ecospa_fx.passes.graph.namespaces import (
    ABSENT,
    WHOLE,
    Code,
    cells_of,
    foreign_code,
    function_of,
    functions_with_cells,
    mutable_defaults,
    names_in,
    namespaces,
    seen_in,
    value_in,
)
from ecospa_fx.passes.graph.python_state import (
    OWN,
    StateChange,
    contents,
    is_array,
    is_constant,
    is_record,
    path_of,
    put_back,
    same,
)
from ecospa_fx.passes.graph.stand_in_class import stand_in_class
from ecospa_fx.passes.graph.stores import put_profile
from ecospa_fx.passes.ir.guards import Alias, Contents, ModuleRoot, OfClass, Read
from ecospa_fx.passes.ir.state_access import PathItem

AttributeReads = Mapping[str, set[str]]  # submodule path -> names of the attributes that forward reads

_MOST = 4096  # entries of a container that is compared at every call; of a longer one only the length is
_DEPTH = 5  # containers in containers


class Reads:
    """The reads of one forward, or of several.

    Attributes:
        attributes: names of the attributes that are read, by the path of a submodule.
        writes: the attributes that are assigned, of modules and of objects that were read.

    Args:
        module: the module.
        code: functions that the forward runs, see `executed`.
    """

    def __init__(self, module: nn.Module, code: Code) -> None:
        self.module, self.code = module, code
        self._names = names_in(code)
        self.attributes: dict[str, set[str]] = {path: set() for path, _ in module.named_modules()}
        self.writes: list[tuple[Any, str]] = []
        self._reads: dict[Any, Read] = {}
        self._before = {path: dict(child.__dict__) for path, child in module.named_modules()}
        self._first: dict[tuple[str, str], Any] = {}  # the first value read of each attribute
        self._swapped: list[tuple[Any, type]] = []
        self._with_cells: set[CodeType] = set()  # of functions that are read and run, whose cells are reads too
        self._watched: dict[int, tuple[Any, Read]] = {}  # by identity, with its first read

    def others(self, settings: Collection[tuple[str, str]]) -> tuple[Read, ...]:
        """Return the values read that are not among the constant attributes of modules."""
        known = {(ModuleRoot(path), (PathItem(name),)) for path, name in settings}
        return tuple(read for key, read in self._reads.items() if key not in known)

    def read_before(self, path: str, name: str) -> bool:
        """Return whether an attribute was read at the value that it had before the forward, if any."""
        if (path, name) not in self._first:
            return False
        return same(self._first[path, name], self._before[path].get(name, ABSENT))

    def watch(self) -> None:
        """Begin to record attributes of the modules."""
        for path, child in self.module.named_modules():
            self._swap(child, functools.partial(self._of_module, path))

    def unwatch(self) -> None:
        """Give every module and object its class back."""
        for value, cls in reversed(self._swapped):
            object.__setattr__(value, "__class__", cls)
        self._swapped.clear()

    def _swap(self, value: Any, hear: Callable[[Any, str, Any], None]) -> bool:
        cls: Any = type(value)

        def getattribute(self: Any, name: str) -> Any:
            if name[:2] == "__":
                return cls.__getattribute__(self, name)
            try:
                found = cls.__getattribute__(self, name)
            except AttributeError:
                hear(self, name, ABSENT)
                raise
            hear(self, name, found)
            return found

        def setattribute(self: Any, name: str, value: Any) -> None:
            cls.__setattr__(self, name, value)
            writes.append((self, name))

        writes = self.writes
        body = {"__getattribute__": getattribute, "__setattr__": setattribute}
        try:
            object.__setattr__(value, "__class__", stand_in_class(cls, body))
        except TypeError:  # its class is built in, or allows no other
            return False
        self._swapped.append((value, cls))
        return True

    def _of_module(self, path: str, module: nn.Module, name: str, value: Any) -> None:
        self.attributes[path].add(name)
        self._first.setdefault((path, name), value)
        if name not in OWN and value is not ABSENT and not is_constant(value) and name in module.__dict__:
            self.add(ModuleRoot(path), (PathItem(name),), value, f"{path}.{name}" if path else name)

    def add(self, root: Any, steps: tuple[PathItem, ...], value: Any, where: str, depth: int = 0) -> None:
        """Record that a value is read; in objects and containers, watch what else is read."""
        key = (root if isinstance(root, ModuleRoot) else id(root), steps)
        if key in self._reads or (isinstance(value, (nn.Module, ModuleType)) and not depth):
            return
        if is_record(value):
            if id(value) in self._watched:  # under another name, at which its attributes are recorded
                self._reads[key] = Read(root, steps, Alias(self._watched[id(value)][1]), where)
            else:
                if isinstance(value, (dict, list, set)):  # of a class of its own
                    self._container(root, steps, value, where, key, depth)
                else:
                    self._reads[key] = Read(root, steps, OfClass(type(value)), where)
                self._watched[id(value)] = value, self._reads[key]
                if not self._swap(value, functools.partial(self._of_object, root, steps, where)):
                    for name, item in contents(value).items():
                        self.add(root, (*steps, PathItem(name)), item, f"{where}.{name}", depth + 1)
        elif isinstance(value, (dict, list, tuple, set, frozenset)) and not is_constant(value):
            self._container(root, steps, value, where, key, depth)
        elif is_array(value):
            self._reads[key] = Read(root, steps, Contents(value.copy()), where)
        else:
            self._reads[key] = read = Read(root, steps, value, where)
            if isinstance(value, FunctionType) and id(value) not in self._watched:  # some refer to themselves
                self._watched[id(value)] = value, read
                named = {name: item for name, item in vars(value).items() if name in self._names}
                for name, item in (named | mutable_defaults(value)).items():
                    self.add(root, (*steps, PathItem(name)), item, f"{where}.{name}", depth + 1)
                if value.__closure__ and value.__code__ in self.code:
                    self._with_cells.add(value.__code__)
                    self.add_names(cells_of(value))

    def add_names(self, names: Iterable[tuple[Any, str, str]]) -> None:
        """Record the values of names outside of the modules, see `namespaces`."""
        for namespace, name, where in names:
            entry = isinstance(namespace, dict)
            value = seen_in(namespace, name) if isinstance(namespace, type) else value_in(namespace, name)
            if value is not ABSENT and not isinstance(value, ModuleType):
                self.add(namespace, (PathItem(name, entry=entry),), value, where)

    def add_other_cells(self) -> None:
        """Record the cells of functions that ran and have not been read in a way that was heard."""
        for function in functions_with_cells(self.code):
            if function.__code__ not in self._with_cells:
                self.add_names(cells_of(function))

    def _container(self, root: Any, steps: tuple[PathItem, ...], value: Any, where: str, key: Any, depth: int) -> None:
        if len(value) > _MOST or depth > _DEPTH or (not hasattr(value, "copy") and not isinstance(value, tuple)):
            self._reads[key] = Read(root, steps, OfClass(type(value)), where)
            return
        self._reads[key] = Read(root, steps, Contents.of(value), where)
        if not isinstance(value, (set, frozenset)):
            for name, item in value.items() if isinstance(value, dict) else enumerate(value):
                if not _flat(item):
                    self.add(root, (*steps, PathItem(name, entry=True)), item, f"{where}[{name!r}]", depth + 1)

    def _of_object(self, root: Any, steps: tuple[PathItem, ...], where: str, owner: Any, name: str, value: Any) -> None:
        held = object.__getattribute__(owner, "__dict__")
        if name not in held:
            static = inspect.getattr_static(type(owner), name, ABSENT)
            if value is not ABSENT and not (static is value and is_constant(value)):
                return  # a method or a property, whose own reads are recorded
        self.add(root, (*steps, PathItem(name)), value, f"{where}.{name}")


def _flat(value: Any) -> bool:
    """Return whether an item has no contents of its own that could change."""
    if is_constant(value) or isinstance(value, Tensor):
        return True
    return not (is_record(value) or is_array(value) or isinstance(value, (dict, list, tuple, set)))


@contextmanager
def recorded_reads(module: nn.Module, code: Code | None = None) -> Iterator[Reads]:
    """Record all that a forward of a module reads in Python inside the `with` block.

    Args:
        module: the module.
        code: functions that the forward runs, see `executed`.
    """
    reads = Reads(module, code or {})
    try:
        reads.watch()
        reads.add_names(each for each in namespaces(module, reads.code) if not isinstance(each[0], CellType))
        yield reads
        reads.add_other_cells()
    finally:
        reads.unwatch()


@contextmanager
def executed() -> Iterator[dict[CodeType, FunctionType | dict[str, Any]]]:
    """Record the functions that run inside the `with` block, or their globals; not those of torch."""
    seen: dict[CodeType, FunctionType | dict[str, Any]] = {}
    others: set[CodeType] = set()
    before: Any = sys.getprofile()

    def profile(frame: Any, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "call" and code not in seen and code not in others:
            if foreign_code(frame.f_globals.get("__name__")):
                others.add(code)
            else:
                seen[code] = function_of(frame) or frame.f_globals

    sys.setprofile(profile)
    try:
        yield seen
    finally:
        put_profile(before)


def filled_read(module: nn.Module, change: StateChange) -> Read:
    """Return the read that holds once a forward has made a change to a cache."""
    owner, key, value = change.owner, change.key, change.after
    path = path_of(module, owner)
    root: Any = owner if path is None or isinstance(key, tuple) else ModuleRoot(path)
    if key is WHOLE:
        steps: tuple[PathItem, ...] = ()
        held = copy.copy(owner)
        put_back(held, value)
        value = Contents(held)
    elif isinstance(owner, nn.Module) and isinstance(key, tuple):
        steps = (PathItem(key[0]), PathItem(key[1], entry=True))
    else:
        steps = (PathItem(key, entry=isinstance(owner, dict)),)
    if isinstance(value, (list, dict, set)):
        value = Contents(value.copy())
    return Read(root, steps, value, change.where)
