"""Arguments: what public functions take, checked before they do anything.

>>> @takes(model=MODULE, depth=optional(WHOLE))
... def summary(model, *, depth=None): ...
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn

from .errors import ArgumentError

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Kind:
    """A kind of argument: in words, and as a test that knows no more than its type and what it holds."""

    words: str
    fits: Callable[[Any], bool]


def _is_call(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _has_names(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(int(value)) < 2**63


def _is_number(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False
    return True


MODULE = Kind("an nn.Module", lambda value: isinstance(value, nn.Module))
INPUTS = Kind("the positional arguments of one call, (x,)", _is_call)
KEYWORDS = Kind("the keyword arguments of one call by name, {'mask': mask}", _has_names)
NAMED = Kind("a mapping with names as keys", _has_names)
MAPPING = Kind("a mapping", lambda value: isinstance(value, Mapping))
PATH = Kind("a path", lambda value: isinstance(value, (str, os.PathLike)) and str(value) != "")
TEXT = Kind("a text", lambda value: isinstance(value, str))
WHOLE = Kind("a whole number", _is_whole)
NUMBER = Kind("a number", _is_number)
FLAG = Kind("True or False", lambda value: isinstance(value, bool))
FUNCTION = Kind("a function", callable)
FACTORY = Kind(
    "a function that makes the original model, such as its class or `lambda: Model(config)` (`resume` takes a model)",
    lambda value: callable(value) and not isinstance(value, nn.Module),
)
ONE_NUMBER = Kind(
    "a number, or a tensor of one entry",
    lambda value: (
        value.numel() == 1 and not value.is_meta and not value.is_complex()
        if isinstance(value, Tensor)
        else _is_number(value)
    ),
)
NAMES = Kind(
    "several names",
    lambda value: (
        isinstance(value, Collection)
        and not isinstance(value, (str, bytes, Tensor))
        and all(isinstance(each, str) for each in value)
    ),
)
STATEFUL = Kind(
    "an object with state_dict and load_state_dict",
    lambda value: not isinstance(value, type) and hasattr(value, "state_dict") and hasattr(value, "load_state_dict"),
)
SEVERAL = Kind(
    "several, in a list or a tuple",
    lambda value: isinstance(value, Iterable) and not isinstance(value, (str, bytes, Tensor)),
)


def optional(kind: Kind) -> Kind:
    """Return the kind that None is of too."""
    return Kind(f"{kind.words}, or None", lambda value: value is None or kind.fits(value))


CALL: Mapping[str, Kind] = {"example_inputs": optional(INPUTS), "example_kwargs": optional(KEYWORDS)}


def either(*kinds: Kind) -> Kind:
    """Return the kind of what is of any of these."""
    return Kind(", or ".join(kind.words for kind in kinds), lambda value: any(kind.fits(value) for kind in kinds))


REGIONS = either(TEXT, NAMES)
TRAINING: Mapping[str, Kind] = {
    "trainer": optional(STATEFUL),
    "scheduler": optional(either(STATEFUL, SEVERAL)),
    "scaler": optional(STATEFUL),
}


def instance(words: str, *classes: type) -> Kind:
    """Return the kind of instances of some classes."""
    return Kind(words, lambda value: isinstance(value, classes))


def instances(words: str, *classes: type) -> Kind:
    """Return the kind of sequences of instances of some classes."""
    return Kind(words, lambda value: isinstance(value, Sequence) and all(isinstance(each, classes) for each in value))


def having(words: str, *names: str) -> Kind:
    """Return the kind of objects with these attributes."""
    return Kind(words, lambda value: not isinstance(value, type) and all(hasattr(value, name) for name in names))


def takes(**kinds: Kind) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function to refuse arguments that are not of these kinds."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters
        assert kinds.keys() <= parameters.keys(), function
        places = [(kinds[name], name, i) for i, name in enumerate(parameters) if name in kinds]
        what = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for kind, name, i in places:
                if i < len(args):
                    check(args[i], kind, name, what)
                elif name in kwargs:
                    check(kwargs[name], kind, name, what)
            return function(*args, **kwargs)

        return checked

    return decorate


def check(value: Any, kind: Kind, name: str, where: str) -> None:
    """Refuse an argument that is not of its kind.

    Raises:
        ArgumentError: it is not.
    """
    if not kind.fits(value):
        raise ArgumentError(f"{where}: `{name}` is {shown(value)}; it must be {kind.words}")


def shown(value: Any) -> str:
    """Show a wrong value: a small one itself, of others the type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value) if len(repr(value)) < 60 else f"a long {type(value).__name__}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor):
        return f"a tensor {value.dtype} {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def check_state(
    state: Mapping[str, Any], keys: Iterable[str], where: str, name: str = "state", made_by: str = "state_dict()"
) -> None:
    """Refuse a mapping that lacks something of what another function put into it, or holds another kind of value.

    Args:
        state: the mapping.
        keys: what it must hold; of a mapping, its values are examples.
        where: the function that takes it, for the message.
        name: of the argument.
        made_by: the function that makes such mappings.

    Raises:
        ArgumentError: it does.
    """
    way = f"it must be what {made_by} returned"
    missing = [key for key in keys if key not in state]
    if missing:
        raise ArgumentError(f"{where}: `{name}` has no {missing[0]!r}; {way}")
    for key, example in keys.items() if isinstance(keys, Mapping) else ():
        if not _alike(state[key], example):
            raise ArgumentError(f"{where}: `{name}` has {key!r} = {shown(state[key])}; {way}")


def _alike(value: Any, example: Any) -> bool:
    if isinstance(example, bool):
        return isinstance(value, bool)
    if isinstance(example, numbers.Real):
        return _is_number(value) and math.isfinite(value)
    if isinstance(example, (list, tuple)):
        return isinstance(value, (list, tuple))
    return example is None or isinstance(value, Mapping) == isinstance(example, Mapping)
