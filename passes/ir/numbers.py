"""Numbers: constants of a graph that a training loop changes from call to call, and that are its inputs instead.

TrackedFloat       stands for such a number while a forward is traced, and records what it is compared with
-> as_inputs       the places in a graph where two captures at other values hold these values, and nothing else
-> Number          read at every call, see `RegionGraph.numbers`
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .guards import Read

Place = tuple[int | str, ...]  # the keys that lead to an argument of a node: `(1,)`, `("p",)`, `(0, 2)`

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}


@dataclass(frozen=True, eq=False)
class Number:
    """A number that a graph takes as an input.

    Attributes:
        read: its place in Python; the value there is that of the capture.
        places: names of nodes, and the places among their arguments where it stands.
        compared: operator, the number that it was compared with, and the outcome, which must stay as it is.
    """

    read: Read
    places: tuple[tuple[str, Place], ...]
    compared: tuple[tuple[str, Any, bool], ...]

    def fits(self, modules: Mapping[str, nn.Module]) -> bool:
        """Return whether the number that is there now takes the same branches."""
        now = self.read.now(modules)
        return type(now) is float and all(
            _COMPARISONS[name](now, other) == is_so for name, other, is_so in self.compared
        )


class TrackedFloat(float):
    """A float that records its comparisons. Whatever is computed from it is a plain float."""

    compared: list[tuple[str, Any, bool]]
    unclear: bool

    def __new__(cls, value: float) -> TrackedFloat:
        """Return a number that has been compared with nothing."""
        made = super().__new__(cls, value)
        made.compared, made.unclear = [], False
        return made

    def __hash__(self) -> int:
        self.unclear = True  # it is looked up
        return float.__hash__(self)

    def __bool__(self) -> bool:
        self.compared.append(("ne", 0, float(self) != 0))
        return float(self) != 0

    def _compare(self, name: str, other: Any) -> Any:
        if isinstance(other, TrackedFloat) or not isinstance(other, (int, float)):
            self.unclear = True
            return getattr(float, f"__{name}__")(self, other)
        outcome = _COMPARISONS[name](float(self), other)
        self.compared.append((name, other, outcome))
        return outcome

    def __eq__(self, other: object) -> Any:
        return self._compare("eq", other)

    def __ne__(self, other: object) -> Any:
        return self._compare("ne", other)

    def __lt__(self, other: Any) -> Any:
        return self._compare("lt", other)

    def __le__(self, other: Any) -> Any:
        return self._compare("le", other)

    def __gt__(self, other: Any) -> Any:
        return self._compare("gt", other)

    def __ge__(self, other: Any) -> Any:
        return self._compare("ge", other)


def as_inputs(
    first: fx.Graph, second: fx.Graph, reads: Sequence[Read], values: Sequence[TrackedFloat]
) -> tuple[Number, ...] | None:
    """Find the places where numbers stand in a graph.

    Args:
        first: the graph, captured at the values of `reads`.
        second: the same region, captured at `values`, which differ from each other and from those.
        reads: the numbers.
        values: the same numbers at the second capture.

    Returns:
        The numbers with their places; None where the graphs differ in more, such as a function of a number.
    """
    if len(first.nodes) != len(second.nodes) or any(value.unclear for value in values):
        return None
    places: list[list[tuple[str, Place]]] = [[] for _ in reads]
    twin: dict[fx.Node, fx.Node] = {}
    for a, b in zip(first.nodes, second.nodes, strict=True):
        twin[a] = b
        if a.op != b.op or (a.op != "placeholder" and a.target != b.target):
            return None
        for place, x, y in _pairs((a.args, a.kwargs), (b.args, b.kwargs)):
            if isinstance(x, fx.Node):
                if twin.get(x) is not y:
                    return None
                continue
            number = next((i for i, value in enumerate(values) if type(x) is float and isinstance(y, float)
                           and float(y) == float(value) and x == reads[i].value), None)  # fmt: skip
            if number is not None:
                places[number].append((a.name, place))
            elif type(x) is not type(y) or not (x is y or x == y):
                return None
    return tuple(
        Number(read, tuple(at), tuple(dict.fromkeys(value.compared)))
        for read, at, value in zip(reads, places, values, strict=True)
    )


def _pairs(a: Any, b: Any) -> Iterator[tuple[Place, Any, Any]]:
    """Yield the leaves of the arguments of two nodes, side by side; a marker that differs where the structures do."""
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        for key in a:
            yield from (((key, *place), x, y) for place, x, y in _pairs(a[key], b[key]))
    elif isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from (((i, *place), p, q) for place, p, q in _pairs(x, y))
    elif isinstance(a, (torch.SymInt, Tensor)) or isinstance(b, (torch.SymInt, Tensor)):
        yield (), object(), None
    else:
        yield (), a, b


def put_number(args: tuple[Any, dict[str, Any]], place: Place, value: Any) -> tuple[Any, dict[str, Any]]:
    """Return arguments and keyword arguments of a node with another value at a place."""
    result: tuple[Any, dict[str, Any]] = _put(args, place, value)
    return result


def _put(owner: Any, place: Place, value: Any) -> Any:
    if not place:
        return value
    key, *rest = place
    if isinstance(owner, dict):
        return {**owner, key: _put(owner[key], tuple(rest), value)}
    items = list(owner)
    items[key] = _put(items[key], tuple(rest), value)  # type: ignore[index]
    return tuple(items) if isinstance(owner, tuple) else items
