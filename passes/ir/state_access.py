"""State access: objects that a call hands in and that a forward changes, a cache of keys and values as a rule.

No graph holds such an object. Values that a graph decides by are looked up in it at every call (`StateAccess.read`),
tensors in it are inputs, and calls of its methods with tensors stay calls of the object that the caller passed, whose
own Python does the rest: counters, memory and all.

    Held         an object among the leaves of a call
    ObjectPath   where something lies in one: `layers[0].keys`
    StateAccess  all that a graph has to do with the objects of its calls
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from enum import Enum
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

AttributePath = tuple[str, str]  # path of a submodule, name of an attribute of it


OPERATORS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


TENSOR = object()  # stands for a tensor among the leaves of arguments and results


PLAIN = (Tensor, int, float, bool, str, slice, Enum, torch.dtype, torch.device, torch.memory_format, torch.layout)


_CODE = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)


_HEAP = 1 << 9  # the flag of classes made in Python


_NEW: Any = object.__new__


@dataclass(frozen=True)
class Held:
    """Stands for an object among the leaves of arguments and results, by its number."""

    number: int


@dataclass(frozen=True)
class PathItem:
    """One step into an object: an attribute, or an entry of a list or a dict."""

    key: Any
    entry: bool = False

    def __str__(self) -> str:
        return f"[{self.key!r}]" if self.entry else f".{self.key}"


@dataclass(frozen=True)
class ObjectPath:
    """Where something lies: in which object of a call, and how to get there."""

    number: int
    path: tuple[PathItem, ...] = ()

    def attribute(self, name: str) -> ObjectPath:
        """An attribute of what lies here."""
        return ObjectPath(self.number, (*self.path, PathItem(name)))

    def entry(self, key: Any) -> ObjectPath:
        """An entry of the list or dict that lies here."""
        return ObjectPath(self.number, (*self.path, PathItem(key, entry=True)))

    def find(self, objects: Sequence[Any]) -> Any:
        """What lies here."""
        found = objects[self.number]
        for step in self.path:
            found = found[step.key] if step.entry else getattr(found, step.key)
        return found

    def put(self, objects: Sequence[Any], value: Any) -> None:
        """Put `value` here."""
        owner, last = ObjectPath(self.number, self.path[:-1]).find(objects), self.path[-1]
        if last.entry:
            owner[last.key] = value
        else:
            setattr(owner, last.key, value)

    def __str__(self) -> str:
        return "".join(map(str, self.path)).removeprefix(".")


@dataclass(frozen=True)
class Length:
    """What is read of a list: how many entries it has."""

    number: int


@dataclass(frozen=True)
class Keys:
    """What is read of a dict: its keys, in order."""

    keys: tuple[Any, ...]


@dataclass(frozen=True)
class TypeCheck:
    """What is read of an object on the way to something in it: its class."""

    cls: type


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()  # stands for the value of an attribute or entry that does not exist


@dataclass(frozen=True, eq=False)
class LiveCall:
    """A call of a method of an object, with tensors, that is no part of a graph.

    Attributes:
        place: of what has the method.
        method: its name.
        leaves: of its arguments, `TENSOR` where there is a tensor.
        spec: tree of these.
        out_leaves: of its result.
        out_spec: tree of these.
        after: constants that the region's own code reads once the method has changed them.
        late: places of tensors that it reads then.
    """

    place: ObjectPath
    method: str
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    out_leaves: tuple[Any, ...]
    out_spec: pytree.TreeSpec
    after: Mapping[ObjectPath, Any] = field(default_factory=dict)
    late: tuple[ObjectPath, ...] = ()


@dataclass(frozen=True, eq=False)
class StateAccess:
    """What a graph has to do with the objects of its calls.

    Attributes:
        types: their classes.
        reads: what it decides by: a place, and a constant, `Length`, `Keys`, `TypeCheck` or `ABSENT`.
        state: places of the tensors that it takes, in the order of its inputs, after the tensors of the call.
        stored: places of the tensors that are others afterwards, in the order of its outputs, which are the last.
        effects: what the region's own code puts into an object: a place, and a constant or the number of an output
            among the stored ones.
        calls: of methods, by number.
    """

    types: tuple[type, ...] = ()
    reads: tuple[tuple[ObjectPath, Any], ...] = ()
    state: tuple[ObjectPath, ...] = ()
    stored: tuple[ObjectPath, ...] = ()
    effects: tuple[tuple[ObjectPath, Any], ...] = ()
    calls: tuple[LiveCall, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "read", _reader(self))

    read: Callable[[Sequence[Any]], list[Tensor] | None] = field(init=False, repr=False)  # the state; None: another


@dataclass(frozen=True)
class Stored:
    """In `StateAccess.effects`: the value is a tensor, this one of the stored."""

    number: int


def foreign(value: Any) -> bool:
    """Whether `value` is an object that may hold tensors and change: no constant, container or module."""
    if value is None or isinstance(value, (*PLAIN, nn.Module, *_CODE, BaseException, tuple, list, dict, set)):
        return False
    cls = type(value)
    # A class registered with torch's pytrees is taken apart like a tuple where it is plain data.
    if is_dataclass(cls) and cls in pytree.SUPPORTED_NODES:
        return False
    return bool(hasattr(value, "__dict__") and cls.__flags__ & _HEAP and cls.__new__ is _NEW)


def flattened(call: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a call, whole objects among them, and its tree.

    Objects that are registered with torch's pytrees would be taken apart and not be the same afterwards.
    """
    return pytree.tree_flatten(call, is_leaf=foreign)


def parted(leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Leaves with a `Held` for every object, and the objects, each once."""
    objects: list[Any] = []
    plain: list[Any] = []
    for leaf in leaves:
        if foreign(leaf):
            number = next((i for i, other in enumerate(objects) if other is leaf), len(objects))
            if number == len(objects):
                objects.append(leaf)
            leaf = Held(number)
        plain.append(leaf)
    return plain, objects


def resolve_object(leaf: Any, objects: Sequence[Any]) -> Any:
    """A leaf, or the object that it stands for."""
    return objects[leaf.number] if isinstance(leaf, Held) else leaf


def copied(value: Any, tensor: Callable[[ObjectPath, Tensor], Tensor], place: ObjectPath, memo: dict[int, Any]) -> Any:
    """An object like another of the same class, with other tensors; constants and what is unknown are the same.

    Args:
        value: the object.
        tensor: what to put in place of a tensor.
        place: of `value`.
        memo: id -> copy, of what has been met.
    """
    if isinstance(value, Tensor):
        return tensor(place, value)
    if id(value) in memo:
        return memo[id(value)]
    if type(value) is tuple:
        return tuple(copied(item, tensor, place.entry(i), memo) for i, item in enumerate(value))
    if type(value) is list:
        memo[id(value)] = made = []
        made += [copied(item, tensor, place.entry(i), memo) for i, item in enumerate(value)]
        return made
    if type(value) is dict:
        memo[id(value)] = mapping = {}
        mapping.update({key: copied(item, tensor, place.entry(key), memo) for key, item in value.items()})
        return mapping
    if foreign(value):
        memo[id(value)] = twin = object.__new__(type(value))
        for name, item in vars(value).items():
            twin.__dict__[name] = copied(item, tensor, place.attribute(name), memo)
        return twin
    return value


def copies(objects: Sequence[Any], tensor: Callable[[ObjectPath, Tensor], Tensor]) -> list[Any]:
    """Copies of the objects of a call, see `copied`; what they share their copies share."""
    memo: dict[int, Any] = {}
    return [copied(value, tensor, ObjectPath(number), memo) for number, value in enumerate(objects)]


def _reader(carried: StateAccess) -> Callable[[Sequence[Any]], list[Tensor] | None]:
    """`StateAccess.read` as code, for it runs at every call: tensors of the state, None where a constant is another."""
    scope: dict[str, Any] = {"Tensor": Tensor}
    lines: list[str] = []
    names: dict[ObjectPath, str] = {}

    def named(value: Any) -> str:
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        scope[name := f"c{len(scope)}"] = value
        return name

    def local(place: ObjectPath) -> str:
        if place not in names:
            if not place.path:
                names[place] = f"objects[{place.number}]"
                return names[place]
            owner, step = local(ObjectPath(place.number, place.path[:-1])), place.path[-1]
            plain = not step.entry and step.key.isidentifier()
            found = f".{step.key}" if plain else f"[{named(step.key)}]" if step.entry else ""
            names[place] = name = f"v{len(names)}"
            lines.append(f"{name} = {owner}{found}" if found else f"{name} = getattr({owner}, {step.key!r})")
        return names[place]

    def unless(condition: str) -> None:
        lines.append(f"if {condition}: return None")

    for number, cls in enumerate(carried.types):
        unless(f"type(objects[{number}]) is not {named(cls)}")
    for place, wanted in carried.reads:
        match wanted:
            case _Absent():
                owner, step = local(ObjectPath(place.number, place.path[:-1])), place.path[-1]
                unless(f"{named(step.key)} in {owner}" if step.entry else f"hasattr({owner}, {step.key!r})")
            case Length(length):
                unless(f"len({local(place)}) != {length}")
            case Keys(keys):
                unless(f"tuple({local(place)}) != {named(keys)}")
            case TypeCheck(cls):
                unless(f"type({local(place)}) is not {named(cls)}")
            case None | True | False:
                unless(f"{local(place)} is not {wanted!r}")
            case _:
                found, value = local(place), named(wanted)
                other = f"type({found}) is not {named(type(wanted))} or {found} != {value}"
                unless(other if type(wanted) in (int, str) else f"{found} is not {value} and ({other})")
    tensors = [local(place) for place in carried.state]
    for name in tensors:
        unless(f"not isinstance({name}, Tensor)")
    body = "\n        ".join([*lines, f"return [{', '.join(tensors)}]"])
    source = (
        f"def read(objects):\n    try:\n        {body}\n"
        "    except (AttributeError, KeyError, IndexError, TypeError):\n        return None\n"
    )
    exec(source, scope)
    read: Callable[[Sequence[Any]], list[Tensor] | None] = scope["read"]
    return read


@dataclass(frozen=True, eq=False)
class IndexAttributes:
    """The integers of a region that only say which part of an object is its own.

    Attributes:
        values: what they were.
        compared: what they were compared with, and how that came out.
        entries: the list or dict and the key in it -> the integers that were that key.
        leaves: number of a method's call and of a leaf of its arguments -> the integer that was passed.
    """

    values: Mapping[AttributePath, int] = field(default_factory=dict)
    compared: Sequence[tuple[AttributePath, str, int, bool]] = ()
    entries: Mapping[tuple[ObjectPath, Any], frozenset[AttributePath]] = field(default_factory=dict)
    leaves: Mapping[tuple[int, int], AttributePath] = field(default_factory=dict)

    def of(self, module: nn.Module) -> dict[AttributePath, int] | None:
        """What they are in another module; None where what was captured cannot be right for it."""
        found: dict[AttributePath, int] = {}
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

    def put(self, place: ObjectPath, values: Mapping[AttributePath, int]) -> ObjectPath:
        """A place with other numbers on the way."""
        path: list[PathItem] = []
        for i, step in enumerate(place.path):
            attributes = self.entries.get((ObjectPath(place.number, place.path[:i]), step.key)) if step.entry else None
            path.append(PathItem(values[next(iter(attributes))], entry=True) if attributes else step)
        return ObjectPath(place.number, tuple(path))

    def within(self, carried: StateAccess, values: Mapping[AttributePath, int]) -> StateAccess:
        """What a graph has to do with objects, for a module with other numbers."""

        def put(place: ObjectPath) -> ObjectPath:
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
        return StateAccess(
            carried.types,
            tuple((put(place), value) for place, value in carried.reads),
            tuple(map(put, carried.state)),
            tuple(map(put, carried.stored)),
            tuple((put(place), value) for place, value in carried.effects),
            tuple(calls),
        )
