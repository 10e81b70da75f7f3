"""Constructed: a function with arguments that made a model, as a maker of models at other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from ecospa_fx.errors import FormatError

from .compiled import CompiledModel
from .described import Described
from .making import Maker, Number, Where, neutral_numbers, wanted_under


class Constructed(Described):
    """A compiled model, described by the arguments of a function that made it.

    Args:
        model: the model.
        compiled: its state.
        make: `make(**given)` makes the original model.
        given: the arguments.

    Raises:
        FormatError: it makes another one.
    """

    def __init__(
        self, model: nn.Module, compiled: CompiledModel, make: Callable[..., nn.Module], given: Mapping[str, Any]
    ) -> None:
        self.given = given
        self._taken = {**_defaults(type(model).__init__), **_defaults(make)}
        unset: dict[Where, Number | None] = {
            where: value for where, value in _numbers(self._taken) if where[0] not in given
        }
        maker = Maker(dict(_numbers(given)), lambda changes: make(**self.arguments(changes)))
        what = f"{getattr(make, '__name__', type(make).__name__)}(...)"
        super().__init__(model, compiled, maker, what)
        original = wanted_under(model, compiled, None)
        wrong = original.wrong(maker.on_meta({}))
        if wrong:
            name, dim = min(wrong, key=str)
            raise FormatError(
                f"with these arguments {what} does not make the original of this {self.kind}, `{name}` dim {dim} was "
                f"{original.facts.get((name, dim))}; pass the arguments that the model was made with"
            )
        maker.numbers = {**maker.numbers, **neutral_numbers(maker, original, unset)}

    def arguments(self, changes: Mapping[Where, Number]) -> dict[str, Any]:
        """Return the arguments with other numbers."""
        arguments = dict(self.given)
        for where, new in changes.items():
            name = str(where[0])
            if len(where) == 1:
                arguments[name] = new
            else:
                held: Any = arguments.get(name, self._taken.get(name))
                items = (new if i == where[1] else item for i, item in enumerate(held))
                arguments[name] = type(held)(items)
        return arguments


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the default values of the arguments of a function."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _numbers(arguments: Mapping[str, Any]) -> Iterator[tuple[Where, Number]]:
    """Yield the numbers among arguments, also those in tuples and lists, with the way to each."""
    for name, value in arguments.items():
        if type(value) in (int, float) and value > 0:
            yield (name,), value
        elif type(value) in (tuple, list) and value and all(type(item) in (int, float) for item in value):
            yield from (((name, i), item) for i, item in enumerate(value) if item > 0)
