"""Proxies: objects, lists and dicts like those of a call, which tell a `Tracker` what happens to them."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

from ecospa_fx.passes.ir.state_access import ABSENT, Keys, Length

from .number import IntProxy

if TYPE_CHECKING:
    from .tracker import Tracker


class Proxy:
    """First base of the class of a proxy; its own class comes second."""

    _ecospa_tracker: ClassVar[Tracker]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Classes may keep a list of those made from them, in which proxies have no place."""

    def __getattribute__(self, name: str) -> Any:
        if name[:2] == "__" or name == "_ecospa_tracker":
            return super().__getattribute__(name)
        tracker = type(self)._ecospa_tracker
        try:
            value = super().__getattribute__(name)
        except AttributeError:
            tracker.read(self, lambda at: at.attribute(name), ABSENT)
            raise
        if isinstance(value, MethodType) and value.__self__ is self:
            return lambda *args, **kwargs: tracker.call(self, value, args, kwargs)
        if name in self.__dict__:
            return tracker.read(self, lambda at: at.attribute(name), value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__:
            type(self)._ecospa_tracker.write(self, lambda at: at.attribute(name), value)

    def __delattr__(self, name: str) -> None:
        type(self)._ecospa_tracker.restructure(self)
        super().__delattr__(name)


def _restructuring(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.tracker.restructure(self)
        return getattr(super(type(self), self), name)(*args, **kwargs)

    return method


class ProxyList(list):  # type: ignore[type-arg]
    """A list in an object."""

    tracker: Tracker

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, (int, IntProxy)):
            return list(self)[index]
        index = self.tracker.key(self, index)
        return self.tracker.read(self, lambda at: at.entry(int(index)), super().__getitem__(index))

    def __len__(self) -> int:
        length = super().__len__()
        self.tracker.read(self, lambda at: at, Length(length))
        return length

    def __bool__(self) -> bool:
        return len(self) > 0

    def __iter__(self) -> Iterator[Any]:
        for i in range(len(self)):
            yield self[i]

    def __contains__(self, value: Any) -> bool:
        return any(item is value or item == value for item in self)

    def __setitem__(self, index: Any, value: Any) -> None:
        index = self.tracker.key(self, index)
        super().__setitem__(index, value)
        self.tracker.write(self, lambda at: at.entry(index), value)

    append, extend, insert, pop, remove, clear, sort, reverse, __delitem__, __iadd__ = map(
        _restructuring,
        ("append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse", "__delitem__", "__iadd__"),
    )


class ProxyDict(dict):  # type: ignore[type-arg]
    """A dict in an object."""

    tracker: Tracker

    def get(self, key: Any, default: Any = None) -> Any:
        """As of any dict."""
        key = self.tracker.key(self, key)
        found = self.tracker.read(self, lambda at: at.entry(key), super().get(key, ABSENT))
        return default if found is ABSENT else found

    def __getitem__(self, key: Any) -> Any:
        key = self.tracker.key(self, key)
        found = self.tracker.read(self, lambda at: at.entry(key), super().get(key, ABSENT))
        return super().__getitem__(key) if found is ABSENT else found

    def __contains__(self, key: Any) -> bool:
        return self.get(key, ABSENT) is not ABSENT

    def _all(self) -> list[Any]:
        keys = list(super().keys())
        self.tracker.read(self, lambda at: at, Keys(tuple(keys)))
        return keys

    def __len__(self) -> int:
        return len(self._all())

    def __bool__(self) -> bool:
        return bool(self._all())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())

    def keys(self) -> Any:
        """As of any dict."""
        return dict.fromkeys(self._all()).keys()

    def values(self) -> Any:
        """As of any dict, at once."""
        return [self[key] for key in self._all()]

    def items(self) -> Any:
        """As of any dict, at once."""
        return [(key, self[key]) for key in self._all()]

    def __setitem__(self, key: Any, value: Any) -> None:
        key = self.tracker.key(self, key)
        super().__setitem__(key, value)
        self.tracker.write(self, lambda at: at.entry(key), value)

    setdefault, update, pop, popitem, clear, __delitem__, __ior__ = map(
        _restructuring, ("setdefault", "update", "pop", "popitem", "clear", "__delitem__", "__ior__")
    )
