"""Unchanged: a generated function that says whether a region is as it is now, because it runs at every call.

    unchanged(module, reads, numbers, weights)
      -> modules       children, training flags and hooks of every submodule
      -> reads         every step of every read, once: objects on the way are compared by identity
      -> numbers       the comparisons that a forward made of them
      -> weights       the dtypes of parameters and buffers

Constants are compared by value where they are not the same object; everything else by identity. So it may say no where
`first_changed` finds nothing, for an equal list in place of another, say; it never says yes where that finds something.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from types import CellType, ModuleType
from typing import Any

import torch
from torch import nn

from ecospa_fx.passes.graph.containers import looks_up, plain
from ecospa_fx.passes.graph.namespaces import ABSENT
from ecospa_fx.passes.graph.python_state import HOOKS, is_constant, same

from .guards import Contents, ModuleRoot, Read, as_read, same_contents
from .numbers import Number
from .state_access import HEAP, Keys, Length, PathItem

_SINGLETONS = (bool, Enum, torch.dtype, torch.layout, torch.memory_format)  # equal ones are one object
_SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_PLAIN = vars(object)["__getattribute__"]
_FEW = 8  # items of a container that are compared one by one


def unchanged(
    module: nn.Module,
    reads: Sequence[Read],
    numbers: Sequence[Number] = (),
    weights: Mapping[str, torch.dtype] | None = None,
) -> Callable[[], bool]:
    """Generate a function that returns whether a region is as it is now.

    Args:
        module: the region.
        reads: values that its forward reads, all of which hold now.
        numbers: that its graph takes as inputs, all of which fit now.
        weights: the dtypes of parameters and buffers by name, as they are now.
    """
    source = _Source()
    modules = dict(module.named_modules(remove_duplicate=False))
    for path, child in modules.items():
        source.compare_module(child, is_region=not path)
    for read in reads:
        source.compare_read(read, modules)
    for number in numbers:
        source.compare_number(number, modules)
    for name, dtype in (weights or {}).items():
        path, _, key = name.rpartition(".")
        if path in modules:  # it may have been wrapped since
            source.compare_dtype(modules[path], key, dtype)
    return source.function()


class _Source:
    """The source of the function, and the objects that it names. In a condition, `o` is the object that it looks at."""

    def __init__(self) -> None:
        self._scope: dict[str, Any] = {
            "is_": operator.is_, "attribute": object.__getattribute__,
            "absent": ABSENT, "same": same, "same_contents": same_contents, "plain": plain, "as_read": as_read,
        }  # fmt: skip
        self._names: dict[int, str] = {}
        self._values: dict[Any, Any] = {}  # place -> the value there now
        self._proxies: dict[type, Mapping[str, Any]] = {}
        self._conditions: dict[str, dict[str, None]] = {}  # by object: what lies together is looked at together

    def function(self) -> Callable[[], bool]:
        """Compile the function."""
        lines: list[str] = []
        for name, conditions in self._conditions.items():
            lines += [f"o = {name}", f"if not ({' and '.join(conditions)}): return False"]
        body = "\n        ".join([*lines, "return True"])
        failures = "AttributeError, KeyError, IndexError, TypeError, ValueError"
        exec(f"def holds():\n    try:\n        {body}\n    except ({failures}):\n        return False\n", self._scope)
        holds: Callable[[], bool] = self._scope["holds"]
        return holds

    def compare_module(self, module: nn.Module, is_region: bool) -> None:
        """Compare the children and the training flag of a module, and its hooks unless it is the region itself."""
        held = module.__dict__
        children = held["_modules"]
        if "training" in held:
            self._compare(held, self._is("o['training']", held["training"]))
        else:  # a property, as of what torch.compile makes of a module
            self._compare(module, self._is("o.training", module.training))
        if not is_region:
            for kind in HOOKS:
                self._compare(held, _size(f"o[{kind!r}]", held[kind]))
        if not children:
            self._compare(held, "not o['_modules']")
            return
        self._compare(held, f"o['_modules'] is {self._name(children)}")
        self._compare(children, _size("o", children))
        for key, child in children.items():
            self._compare(children, self._is(f"o[{key!r}]", child))

    def compare_read(self, read: Read, modules: dict[str, nn.Module]) -> None:
        """Compare the value of a read, and every object on the way to it."""
        value = self._follow(read, read.steps, modules)
        if isinstance(read.value, (Keys, Length)):
            self._compare(value, f"as_read({self._name(read.value)}, o)")
        elif isinstance(read.value, Contents):
            for condition in self._contents(value):
                self._compare(value, condition)

    def compare_number(self, number: Number, modules: dict[str, nn.Module]) -> None:
        """Compare a number with what the forward compared it with."""
        *way, last = number.read.steps
        owner = self._follow(number.read, way, modules)
        entry = last.entry
        if isinstance(number.read.root, ModuleRoot) and not way and last.key in owner.__dict__:
            owner, entry = owner.__dict__, True
        elif isinstance(number.read.root, ModuleRoot) and not way:
            self._entry(owner.__dict__, last.key)
            owner = type(owner)
        place = f"o[{self._key(last.key)}]" if entry else f"getattr(o, {last.key!r})"
        place = "o.cell_contents" if isinstance(owner, CellType) else place
        self._compare(owner, f"type({place}) is float")
        for sign, other, outcome in number.compared:
            self._compare(owner, f"({place} {_SIGNS[sign]} {self._name(other)}) is {outcome}")

    def compare_dtype(self, owner: nn.Module, key: str, dtype: torch.dtype) -> None:
        """Compare the dtype of a parameter or buffer, whichever tensor that is."""
        kind = next((kind for kind in ("_parameters", "_buffers") if owner.__dict__[kind].get(key) is not None), None)
        if kind is None:
            return
        held = owner.__dict__[kind]
        self._compare(owner.__dict__, f"o[{kind!r}] is {self._name(held)}")
        self._compare(held, f"o[{key!r}].dtype is {self._name(dtype)}")

    def _follow(self, read: Read, steps: Sequence[PathItem], modules: dict[str, nn.Module]) -> Any:
        """Compare the values on a way, and return the last."""
        in_region = isinstance(read.root, ModuleRoot)
        value = modules[read.root.path] if in_region else read.root
        for position, step in enumerate(steps):
            value = self._step(value, step, in_region and position == 0)
        return value

    def _step(self, owner: Any, step: PathItem, in_region: bool) -> Any:
        """Compare the value one step further, once, and return it.

        Args:
            owner: where the step begins.
            step: the attribute or entry.
            in_region: the owner is a submodule of the region, see `attribute_of`.
        """
        where = (self._name(owner), step, in_region)
        if where not in self._values:
            if isinstance(owner, CellType):
                value = owner.cell_contents
                self._compare(owner, self._is("o.cell_contents", value))
            elif step.entry:
                value = self._entry(owner, step.key)
            elif in_region:
                value = self._attribute(owner.__dict__, type(owner), step.key)
            else:
                value = self._attribute_of_object(owner, step.key)
            self._values[where] = value
        return self._values[where]

    def _entry(self, owner: Any, key: Any) -> Any:
        if looks_up(owner):
            value = dict.get(owner, key, ABSENT)
            self._compare(owner, self._is(f"dict.get(o, {self._key(key)}, absent)", value))
            return value
        try:
            value = owner[key]
        except (KeyError, IndexError):
            self._compare(owner, f"{self._key(key)} not in o")
            return ABSENT
        self._compare(owner, self._is(f"o[{self._key(key)}]", value))
        return value

    def _attribute(self, held: Mapping[str, Any], cls: type, key: str) -> Any:
        """Compare an attribute that a dict holds, or else a class."""
        value = self._entry(held, key)
        return self._class_attribute(cls, key) if value is ABSENT else value

    def _class_attribute(self, cls: type, key: str) -> Any:
        for each in cls.__mro__:  # Python's own look-up takes longer, above all where there is none
            if not each.__flags__ & HEAP and key not in vars(each):
                continue  # built in, and so it stays
            proxy = self._proxies.setdefault(each, vars(each))
            if self._entry(proxy, key) is not ABSENT:
                break
        return getattr(cls, key, ABSENT)

    def _attribute_of_object(self, owner: Any, key: str) -> Any:
        value = getattr(owner, key, ABSENT)
        if isinstance(owner, type):
            if inspect.getattr_static(owner, key, ABSENT) is value:
                return self._class_attribute(owner, key)
        elif inspect.getattr_static(type(owner), "__getattribute__") is not _PLAIN and not isinstance(
            owner, ModuleType
        ):
            held = getattr(owner, "__dict__", None)
            if type(held) is dict and held.get(key, ABSENT) is value and not hasattr(type(owner), "__getattr__"):
                # Past a look-up in Python, which is slow; whatever that reads is a read as well.
                self._compare(owner, f"attribute(o, '__dict__') is {self._name(held)}")
                return self._attribute(held, type(owner), key)
        place = f"o.{key}" if key.isidentifier() else f"getattr(o, {key!r})"
        if value is ABSENT:
            self._compare(owner, f"not hasattr(o, {key!r})")
        elif getattr(owner, key, ABSENT) is value:
            self._compare(owner, self._is(place, value))
        else:  # a bound method, say, which is made at each look-up
            self._compare(owner, f"same({self._name(value)}, {place})")
        return value

    def _contents(self, value: Any) -> Iterator[str]:
        """Yield conditions that say that a container, the same as before, has the contents that it has now."""
        if isinstance(value, (tuple, frozenset)):
            return
        if type(value) is set:
            yield f"o == {self._name(value.copy())}"
            return
        if type(value) not in (list, dict):
            yield f"same_contents({self._name(Contents.of(value).copy)}, plain(o))"
            return
        items = list(value.values()) if type(value) is dict else value
        yield _size("o", value)
        if type(value) is dict and len(value) > 1:
            yield f"[*o] == {self._name(list(value))}"  # in that order
        if len(value) <= _FEW:
            keys = value if type(value) is dict else range(len(value))
            yield from (self._is(f"o[{self._key(key)}]", item) for key, item in zip(keys, items, strict=True))
        else:
            yield f"all(map(is_, {'o.values()' if type(value) is dict else 'o'}, {self._name(tuple(items))}))"

    def _is(self, place: str, value: Any) -> str:
        if value is None or type(value) is bool:
            return f"{place} is {value}"
        name = self._name(value)
        if is_constant(value) and not isinstance(value, _SINGLETONS):
            return f"({place} is {name} or same({name}, {place}))"
        return f"{place} is {name}"

    def _key(self, key: Any) -> str:
        return repr(key) if type(key) in (bool, int, str) else self._name(key)

    def _name(self, value: Any) -> str:
        if id(value) not in self._names:
            self._names[id(value)] = name = f"c{len(self._names)}"
            self._scope[name] = value  # which keeps the object, and with it the identity
        return self._names[id(value)]

    def _compare(self, beside: Any, condition: str) -> None:
        self._conditions.setdefault(self._name(beside), {})[condition] = None


def _size(place: str, container: Any) -> str:
    return f"len({place}) == {len(container)}" if container else f"not {place}"
