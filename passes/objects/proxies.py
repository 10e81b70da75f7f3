"""Proxies: objects, lists and dicts like those of a call, which report their uses to a `Listener`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, ClassVar, Protocol, TypeAlias

from ecospa_fx.passes.graph.namespaces import ABSENT
from ecospa_fx.passes.ir.state_access import Keys, Length, ObjectPath

from .int_proxy import IntProxy

Step: TypeAlias = Callable[[ObjectPath], ObjectPath]  # from the path of an object to the path of a part of it


class Listener(Protocol):
    """The receiver of all that happens to proxies, such as a `Tracker`."""

    def key(self, owner: Any, key: Any) -> Any:
        """Return the plain key that an entry of the list or dict `owner` is looked up by."""
        ...

    def read(self, owner: Any, step: Step, value: Any) -> Any:
        """Hear that the part of `owner` at `step` is read, and return the value to go on with."""
        ...

    def write(self, owner: Any, step: Step, value: Any) -> None:
        """Hear that `value` is put into `owner` at `step`."""
        ...

    def restructure(self, owner: Any) -> None:
        """Hear that parts are put into `owner` or taken out of it."""
        ...

    def call(self, owner: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of `owner`."""
        ...


class Proxy:
    """The first base of the class of a proxied object; its own class comes second."""

    _ecospa_listener: ClassVar[Listener]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep out of lists of subclasses that the object's own class may keep."""

    def __getattribute__(self, name: str) -> Any:
        if name[:2] == "__" or name == "_ecospa_listener":
            return super().__getattribute__(name)
        listener = type(self)._ecospa_listener
        try:
            value = super().__getattribute__(name)
        except AttributeError:
            listener.read(self, lambda at: at.attribute(name), ABSENT)
            raise
        if isinstance(value, MethodType) and value.__self__ is self:
            return lambda *args, **kwargs: listener.call(self, value, args, kwargs)
        if name in self.__dict__:
            return listener.read(self, lambda at: at.attribute(name), value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__:
            type(self)._ecospa_listener.write(self, lambda at: at.attribute(name), value)

    def __delattr__(self, name: str) -> None:
        type(self)._ecospa_listener.restructure(self)
        super().__delattr__(name)


def _restructuring(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.listener.restructure(self)
        return getattr(super(type(self), self), name)(*args, **kwargs)

    return method


class ProxyList(list):  # type: ignore[type-arg]
    """A list in an object."""

    listener: Listener

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, (int, IntProxy)):
            return list(self)[index]
        index = self.listener.key(self, index)
        return self.listener.read(self, lambda at: at.entry(int(index)), super().__getitem__(index))

    def __len__(self) -> int:
        length = super().__len__()
        self.listener.read(self, lambda at: at, Length(length))
        return length

    def __bool__(self) -> bool:
        return len(self) > 0

    def __iter__(self) -> Iterator[Any]:
        for i in range(len(self)):
            yield self[i]

    def __contains__(self, value: Any) -> bool:
        return any(item is value or item == value for item in self)

    def __setitem__(self, index: Any, value: Any) -> None:
        index = self.listener.key(self, index)
        super().__setitem__(index, value)
        self.listener.write(self, lambda at: at.entry(index), value)

    append, extend, insert, pop, remove, clear, sort, reverse, __delitem__, __iadd__ = map(
        _restructuring,
        ("append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse", "__delitem__", "__iadd__"),
    )


class ProxyDict(dict):  # type: ignore[type-arg]
    """A dict in an object."""

    listener: Listener

    def get(self, key: Any, default: Any = None) -> Any:
        """Act as any dict does."""
        key = self.listener.key(self, key)
        found = self.listener.read(self, lambda at: at.entry(key), super().get(key, ABSENT))
        return default if found is ABSENT else found

    def __getitem__(self, key: Any) -> Any:
        key = self.listener.key(self, key)
        found = self.listener.read(self, lambda at: at.entry(key), super().get(key, ABSENT))
        return super().__getitem__(key) if found is ABSENT else found

    def __contains__(self, key: Any) -> bool:
        return self.get(key, ABSENT) is not ABSENT

    def _all(self) -> list[Any]:
        keys = list(super().keys())
        self.listener.read(self, lambda at: at, Keys(tuple(keys)))
        return keys

    def __len__(self) -> int:
        return len(self._all())

    def __bool__(self) -> bool:
        return bool(self._all())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())

    def keys(self) -> Any:
        """Act as any dict does."""
        return dict.fromkeys(self._all()).keys()

    def values(self) -> Any:
        """Act as any dict does, but as a list."""
        return [self[key] for key in self._all()]

    def items(self) -> Any:
        """Act as any dict does, but as a list."""
        return [(key, self[key]) for key in self._all()]

    def __setitem__(self, key: Any, value: Any) -> None:
        key = self.listener.key(self, key)
        super().__setitem__(key, value)
        self.listener.write(self, lambda at: at.entry(key), value)

    setdefault, update, pop, popitem, clear, __delitem__, __ior__ = map(
        _restructuring, ("setdefault", "update", "pop", "popitem", "clear", "__delitem__", "__ior__")
    )
