"""Stand-in class: a subclass under the name of another class, for one object; what is assigned to it goes to that."""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any

_STANDS_FOR = "_ecospa_class"  # in the __dict__ of a stand-in


def stand_in_class(original: type, body: dict[str, Any], announced: bool = False) -> type:
    """Make a stand-in for a class.

    Args:
        original: the class.
        body: attributes of the stand-in.
        announced: its base classes are told of it, which may wrap what is in the body, as a class of transformers does
            with `forward` for activation checkpointing. Those that ask for arguments are not told.
    """
    meta = _writing_through(type(original))
    named = {"__doc__": original.__doc__, "__module__": original.__module__, "__qualname__": original.__qualname__}
    made: type | None = None
    if announced:
        with suppress(TypeError):
            made = meta(original.__name__, (original,), {**named, **body})
    made = made or quiet_subclass(original, body, meta)
    type.__setattr__(made, _STANDS_FOR, original)  # from here on, what is assigned to it goes to the original
    return made


class _Unannounced:
    """Keeps from a class that it has a new subclass: it might put that in a register, or ask for arguments."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        if _QUIETLY not in cls.__dict__:  # one that somebody else makes
            super().__init_subclass__(**arguments)


_QUIETLY = "_ecospa_quietly"  # in the __dict__ of a class of which its base classes are not told


def quiet_subclass(original: type, body: dict[str, Any], meta: Any = type) -> type:
    """Make a subclass under the name of a class, of which no class is told that asks for that (`__init_subclass__`)."""
    tells = any("__init_subclass__" in vars(base) for base in original.__mro__ if base is not object)
    bases = (_Unannounced, original) if tells and not issubclass(original, _Unannounced) else (original,)
    named = {"__doc__": original.__doc__, "__module__": original.__module__, "__qualname__": original.__qualname__}
    made: type = meta(original.__name__, bases, {**named, **body, _QUIETLY: True})
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
