"""Numbers: integers by which blocks that are equal otherwise find their own part of an object that all are given.

A cache has an entry per layer, and every layer knows its number. If that is all that a forward does with it, what was
captured of one layer is right for the others with their numbers in its place. To see what it does, numbers are put in
the place of the integers that are no integers for Python, so that nothing uses them unseen, and the forward runs once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ecospa_fx.carried import Carried, Place, Step

if TYPE_CHECKING:
    from .carry import Tracker

Attribute = tuple[str, str]  # path of a submodule, name of an attribute of it
OPERATORS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


class Number:
    """Stands for an integer attribute of a module, and notes what it is used for."""

    __slots__ = ("attribute", "compared", "inside", "used", "value")

    def __init__(self, attribute: Attribute, value: int) -> None:
        self.attribute, self.value = attribute, value
        self.used = False
        self.inside: Callable[[], bool] = lambda: False  # whether the code of an object is running
        self.compared: list[tuple[str, Any, bool]] = []

    def __hash__(self) -> int:
        self._use()
        return hash(self.value)

    def __index__(self) -> int:
        self._use()
        return self.value

    def __bool__(self) -> bool:
        return bool(self.__ne__(0))

    def _use(self) -> None:
        self.used = self.used or not self.inside()


def _comparing(name: str) -> Any:
    def compare(self: Number, other: Any) -> bool:
        if type(other) is not int:
            self._use()
            return bool(OPERATORS[name](self.value, other.value if isinstance(other, Number) else other))
        result = bool(OPERATORS[name](self.value, other))
        if not self.inside():
            self.compared.append((name, other, result))
        return result

    return compare


def _computing(name: str) -> Any:
    def compute(self: Number, *others: Any) -> Any:
        self._use()
        return getattr(self.value, name)(*(o.value if isinstance(o, Number) else o for o in others))

    return compute


for _name in OPERATORS:
    setattr(Number, f"__{_name}__", _comparing(_name))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(Number, f"__{_name}__", _computing(f"__{_name}__"))
    setattr(Number, f"__r{_name}__", _computing(f"__r{_name}__"))
for _name in ("neg", "abs", "int", "float", "str", "repr", "format", "round"):
    setattr(Number, f"__{_name}__", _computing(f"__{_name}__"))


@dataclass(frozen=True, eq=False)
class Numbers:
    """The integers of a region that only say which part of an object is its own.

    Attributes:
        values: what they were.
        compared: what they were compared with, and how that came out.
        entries: the list or dict and the key in it -> the integers that were that key.
        leaves: number of a method's call and of a leaf of its arguments -> the integer that was passed.
    """

    values: Mapping[Attribute, int] = field(default_factory=dict)
    compared: Sequence[tuple[Attribute, str, int, bool]] = ()
    entries: Mapping[tuple[Place, Any], frozenset[Attribute]] = field(default_factory=dict)
    leaves: Mapping[tuple[int, int], Attribute] = field(default_factory=dict)

    def of(self, module: nn.Module) -> dict[Attribute, int] | None:
        """What they are in another module; None where what was captured cannot be right for it."""
        found: dict[Attribute, int] = {}
        named = dict(module.named_modules(remove_duplicate=False))
        for path, name in self.values:
            value = named[path].__dict__.get(name) if path in named else None
            if type(value) is not int:
                return None
            found[path, name] = value
        if any(OPERATORS[op](found[attribute], other) != result for attribute, op, other, result in self.compared):
            return None
        if any(len({found[attribute] for attribute in attributes}) > 1 for attributes in self.entries.values()):
            return None
        return found

    def put(self, place: Place, values: Mapping[Attribute, int]) -> Place:
        """A place with other numbers on the way."""
        path: list[Step] = []
        for i, step in enumerate(place.path):
            attributes = self.entries.get((Place(place.number, place.path[:i]), step.key)) if step.entry else None
            path.append(Step(values[next(iter(attributes))], entry=True) if attributes else step)
        return Place(place.number, tuple(path))

    def within(self, carried: Carried, values: Mapping[Attribute, int]) -> Carried:
        """What a graph has to do with objects, for a module with other numbers."""

        def put(place: Place) -> Place:
            return self.put(place, values)

        calls = []
        for number, call in enumerate(carried.calls):
            leaves = [
                values[self.leaves[number, i]] if (number, i) in self.leaves else leaf
                for i, leaf in enumerate(call.leaves)
            ]
            after = {put(place): value for place, value in call.after.items()}
            late = tuple(map(put, call.late))
            calls.append(replace(call, place=put(call.place), leaves=tuple(leaves), after=after, late=late))
        return Carried(
            carried.types,
            tuple((put(place), value) for place, value in carried.reads),
            tuple(map(put, carried.state)),
            tuple(map(put, carried.stored)),
            tuple((put(place), value) for place, value in carried.effects),
            tuple(calls),
        )


def numbers(module: nn.Module, seen: Tracker, run: Callable[[], Tracker]) -> Numbers:
    """Which integers of a region only say which part of an object is its own.

    Args:
        module: the region.
        seen: what a forward did with the objects of a call.
        run: does it again.
    """
    candidates = {
        (path, name): value
        for path, child in module.named_modules()
        for name, value in vars(child).items()
        if type(value) is int and value in seen.integers()
    }
    while candidates:
        stand_ins = [Number(attribute, value) for attribute, value in candidates.items()]
        with _installed(module, stand_ins):
            try:
                tracker = run()
            except Exception:
                return Numbers()
        used = {number.attribute for number in stand_ins if number.used}
        if not used:
            break
        candidates = {attribute: value for attribute, value in candidates.items() if attribute not in used}
    else:
        return Numbers()
    entries, leaves = tracker.numbered()
    if entries is None:
        return Numbers()
    met = {attribute for attributes in entries.values() for attribute in attributes} | set(leaves.values())
    compared = [(n.attribute, *what) for n in stand_ins for what in n.compared]
    met |= {attribute for attribute, *_ in compared}
    return Numbers({a: value for a, value in candidates.items() if a in met}, compared, entries, leaves)


@contextmanager
def _installed(module: nn.Module, stand_ins: Sequence[Number]) -> Iterator[None]:
    named = dict(module.named_modules())
    try:
        for number in stand_ins:
            path, name = number.attribute
            named[path].__dict__[name] = number
        yield
    finally:
        for number in stand_ins:
            path, name = number.attribute
            named[path].__dict__[name] = number.value
