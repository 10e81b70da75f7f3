"""Stand-in class: a subclass under the name of another class, for one object; what is assigned to it goes to that."""

from __future__ import annotations

import functools
from typing import Any

_STANDS_FOR = "_ecospa_class"  # in the __dict__ of a stand-in


def stand_in_class(original: type, body: dict[str, Any], *first: type) -> type:
    """Make a stand-in for a class.

    Args:
        original: the class.
        body: attributes of the stand-in.
        first: its bases before the class.
    """
    named = {"__doc__": original.__doc__, "__module__": original.__module__, "__qualname__": original.__qualname__}
    made: type = _writing_through(type(original))(original.__name__, (*first, original), {**named, **body})
    type.__setattr__(made, _STANDS_FOR, original)  # from here on, what is assigned to it goes to the original
    return made


def stands_for(cls: type) -> type:
    """Return the class that a stand-in stands for, seen through classes that others have put on top, as FSDP2 does.

    Any other class is returned itself.
    """
    while (stand_in := next((base for base in cls.__mro__ if is_stand_in(base)), None)) is not None:
        cls = stand_in.__dict__[_STANDS_FOR]
    return cls


def is_stand_in(cls: type) -> bool:
    """Decide whether a class is a stand-in itself, not a subclass of one."""
    return _STANDS_FOR in cls.__dict__


def below(stand_in: type) -> Any:
    """Return the class right below a stand-in, which may be another one."""
    return stand_in.__dict__[_STANDS_FOR]


@functools.cache
def _writing_through(meta: Any) -> Any:
    """Make a metaclass whose classes hand what is assigned to them to the original: `type(self).calls += 1`."""

    def assign(cls: type, name: str, value: Any) -> None:
        original = cls.__dict__.get(_STANDS_FOR)
        if original is None or name.startswith("__"):
            meta.__setattr__(cls, name, value)
        else:
            setattr(original, name, value)

    def remove(cls: type, name: str) -> None:
        original = cls.__dict__.get(_STANDS_FOR)
        if original is None or name.startswith("__"):
            meta.__delattr__(cls, name)
        else:
            delattr(original, name)

    return type(meta.__name__, (meta,), {"__setattr__": assign, "__delattr__": remove})
