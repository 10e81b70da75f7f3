"""State access: how a graph reads and changes the objects of its calls, as a rule a cache of keys and values.

A graph holds no such object. Values that its control flow depends on are looked up in the object at every call
(`StateAccess.read`), tensors in it are inputs, and calls of its methods with tensors stay calls of the object that the
caller passed, whose own Python does the rest: counters, memory and all.

    ObjectLeaf       stands for an object among the leaves of a call
    ObjectPath       the path to a part of one: `layers[0].keys`
    StateAccess      all reads, writes and method calls of a graph
    IndexAttributes  integers of a region that select its own part of an object
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

from ecospa_fx.passes.graph.namespaces import ABSENT

AttributePath = tuple[str, str]  # path of a submodule, name of an attribute of it

OPERATORS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}

TENSOR = object()  # stands for a tensor among the leaves of arguments and results

# Types whose values a graph may hold.
PLAIN = (Tensor, int, float, bool, str, slice, Enum, torch.dtype, torch.device, torch.memory_format, torch.layout)

_CODE = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)

HEAP = 1 << 9  # flag of classes defined in Python

_NEW: Any = object.__new__


@dataclass(frozen=True)
class ObjectLeaf:
    """A stand-in for an object among the leaves of arguments and results, by its number."""

    number: int


@dataclass(frozen=True)
class PathItem:
    """One step of a path: an attribute, or an entry of a list or a dict."""

    key: Any
    entry: bool = False

    def __str__(self) -> str:
        return f"[{self.key!r}]" if self.entry else f".{self.key}"


@dataclass(frozen=True)
class ObjectPath:
    """The path to a part of an object of a call: the number of the object, and the steps from there."""

    number: int
    path: tuple[PathItem, ...] = ()

    def attribute(self, name: str) -> ObjectPath:
        """Extend the path by an attribute."""
        return ObjectPath(self.number, (*self.path, PathItem(name)))

    def entry(self, key: Any) -> ObjectPath:
        """Extend the path by an entry of a list or dict."""
        return ObjectPath(self.number, (*self.path, PathItem(key, entry=True)))

    def find(self, objects: Sequence[Any]) -> Any:
        """Return the value at this path."""
        value = objects[self.number]
        for step in self.path:
            value = value[step.key] if step.entry else getattr(value, step.key)
        return value

    def leads_somewhere(self, objects: Sequence[Any]) -> bool:
        """Return whether there is a value at this path."""
        try:
            self.find(objects)
        except (AttributeError, IndexError, KeyError):
            return False
        return True

    def put(self, objects: Sequence[Any], value: Any) -> None:
        """Set the value at this path."""
        owner, last = ObjectPath(self.number, self.path[:-1]).find(objects), self.path[-1]
        if last.entry:
            owner[last.key] = value
        else:
            setattr(owner, last.key, value)

    def __str__(self) -> str:
        return "".join(map(str, self.path)).removeprefix(".")


@dataclass(frozen=True)
class Length:
    """A read of a list: its number of entries."""

    number: int


@dataclass(frozen=True)
class Keys:
    """A read of a dict: its keys, in order."""

    keys: tuple[Any, ...]


@dataclass(frozen=True)
class TypeCheck:
    """A read of an object on the way to a part of it: its class."""

    cls: type


@dataclass(frozen=True, eq=False)
class LiveCall:
    """A call of a method of an object, with tensors, that the graph leaves to the object.

    Attributes:
        place: path of the object that has the method.
        method: its name.
        leaves: of its arguments, `TENSOR` where there is a tensor.
        spec: tree of the arguments.
        out_leaves: of its result.
        out_spec: tree of the result.
        after: path -> constant that the region's own code reads there once the method has changed it.
        late: paths of tensors that the region's own code reads after the call.
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
    """All that a graph reads of the objects of its calls, and all that it changes in them.

    Attributes:
        types: classes of the objects.
        reads: values that the control flow depends on: a path, and a constant, `Length`, `Keys`, `TypeCheck` or
            `ABSENT`.
        state: paths of the tensors that the graph takes, in the order of its inputs, after the tensors of the call.
        stored: paths of the tensors that a call replaces, in the order of the graph's outputs, of which they are the
            last.
        effects: values that the region's own code puts into an object: a path, and a constant or `Stored`.
        calls: of methods, by number.
        read: returns the tensors at `state`; None where one of `reads` is another value.
    """

    types: tuple[type, ...] = ()
    reads: tuple[tuple[ObjectPath, Any], ...] = ()
    state: tuple[ObjectPath, ...] = ()
    stored: tuple[ObjectPath, ...] = ()
    effects: tuple[tuple[ObjectPath, Any], ...] = ()
    calls: tuple[LiveCall, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "read", _reader(self))

    read: Callable[[Sequence[Any]], list[Tensor] | None] = field(init=False, repr=False)


@dataclass(frozen=True)
class Stored:
    """A tensor in `StateAccess.effects`, by its number in `StateAccess.stored`."""

    number: int


def foreign(value: Any) -> bool:
    """Return whether `value` is an object that may hold tensors and change: not a constant, container or module."""
    if value is None or isinstance(value, (*PLAIN, nn.Module, *_CODE, BaseException, tuple, list, dict, set)):
        return False
    cls = type(value)
    # A class registered with torch's pytrees is flattened like a tuple where it is plain data.
    if is_dataclass(cls) and cls in pytree.SUPPORTED_NODES:
        return False
    return bool(hasattr(value, "__dict__") and cls.__flags__ & HEAP and cls.__new__ is _NEW)


def flattened(call: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Return the leaves of a call, objects among them, and its tree.

    Objects that are registered with torch's pytrees stay leaves, because unflattening would make new ones of them.
    """
    return pytree.tree_flatten(call, is_leaf=foreign)


def parted(leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return leaves with a `ObjectLeaf` for every object, and the objects, each once."""
    objects: list[Any] = []
    plain: list[Any] = []
    for leaf in leaves:
        if foreign(leaf):
            number = next((i for i, other in enumerate(objects) if other is leaf), len(objects))
            if number == len(objects):
                objects.append(leaf)
            leaf = ObjectLeaf(number)
        plain.append(leaf)
    return plain, objects


def resolve_object(leaf: Any, objects: Sequence[Any]) -> Any:
    """Return a leaf, or the object that it stands for."""
    return objects[leaf.number] if isinstance(leaf, ObjectLeaf) else leaf


def copy_object(
    value: Any, tensor: Callable[[ObjectPath, Tensor], Tensor], place: ObjectPath, memo: dict[int, Any]
) -> Any:
    """Copy an object with other tensors in it; constants and values of unknown types are shared.

    Args:
        value: the object.
        tensor: returns the tensor to put in place of another.
        place: path of `value`.
        memo: id -> copy, of the values copied so far.
    """
    if isinstance(value, Tensor):
        return tensor(place, value)
    if id(value) in memo:
        return memo[id(value)]
    if type(value) is tuple:
        return tuple(copy_object(item, tensor, place.entry(i), memo) for i, item in enumerate(value))
    if type(value) is list:
        memo[id(value)] = made = []
        made += [copy_object(item, tensor, place.entry(i), memo) for i, item in enumerate(value)]
        return made
    if type(value) is dict:
        memo[id(value)] = mapping = {}
        mapping.update({key: copy_object(item, tensor, place.entry(key), memo) for key, item in value.items()})
        return mapping
    if foreign(value):
        memo[id(value)] = twin = object.__new__(type(value))
        for name, item in vars(value).items():
            twin.__dict__[name] = copy_object(item, tensor, place.attribute(name), memo)
        return twin
    return value


def copy_objects(objects: Sequence[Any], tensor: Callable[[ObjectPath, Tensor], Tensor]) -> list[Any]:
    """Copy the objects of a call, see `copy_object`; values that objects share their copies share."""
    memo: dict[int, Any] = {}
    return [copy_object(value, tensor, ObjectPath(number), memo) for number, value in enumerate(objects)]


def copied_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy the arguments of a call, with all tensors in them, for a forward to change."""
    leaves, spec = flattened((args, kwargs))
    leaves, objects = parted(leaves)
    twins = copy_objects(objects, lambda _, t: t.detach().clone())
    copies = [twins[leaf.number] if isinstance(leaf, ObjectLeaf) else _fresh(leaf) for leaf in leaves]
    call: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(copies, spec)
    return call


def _fresh(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _reader(carried: StateAccess) -> Callable[[Sequence[Any]], list[Tensor] | None]:
    """Generate `StateAccess.read`, because it runs at every call."""
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
            case _ if wanted is ABSENT:
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
    """The integers of a region that only select its own part of an object: the number of a layer, in a cache.

    Attributes:
        values: attribute -> its value in the region that was captured.
        compared: attribute, operator, the integer it was compared with, and the outcome.
        entries: path of a list or dict, and a key -> the attributes that were that key.
        leaves: number of a method's call, and of a leaf of its arguments -> the attribute that was passed there.
    """

    values: Mapping[AttributePath, int] = field(default_factory=dict)
    compared: Sequence[tuple[AttributePath, str, int, bool]] = ()
    entries: Mapping[tuple[ObjectPath, Any], frozenset[AttributePath]] = field(default_factory=dict)
    leaves: Mapping[tuple[int, int], AttributePath] = field(default_factory=dict)

    def of(self, module: nn.Module) -> dict[AttributePath, int] | None:
        """Return their values in another module; None where the graph cannot be right for it."""
        values: dict[AttributePath, int] = {}
        named = dict(module.named_modules(remove_duplicate=False))
        for path, name in self.values:
            value = named[path].__dict__.get(name) if path in named else None
            if type(value) is not int:
                return None
            values[path, name] = value
        if any(OPERATORS[op](values[attribute], other) != result for attribute, op, other, result in self.compared):
            return None
        if any(len({values[attribute] for attribute in attributes}) > 1 for attributes in self.entries.values()):
            return None
        return values

    def put(self, place: ObjectPath, values: Mapping[AttributePath, int]) -> ObjectPath:
        """Return a path with the indices of another module in it."""
        path: list[PathItem] = []
        for i, step in enumerate(place.path):
            attributes = self.entries.get((ObjectPath(place.number, place.path[:i]), step.key)) if step.entry else None
            path.append(PathItem(values[next(iter(attributes))], entry=True) if attributes else step)
        return ObjectPath(place.number, tuple(path))

    def within(self, carried: StateAccess, values: Mapping[AttributePath, int]) -> StateAccess:
        """Return the state access of a graph for a module with other indices."""

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
