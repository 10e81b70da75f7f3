"""Tracker: records how a forward reads, changes and calls the objects among its arguments.

    Tracker.proxies(objects)   objects of the same classes and contents, which report their uses
    -> forward(proxies)
    -> Tracker.carried()       the reads, writes and calls, as a `StateAccess`

A method that is called with tensors (`cache.update(keys, values, 3)`) is the object's own business: `edge` marks in the
graph where tensors enter and leave it, so that the nodes in between can be replaced by the call when the graph runs.
They are traced nevertheless, for their axes. The graph depends on the reads by the region's own code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ecospa_fx.errors import CaptureError
from ecospa_fx.passes.graph.boundary_op import END, LATE, edge
from ecospa_fx.passes.graph.namespaces import ABSENT
from ecospa_fx.passes.ir.state_access import (
    PLAIN,
    TENSOR,
    Keys,
    Length,
    LiveCall,
    ObjectPath,
    StateAccess,
    Stored,
    TypeCheck,
    foreign,
)

from .int_proxy import IntProxy
from .proxies import Proxy, ProxyDict, ProxyList, Step


class Tracker:
    """The listener of the proxies that one forward is called with.

    Attributes:
        tensors: the tensors of the objects that it read, as they were before, by path.
        inside: number of methods of objects, called with tensors, that are running.
    """

    def __init__(self, marking: bool) -> None:
        """Start with nothing recorded; with `marking`, put edges into the graph that is being traced."""
        self.marking = marking
        self.tensors: dict[ObjectPath, Tensor] = {}
        self.inside = 0
        self._types: tuple[type, ...] = ()
        self._reads: dict[tuple[ObjectPath, type | None], Any] = {}
        self._outside: set[tuple[ObjectPath, type | None]] = set()  # those of `_reads` by the region's own code
        self._written: dict[ObjectPath, Any] = {}  # by the region's own code
        self._changed: set[ObjectPath] = set()
        self._calls: list[LiveCall] = []
        # (list or dict, key) -> the attributes of modules that the key was; None for a key that was a plain value.
        self._keys: dict[tuple[ObjectPath, Any], set[Any]] = {}
        self._passed: dict[tuple[int, int], Any] = {}  # (call, leaf) -> the attribute of a module that was passed
        self._late: dict[int, list[ObjectPath]] = {}  # call -> tensors read once it has changed them
        self._after: dict[int, dict[ObjectPath, Any]] = {}  # call -> constants read once it has changed them
        self._initial: dict[ObjectPath, Any] = {}
        self._places: dict[int, ObjectPath] = {}
        self._proxies: list[Any] = []
        self._problem: str | None = None
        self._classes: dict[type, type] = {}

    def proxies(self, objects: Sequence[Any], given: Mapping[ObjectPath, Tensor] | None = None) -> list[Any]:
        """Make proxies of the objects of a call.

        Args:
            objects: the objects, each once.
            given: tensors to put in place of theirs.
        """
        self._types = tuple(map(type, objects))
        memo: dict[int, Any] = {}
        self._proxies = [self._proxy(value, ObjectPath(i), given or {}, memo) for i, value in enumerate(objects)]
        return self._proxies

    def _proxy(self, value: Any, place: ObjectPath, given: Mapping[ObjectPath, Tensor], memo: dict[int, Any]) -> Any:
        if id(value) in memo and not isinstance(value, Tensor):
            return memo[id(value)]
        proxy: Any = value
        if isinstance(value, Tensor):
            proxy = given.get(place, value)
        elif type(value) is tuple:
            proxy = tuple(self._proxy(item, place.entry(i), given, memo) for i, item in enumerate(value))
        elif type(value) in (list, dict) or foreign(value):
            if type(value) is list:
                proxy = memo[id(value)] = ProxyList()
                list.extend(proxy, (self._proxy(item, place.entry(i), given, memo) for i, item in enumerate(value)))
            elif type(value) is dict:
                proxy = memo[id(value)] = ProxyDict()
                dict.update(proxy, {k: self._proxy(v, place.entry(k), given, memo) for k, v in value.items()})
            else:
                proxy = memo[id(value)] = object.__new__(self._class(type(value)))
                for name, item in vars(value).items():
                    proxy.__dict__[name] = self._proxy(item, place.attribute(name), given, memo)
            if isinstance(proxy, (ProxyList, ProxyDict)):
                proxy.listener = self
            self._places[id(proxy)] = place
        self._initial[place] = proxy
        return proxy

    def _class(self, cls: type) -> type:
        if cls not in self._classes:
            body = {"_ecospa_listener": self, "__doc__": cls.__doc__, "__module__": cls.__module__,
                    "__qualname__": cls.__qualname__}  # fmt: skip
            self._classes[cls] = type(cls)(cls.__name__, (Proxy, cls), body)
        return self._classes[cls]

    def number_of(self, value: Any) -> int | None:
        """Return the number of the object that `value` is the proxy of, or None."""
        return next((i for i, proxy in enumerate(self._proxies) if proxy is value), None)

    def key(self, owner: Any, key: Any) -> Any:
        """Return the plain key that an entry of a list or dict is looked up by, which may be an `IntProxy`."""
        if isinstance(key, IntProxy):
            key.inside = lambda: self.inside > 0
        plain = key.value if isinstance(key, IntProxy) else key
        if id(owner) in self._places:
            by = key.attribute if isinstance(key, IntProxy) else None
            self._keys.setdefault((self._places[id(owner)], plain), set()).add(by)
        return plain

    def integers(self) -> set[int]:
        """Return the integers that entries were looked up by, or that methods were called with."""
        leaves = [leaf for call in self._calls for leaf in call.leaves] + [key for _, key in self._keys]
        return {leaf for leaf in leaves if type(leaf) is int}

    def numbered(self) -> tuple[dict[tuple[ObjectPath, Any], frozenset[Any]] | None, dict[tuple[int, int], Any]]:
        """Return `entries` and `leaves` of `IndexAttributes`.

        None for `entries` where the same key was an attribute of a module in one look-up and a plain value in another.
        """
        by = {where: names for where, names in self._keys.items() if names != {None}}
        if any(None in names for names in by.values()):
            return None, {}
        return {where: frozenset(names) for where, names in by.items()}, self._passed

    def refuse(self, what: str) -> None:
        """End the capture with a reason."""
        self._problem = self._problem or what
        raise CaptureError(self._problem)

    def read(self, owner: Any, step: Step, value: Any) -> Any:
        """Record that a part of a proxy is read, and return its value.

        A tensor that a method has put there becomes one more result of that method.
        """
        if id(owner) in self._places:
            here = step(self._places[id(owner)])
            if isinstance(value, Tensor) and here in self._changed and not self.inside and here not in self._written:
                return self._read_late(here, value)
            self._read(owner, step, value)
        return value

    def _read_late(self, place: ObjectPath, value: Tensor) -> Tensor:
        """Make a tensor that a method has put into its object one more result of the method."""
        number = len(self._calls) - 1
        if place.number != self._calls[number].place.number:
            self.refuse(f"reads {self._named(place)} after a method of another object has changed it")
        late = self._late.setdefault(number, [])
        late.append(place)
        return edge(value, number, LATE + len(late) - 1, True) if self.marking else value

    def _read(self, owner: Any, step: Step, value: Any) -> None:
        here = step(self._places[id(owner)])
        if here in self._changed:
            if not self.inside and here not in self._written and _plain(value):
                last = self._calls[-1].place.number
                if type(value) is int or here.number != last:
                    self.refuse(f"reads {self._named(here)} after a method has changed it")
                self._after.setdefault(len(self._calls) - 1, {})[here] = value
            return
        if isinstance(value, Tensor):
            self.tensors.setdefault(here, value)
            return
        if type(value) is tuple:
            for i, item in enumerate(value):
                self._read(owner, lambda at, i=i: step(at).entry(i), item)  # type: ignore[misc]
            value = Length(len(value))
        elif isinstance(value, (ProxyList, ProxyDict)) or id(value) in self._places:
            value = TypeCheck(type(value).__bases__[-1])
        elif not (_plain(value) or value is ABSENT or isinstance(value, (Length, Keys)) or callable(value)):
            if not self.inside:
                self.refuse(f"reads {self._named(here)}, a {type(value).__name__}, of which nothing is known")
            return
        key = (here, type(value) if isinstance(value, (Length, Keys, TypeCheck)) else None)
        self._reads.setdefault(key, value)
        if not self.inside:
            self._outside.add(key)

    def write(self, owner: Any, step: Step, value: Any) -> None:
        """Record that a value is put into a proxy."""
        if id(owner) not in self._places:
            return
        here = step(self._places[id(owner)])
        self._changed.add(here)
        if self.inside:
            return
        if not (isinstance(value, Tensor) or _plain(value)):
            self.refuse(f"puts a {type(value).__name__} into {self._named(here)} itself, not by one of its methods")
        if type(value) is int and (here, None) in self._outside and value != self._reads[here, None]:
            self.refuse(f"counts in {self._named(here)} itself, not by one of its methods: no two calls would be alike")
        self._written[here] = value

    def restructure(self, owner: Any) -> None:
        """Record that entries are put into a list or dict, or taken out of it."""
        if id(owner) in self._places:
            if not self.inside:
                self.refuse(f"changes {self._named(self._places[id(owner)])} itself, not by one of its methods")
            self._changed.add(self._places[id(owner)])

    def _named(self, place: ObjectPath) -> str:
        what = f"`{place}` of a" if place.path else "a"
        return f"{what} {self._types[place.number].__name__}"

    def call(self, owner: Any, method: Any, args: Any, kwargs: Any) -> Any:
        """Call a method of a proxy; one with tensors is recorded as a `LiveCall`."""
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=foreign)
        if self.inside or not any(isinstance(leaf, Tensor) for leaf in leaves) or id(owner) not in self._places:
            return method(*args, **kwargs)
        number, place = len(self._calls), self._places[id(owner)]
        name = method.__name__
        self._refuse_odd(leaves, place, f"calls `{name}` of {self._named(place)} with")
        self._calls.append(LiveCall(place, name, (), spec, (), spec))
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, IntProxy):
                leaf.inside = lambda: self.inside > 0
                self._passed[number, i] = leaf.attribute
        leaves = self._marked(leaves, number, out=False)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        self.inside += 1
        try:
            result = method(*args, **kwargs)
        finally:
            self.inside -= 1
        out_leaves, out_spec = pytree.tree_flatten(result, is_leaf=foreign)
        self._refuse_odd(out_leaves, place, f"gets from `{name}` of {self._named(place)}")
        out_leaves = self._marked(out_leaves, number, out=True)
        if self.marking:
            edge(next(leaf for leaf in leaves if isinstance(leaf, Tensor)), number, END, True)
        self._calls[number] = LiveCall(
            place, name, _without_tensors(leaves), spec, _without_tensors(out_leaves), out_spec
        )
        return pytree.tree_unflatten(out_leaves, out_spec)

    def _refuse_odd(self, leaves: Sequence[Any], place: ObjectPath, does: str) -> None:
        odd = [leaf for leaf in leaves if not (isinstance(leaf, (Tensor, IntProxy)) or _plain(leaf))]
        if odd:
            self.refuse(f"{does} a {type(odd[0]).__name__}, which is no constant")

    def _marked(self, leaves: Sequence[Any], number: int, *, out: bool) -> list[Any]:
        if not self.marking:
            return list(leaves)
        places = iter(range(len(leaves)))
        return [edge(leaf, number, next(places), out) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def stored(self) -> list[tuple[ObjectPath, Tensor]]:
        """Return the tensors in the objects that have been replaced, with their paths."""
        replaced: list[tuple[ObjectPath, Tensor]] = []
        seen: set[int] = set()

        def visit(value: Any, place: ObjectPath) -> None:
            if isinstance(value, Tensor):
                if self._initial.get(place) is not value:
                    replaced.append((place, value))
            elif isinstance(value, (list, tuple)):
                if id(value) not in seen:
                    seen.add(id(value))
                    for i, item in enumerate(list.__iter__(value) if isinstance(value, list) else value):
                        visit(item, place.entry(i))
            elif isinstance(value, dict):
                if id(value) not in seen:
                    seen.add(id(value))
                    for key, item in dict.items(value):
                        visit(item, place.entry(key))
            elif foreign(value) and id(value) not in seen:
                seen.add(id(value))
                for name, item in vars(value).items():
                    visit(item, place.attribute(name))

        for number, proxy in enumerate(self._proxies):
            visit(proxy, ObjectPath(number))
        return replaced

    def carried(self, stored: Sequence[ObjectPath] = ()) -> StateAccess:
        """Return all that the forward read of the objects, and changed in them.

        Args:
            stored: the paths of `stored()`.

        Raises:
            CaptureError: it did something that no graph can do, and went on where that was refused.
        """
        if self._problem:
            raise CaptureError(self._problem)
        # An integer that only methods read and change is their own counter; one that the region reads must be the same.
        reads = tuple(
            (key[0], value) for key, value in self._reads.items()
            if key in self._outside or key[0] not in self._changed or type(value) is not int
        )  # fmt: skip
        effects = [
            (place, Stored(list(stored).index(place)) if isinstance(value, Tensor) and stored else value)
            for place, value in self._written.items()
        ]
        calls = [
            replace(call, after=self._after.get(number, {}), late=tuple(self._late.get(number, ())))
            for number, call in enumerate(self._calls)
        ]
        return StateAccess(self._types, reads, tuple(self.tensors), tuple(stored), tuple(effects), tuple(calls))


def _without_tensors(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Return leaves with `TENSOR` for tensors, and plain integers for proxies."""
    plain = [leaf.value if isinstance(leaf, IntProxy) else leaf for leaf in leaves]
    return tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in plain)


def _plain(value: Any) -> bool:
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, Tensor)):
        return False
    return value is None or isinstance(value, (PLAIN, type))
