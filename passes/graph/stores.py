"""Stores: the places that a forward assigns anew at an equal value, which is equal for the same call only.

    with watched_stores(state) as stores:
        forward(...)
    stores.anew(...)     the places

A number is told from the one before by an equal copy in its place. True, None, a text and whatever else has no other
copy is told by a stand-in, which lies in its place for the time of one instruction: of a store, while nothing reads but
other threads. These share globals above all, and a store to one of these by name is told without a stand-in.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import BuiltinMethodType, CellType, CodeType, FrameType, ModuleType
from typing import Any

import torch
from torch import nn

from .namespaces import foreign_code, is_special
from .python_state import PythonState, StateChange, is_constant, item_of, put_item, same

# Methods of lists, deques and dicts that store, and return nothing.
_MUTATORS = frozenset(("append", "appendleft", "extend", "extendleft", "insert", "update"))
_CALLED = frozenset(("__setitem__", "__setattr__"))  # by name, which no profile tells of
_STORES = frozenset(("STORE_ATTR", "STORE_SUBSCR", "STORE_SLICE", "STORE_GLOBAL", "STORE_DEREF"))
# What holds functions of a whole program: methods, globals, registers. A forward does not put the same one in again.
_REGISTERS = (type, ModuleType, dict, list, deque)

SWITCH = 0.05
"""Seconds after which another thread may interrupt a forward that is watched, or a stand-in in its place."""


class _Int(int):
    """An int that is equal to another, and not the same object."""


class _Float(float):
    """A float that is equal to another, and not the same object."""


def _equal_copy(value: Any) -> Any:
    if type(value) is int:
        return _Int(value)
    if type(value) is float:
        return _Float(value)
    if type(value) in (tuple, torch.Size) and value:
        return type(value)(list(value))
    return value


def _torch_layer(owner: Any) -> bool:
    """Return whether a module is a layer of torch, whose forward assigns none of its settings."""
    plain = (nn.Module, nn.ModuleList, nn.ModuleDict, nn.Sequential)
    return isinstance(owner, nn.Module) and foreign_code(type(owner).__module__) and type(owner) not in plain


class _Place:
    """A place that holds a value of which there is no copy. It is its own stand-in."""

    def __init__(self, owner: Any, key: Any, where: str, value: Any) -> None:
        self.owner, self.key, self.where, self.value = owner, key, where, value


class Stores:
    """The places of a state, watched while a forward runs once.

    Args:
        state: the state before.
    """

    def __init__(self, state: PythonState) -> None:
        self._state = state
        self._copies: list[tuple[Any, Any, str, Any, Any]] = []
        self._attributes: dict[str, list[_Place]] = {}
        self._entries: list[_Place] = []
        self._globals: list[_Place] = []
        self._by_owner: dict[int, list[_Place]] = {}
        self._names: dict[str, list[_Place]] = {}  # globals and variables of enclosing functions
        self._open: list[_Place] = []
        self._written: dict[tuple[int, Any], _Place] = {}
        for owner, key, where, value in state.places():
            if isinstance(key, str) and is_special(key):
                continue
            copy = value if _torch_layer(owner) or isinstance(owner, ModuleType) else _equal_copy(value)
            if copy is not value:
                self._copies.append((owner, key, where, value, copy))
            elif not isinstance(owner, nn.Module) and not (callable(value) and isinstance(owner, _REGISTERS)):
                self._add(_Place(owner, key, where, value))

    def _add(self, place: _Place) -> None:
        if isinstance(place.owner, CellType):
            self._names.setdefault(place.key, []).append(place)
        elif isinstance(place.owner, (dict, list, deque)):
            (self._globals if "__builtins__" in place.owner else self._entries).append(place)
            self._by_owner.setdefault(id(place.owner), []).append(place)
            if isinstance(place.key, str):  # it may be the dict of globals
                self._names.setdefault(place.key, []).append(place)
        else:
            self._attributes.setdefault(place.key, []).append(place)

    def begin(self) -> None:
        """Put the copies in place."""
        for owner, key, _, _, copy in self._copies:
            put_item(owner, key, copy)

    def end(self) -> None:
        """Take copies and stand-ins away."""
        self._close()
        self._anew = []
        for owner, key, where, value, copy in self._copies:
            now = item_of(owner, key)
            if now is copy:
                put_item(owner, key, value)
            elif same(now, value):
                self._anew.append(StateChange(owner, where, key, value, now))

    def anew(self, writes: Iterable[tuple[Any, str]] = ()) -> list[StateChange]:
        """Return the places that have been assigned anew at an equal value.

        Args:
            writes: attributes of modules and objects that have been assigned.
        """
        found = {(id(change.owner), change.key): change for change in self._anew}
        for place in self._written.values():
            if same(place.value, item_of(place.owner, place.key)):
                found[id(place.owner), place.key] = StateChange(
                    place.owner, place.where, place.key, place.value, place.value
                )
        known = {(id(owner), key): (where, value) for owner, key, where, value in self._state.places()}
        for owner, key in writes:
            where, value = known.get((id(owner), key), ("", owner))
            if is_constant(value) and same(value, item_of(owner, key)):
                found[id(owner), key] = StateChange(owner, where, key, value, value)
        return list(found.values())

    def trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        """Put stand-ins in place before an instruction that stores, and take them away after it."""
        if self._open:
            self._close()
        if event == "call":
            if foreign_code(frame.f_globals.get("__name__")):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            store = _stores(frame.f_code).get(frame.f_lasti)
            if store is not None:
                self._stand_in(store, frame)
        return self.trace

    def profile(self, frame: FrameType, event: str, arg: Any) -> None:
        """Watch the methods of containers that store."""
        if self._open:
            self._close()
        if event != "c_call" or not self._by_owner:
            return
        if arg is setattr:
            self._put(place for places in self._attributes.values() for place in places)
        elif isinstance(arg, BuiltinMethodType) and arg.__name__ in _MUTATORS:
            self._put(self._by_owner.get(id(arg.__self__), ()))

    def _stand_in(self, store: tuple[str, Any], frame: FrameType) -> None:
        kind, argument = store
        if kind == "STORE_ATTR":
            self._put(self._attributes.get(argument, ()))
        elif kind == "STORE_GLOBAL":
            for place in self._names.get(argument, ()):
                if place.owner is frame.f_globals:
                    self._written[id(place.owner), place.key] = place
        elif kind == "STORE_DEREF":
            self._put(place for place in self._names.get(argument, ()) if isinstance(place.owner, CellType))
        else:
            self._put(self._entries)
            if "globals" in frame.f_code.co_names:
                self._put(self._globals)
            if kind == "CALL":
                self._put(place for places in self._attributes.values() for place in places)

    def _put(self, places: Iterable[_Place]) -> None:
        for place in places:
            if item_of(place.owner, place.key) is place.value:
                with suppress(AttributeError, TypeError):  # what nobody can assign, a member of an Enum, say
                    put_item(place.owner, place.key, place)
                    self._open.append(place)

    def _close(self) -> None:
        while self._open:
            place = self._open.pop()
            if item_of(place.owner, place.key) is place:
                put_item(place.owner, place.key, place.value)
                continue
            self._written[id(place.owner), place.key] = place
            if isinstance(place.owner, (list, deque)):  # it may have moved
                for i, item in enumerate(place.owner):
                    if item is place:
                        place.owner[i] = place.value


@functools.lru_cache(maxsize=4096)
def _stores(code: CodeType) -> dict[int, tuple[str, Any]]:
    """Return the instructions of code that store: offset -> name of the instruction, and its argument."""
    found: dict[int, tuple[str, Any]] = {}
    called: list[str] = []  # the methods whose arguments are being made
    for each in dis.get_instructions(code):
        if each.opname in _STORES:
            found[each.offset] = each.opname, each.argval
        elif each.opname == "LOAD_METHOD" or (each.opname == "LOAD_ATTR" and "NULL" in each.argrepr):
            called.append(each.argval)
        elif each.opname == "PUSH_NULL" or (each.opname == "LOAD_GLOBAL" and "NULL" in each.argrepr):
            called.append("")
        elif each.opname in ("CALL", "CALL_KW", "CALL_FUNCTION_EX") and called and called.pop() in _CALLED:
            found[each.offset] = "CALL", None
    return found


@contextmanager
def watched_stores(state: PythonState) -> Iterator[Stores]:
    """Watch the places of a state while a forward runs inside the `with` block, once."""
    stores = Stores(state)
    tracer, profiler, interval = sys.gettrace(), sys.getprofile(), sys.getswitchinterval()
    try:
        sys.setswitchinterval(max(interval, SWITCH))
        stores.begin()
        sys.setprofile(stores.profile)
        sys.settrace(stores.trace)
        yield stores
    finally:
        sys.settrace(tracer)
        put_profile(profiler)
        sys.setswitchinterval(interval)
        stores.end()


def put_profile(profiler: Callable[..., Any] | None) -> None:
    """Set the profile function that there was before."""
    enable: Any = getattr(profiler, "enable", None)
    sys.setprofile(None if enable is not None else profiler)
    if enable is not None:  # cProfile, which Python cannot put back as a function
        enable()
