"""Iterators: those of Python and itertools that a module holds, copied with what they draw from, and compared."""

from __future__ import annotations

from types import GeneratorType
from typing import Any, NoReturn

from ecospa_fx.errors import CaptureError


def is_iterator(value: Any) -> bool:
    """Return whether a value is an iterator of Python itself or of itertools."""
    return hasattr(type(value), "__next__") and type(value).__module__ in ("builtins", "itertools", "_collections")


def position(iterator: Any) -> Any:
    """Return a value that is equal for an iterator as long as nothing has drawn from it; None where it has none."""
    if isinstance(iterator, GeneratorType):
        return iterator.gi_frame and iterator.gi_frame.f_lasti
    try:
        return _leaves(iterator.__reduce__())
    except TypeError:
        return None


def _leaves(value: Any) -> Any:
    if is_iterator(value):
        return position(value)
    if isinstance(value, (tuple, list)):
        return tuple(map(_leaves, value))
    return value if value is None or isinstance(value, (int, float, str, range)) else id(value)


def copied(iterator: Any, where: str) -> Any:
    """Copy an iterator, and the iterators that it draws from.

    Args:
        iterator: the iterator.
        where: its place in words.

    Returns:
        The copy; one that raises as soon as something is drawn from it where there is no way to copy it.
    """
    try:
        return _copy(iterator)
    except TypeError:
        return _DrawnOnce(where)


def _copy(iterator: Any) -> Any:
    make, args, *state = iterator.__reduce__()  # a generator has none
    made = make(*_copied(args))
    if state and state[0] is not None:
        made.__setstate__(_copied(state[0], lists=True))
    return made


def _copied(value: Any, lists: bool = False) -> Any:
    """Copy the iterators in a value, and the lists that an iterator fills for itself."""
    if is_iterator(value):
        return _copy(value)
    if type(value) is tuple or (lists and type(value) is list):
        return type(value)(_copied(each, lists) for each in value)
    return value


class _DrawnOnce:
    """A stand-in for an iterator that cannot be copied, such as a generator: a forward that draws from it is refused.

    Args:
        where: the place of the iterator in words.
    """

    def __init__(self, where: str) -> None:
        self.where = where

    def __iter__(self) -> _DrawnOnce:
        return self

    def __next__(self) -> NoReturn:
        self._refuse()

    def __getattr__(self, name: str) -> Any:
        if name[:2] == "__":
            raise AttributeError(name)
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise CaptureError(
            f"the forward draws from `{self.where}`, a generator, whose values come only once, while a capture runs "
            "the forward several times. Hold an iterator over a list of the values, or let smaller submodules be "
            "captured (regions='auto' finds them)"
        )
