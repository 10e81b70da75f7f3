"""Python state: all that a forward may change in Python: attributes of modules, containers and objects that they hold.

PythonState(module)    everything that is reachable from the modules, as it is now
-> changes()           the places that are other than they were
-> restore()           everything as it was
"""

from __future__ import annotations

import functools
import operator
import pickle
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .containers import plain
from .iterators import copied, is_iterator, position
from .namespaces import ABSENT, WHOLE, Code, code_of, foreign_code, mutable_defaults, namespaces, put_in, value_in
from .tensors import storage_key

TENSORS = ("_parameters", "_buffers", "_modules")  # the dicts in which a module keeps its tensors and children
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

OWN = frozenset(vars(nn.Module()))
"""Attributes of every module: tensors, children, hooks and the training flag."""

COMPILED = frozenset({"_compiled_call_impl"})
"""Attributes in which `nn.Module.compile` keeps a faster forward that computes the same."""

CONSTANTS = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, torch.Size, torch.memory_format)

_OTHERS = ("torch", "numpy", "ecospa_fx", "sympy", "triton")  # packages whose objects no forward is taken to change
_RECORDS = (
    ("types", "SimpleNamespace"),
    ("argparse", "Namespace"),
)  # classes of the standard library that hold settings
_MOST = 20_000  # containers and objects, in which a forward's state is looked for


@dataclass(frozen=True)
class StateChange:
    """A place that is other than it was.

    Attributes:
        owner: the module, object or container.
        where: the place in words, from the module on: `blocks.0.cache['keys']`.
        key: the attribute or entry that changed; `WHOLE` for a list, a set, a generator or an array as a whole.
        before: its value before, or `ABSENT`.
        after: its value now, or `ABSENT`.
    """

    owner: Any
    where: str
    key: Any
    before: Any
    after: Any

    @property
    def is_hook(self) -> bool:
        """True if it is a hook of a module that was registered or removed."""
        return isinstance(self.owner, nn.Module) and isinstance(self.key, tuple) and self.key[0] in HOOKS

    @property
    def is_seen(self) -> bool:
        """True if the place is one of which a look at its value tells that it has changed."""
        return not self.is_hook and not isinstance(self.after, LeafState)


def is_constant(value: Any) -> bool:
    """Decide whether a value is immutable and compared by value."""
    if value is None or isinstance(value, CONSTANTS):
        return True
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return True
    return type(value) in (tuple, frozenset) and all(map(is_constant, value))


def same(a: Any, b: Any) -> bool:
    """Decide whether two values are certainly equal: objects that may change are equal only to themselves."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, MethodType):
        return a.__self__ is b.__self__ and a.__func__ is b.__func__
    return is_constant(a) and bool(a == b or (a != a and b != b))


def is_array(value: Any) -> bool:
    """Decide whether a value is an array of numpy, which a forward may write into."""
    kind = type(value)
    return hasattr(kind, "tobytes") and hasattr(kind, "dtype") and not isinstance(value, Tensor)


def path_of(module: nn.Module, owner: Any) -> str | None:
    """Return the path at which a submodule lies in a module; None of anything else."""
    return next((path for path, child in module.named_modules() if child is owner), None)


def is_record(value: Any) -> bool:
    """Decide whether a value is an object with attributes of its own that a forward may read or change."""
    if isinstance(value, (nn.Module, Tensor, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, Enum)):
        return False
    cls = type(value)
    package = (cls.__module__ or "").partition(".")[0]
    if package in _OTHERS:
        return False
    if package in sys.stdlib_module_names and package != "__main__":
        return any((base.__module__, base.__name__) in _RECORDS for base in cls.__mro__)
    return _attributes(value) is not None or bool(_slots(cls))


def _slots(cls: type) -> list[str]:
    """Return the attributes that a class keeps in slots."""
    held = [base.__dict__.get("__slots__", ()) for base in cls.__mro__]
    names = [name for slots in held for name in ((slots,) if isinstance(slots, str) else slots)]
    return [name for name in names if name[:2] != "__"]


class LeafState:
    """The state of a leaf that changes in place: a random generator, an array, a tensor that no module registers."""

    def __init__(self, leaf: Any) -> None:
        self.value, self._put = _state_of(leaf)

    def put(self, leaf: Any) -> None:
        """Bring a leaf back to this state."""
        self._put(leaf, self.value)

    def equal(self, other: LeafState) -> bool:
        """Compare two states of one leaf; what happens to a tensor in place is part of a graph, and no difference."""
        if isinstance(self.value, _TensorState):
            return True
        if isinstance(self.value, Tensor):  # of a torch.Generator
            return torch.equal(self.value, other.value)
        return pickle.dumps(self.value) == pickle.dumps(other.value)


class _TensorState(NamedTuple):
    value: Tensor
    version: int
    data: Tensor


def _state_of(leaf: Any) -> tuple[Any, Callable[[Any, Any], None]]:
    """Return the state of a leaf, and a function that brings it back to one."""
    if isinstance(leaf, Tensor):
        return _TensorState(leaf.detach().clone(), leaf._version, leaf.detach()), _put_tensor
    if hasattr(leaf, "bit_generator"):  # numpy.random.Generator
        return leaf.bit_generator.state, lambda generator, was: setattr(generator.bit_generator, "state", was)
    if hasattr(leaf, "set_state"):  # torch.Generator, numpy.random.RandomState
        return leaf.get_state(), lambda generator, was: generator.set_state(was)
    if isinstance(leaf, random.Random):
        return leaf.getstate(), lambda generator, was: generator.setstate(was)
    if is_iterator(leaf):  # it cannot be put back, but a copy can take its place: see `PythonState.lend`
        return position(leaf), lambda *_: None
    if isinstance(leaf, bytearray):
        return bytes(leaf), lambda array, was: array.__setitem__(slice(None), was)
    return leaf.copy(), lambda array, was: array.__setitem__(..., was)


def _put_tensor(tensor: Tensor, was: _TensorState) -> None:
    value, version, data = was
    replaced = storage_key(tensor) != storage_key(data)  # by `tensor.data = ...`
    if replaced:
        tensor.data = data
    if replaced or tensor._version != version:
        with torch.no_grad():
            data.copy_(value)


def _dims(value: Any) -> int:
    """Return the number of dims of an array, 0 of anything else: a class of arrays has a descriptor for it."""
    dims = getattr(value, "ndim", 0)
    return dims if isinstance(dims, int) else 0


def _has_state(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter) and type(value) is Tensor and value.layout is torch.strided
    if isinstance(value, (torch.Generator, random.Random, bytearray)) or is_iterator(value):
        return True
    if type(value).__module__.partition(".")[0] != "numpy":
        return False
    return hasattr(value, "bit_generator") or hasattr(value, "set_state") or _dims(value) > 0


class PythonState:
    """The mutable state that is reachable from a module, as it was when this was made.

    Args:
        module: the module.
        code: the functions that its forward runs; by default all that it can reach.
    """

    def __init__(self, module: nn.Module, code: Code | None = None) -> None:
        self._nodes: list[tuple[Any, str, Any]] = []  # an owner, its name, and a copy of its contents
        self._iterators: list[tuple[Any, Any, str, Any]] | None = None  # the places of those
        seen: dict[int, Any] = {}  # the values too, lest another takes the identity of one that is made on the way
        names = {id(child): path for path, child in module.named_modules()}
        waiting: deque[tuple[str, Any]] = deque((path, child) for path, child in module.named_modules())
        code = code_of(module) if code is None else code
        self._names = [(space, name, where, value_in(space, name)) for space, name, where in namespaces(module, code)]
        waiting.extend((where, value) for _, _, where, value in self._names)
        while waiting and len(self._nodes) < _MOST:
            where, value = waiting.popleft()
            if id(value) in seen:
                continue
            seen[id(value)] = value
            held = contents(value)
            if held is None:
                continue
            self._nodes.append((value, where, held))
            inner = [(label, item) for label, item in _items(value, held, where) if not is_constant(item)]
            waiting.extend((names.get(id(item), label), item) for label, item in inner)

    def changes(self) -> Iterator[StateChange]:
        """Yield the places that are other than they were."""
        for space, name, where, was in self._names:
            now = value_in(space, name)
            if not same(was, now):
                yield StateChange(space, where, name, was, now)
        for owner, where, before in self._nodes:
            after = contents(owner)
            if isinstance(before, dict):
                changed = False
                for key in dict.fromkeys((*before, *(after or ()))):
                    was, now = before.get(key, ABSENT), after.get(key, ABSENT)
                    if not same(was, now):
                        changed = True
                        yield StateChange(owner, _label(owner, where, key), key, was, now)
                if isinstance(owner, dict) and not changed and list(before) != list(after):  # as a cache reorders them
                    yield StateChange(owner, where, WHOLE, before, after)
            elif isinstance(before, LeafState):
                if not before.equal(after):
                    yield StateChange(owner, where, WHOLE, before, after)
            elif len(before) != len(after) or not all(map(same, before, after)):
                yield StateChange(owner, where, WHOLE, before, after)

    def places(self) -> Iterator[tuple[Any, Any, str, Any]]:
        """Yield (owner, key, place in words, value then) of each attribute, entry and name; not of tensors."""
        named = set()
        for space, name, where, value in self._names:
            named.add((id(space), name))
            yield space, name, where, value
        for owner, where, held in self._nodes:
            if isinstance(held, dict):
                for key, value in held.items():
                    hook = isinstance(owner, nn.Module) and isinstance(key, tuple)
                    if not hook and (id(owner), key) not in named:  # as the defaults of a function may be
                        yield owner, key, _label(owner, where, key), value
            elif isinstance(owner, (list, deque)):
                for i, value in enumerate(held):
                    yield owner, i, f"{where}[{i}]", value

    def lend(self) -> None:
        """Put copies in place of iterators, of which nothing is to be drawn, until `restore`."""
        copies: dict[int, Any] = {}

        def lent(value: Any, where: str) -> Any:
            if type(value) is tuple and value:
                items = [lent(item, f"{where}[{i}]") for i, item in enumerate(value)]
                return value if all(map(operator.is_, items, value)) else tuple(items)
            if not is_iterator(value):
                return value
            if id(value) not in copies:
                copies[id(value)] = copied(value, where)
            return copies[id(value)]

        if self._iterators is None:
            self._iterators = [place for place in self.places() if _holds_iterator(place[-1])]
        for owner, key, where, value in self._iterators:
            other = lent(value, where)
            if other is not value:
                put_item(owner, key, other)

    def restore(self) -> None:
        """Put everything back as it was."""
        for space, name, _, was in self._names:
            if value_in(space, name) is not was:
                put_in(space, name, was)
        for owner, _, before in self._nodes:
            put_back(owner, before)


def _holds_iterator(value: Any) -> bool:
    return any(map(_holds_iterator, value)) if type(value) is tuple else is_iterator(value)


def item_of(owner: Any, key: Any) -> Any:
    """Return the attribute or entry that a `StateChange` names, as it is now."""
    place, key = _place(owner, key)
    if isinstance(place, (list, deque)):
        return place[key] if key < len(place) else ABSENT
    return dict.get(place, key, ABSENT) if isinstance(place, dict) else value_in(place, key)


def put_item(owner: Any, key: Any, value: Any) -> None:
    """Put a value where a `StateChange` says; `ABSENT` takes it away."""
    place, key = _place(owner, key)
    if isinstance(place, (list, deque)):
        place[key] = value
    elif isinstance(place, dict) and value is ABSENT:
        _dict_of(place).pop(place, key, None)
    elif isinstance(place, dict):
        _dict_of(place).__setitem__(place, key, value)
    elif place is owner and value is not ABSENT and is_record(owner):  # a slot; its class may guard it
        object.__setattr__(owner, key, value)
    else:
        put_in(place, key, value)


def _dict_of(held: dict[Any, Any]) -> Any:
    """Return the class that dicts like this come from: their own may guard or compute entries."""
    return OrderedDict if isinstance(held, OrderedDict) else dict


def _place(owner: Any, key: Any) -> tuple[Any, Any]:
    """Return the namespace in which `contents` has found a key of an owner, and the key in it."""
    if isinstance(owner, nn.Module):
        return (owner.__dict__[key[0]], key[1]) if isinstance(key, tuple) else (owner.__dict__, key)
    if not isinstance(owner, dict) and is_record(owner) and key in (held := _attributes(owner) or {}):
        return held, key
    return owner, key


def _attributes(owner: Any) -> Any:
    """Return the `__dict__` of an object, not through its class, which may guard or compute attributes; or None."""
    try:
        return object.__getattribute__(owner, "__dict__")
    except AttributeError:  # it has slots
        return None


def _is_state(attribute: str) -> bool:
    """Decide whether an attribute of a module, in its `__dict__`, is one that a forward may change."""
    return attribute == "training" or (attribute not in OWN and not attribute.startswith("_ecospa"))


def contents(value: Any) -> Any:
    """Copy the contents of a module, container or object: a dict or a tuple; None for anything else."""
    if isinstance(value, nn.Module):
        held = {key: item for key, item in value.__dict__.items() if _is_state(key)}
        for kind in (*TENSORS, *HOOKS):
            held |= {(kind, key): item for key, item in value.__dict__.get(kind, {}).items()}
        return held
    if isinstance(value, dict):
        return _without_compiled(value) if "__builtins__" in value else dict(plain(value))
    if isinstance(value, (list, deque, set)):
        return tuple(value)
    if type(value) is tuple:
        return value
    if _has_state(value):
        return LeafState(value)
    if isinstance(value, FunctionType):
        held = {**value.__dict__, **mutable_defaults(value)}
        return None if not held and foreign_code(value.__module__) else held
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if not is_record(value):
        return None
    held = dict(_attributes(value) or ())
    return held | {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}


def _without_compiled(names: dict[str, Any]) -> dict[str, Any]:
    """Copy globals without those that torch.compile puts there for its code, which goes on reading them."""
    return {name: value for name, value in names.items() if not name.startswith(_COMPILED)}


_COMPILED = ("__builtins_dict__", "__compiled_fn_", "__resume_at_", "__import_")


def _items(owner: Any, held: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(held, LeafState):
        return
    if isinstance(held, dict):
        for key, item in held.items():
            if not (
                isinstance(key, tuple) and key[:1] and key[0] in (*TENSORS, *HOOKS) and not isinstance(item, nn.Module)
            ):
                yield _label(owner, where, key), item
    else:
        for i, item in enumerate(held):
            yield f"{where}[{i}]", item


def _label(owner: Any, where: str, key: Any) -> str:
    if isinstance(owner, nn.Module) and isinstance(key, tuple):
        key = key[1]
    if isinstance(owner, (dict, list, tuple)):
        return f"{where}[{key!r}]"
    return f"{where}.{key}" if where else str(key)


def put_back(owner: Any, before: Any) -> None:
    """Give a module, container or object the contents that `contents` has copied."""
    if isinstance(before, LeafState):
        if not before.equal(LeafState(owner)) or isinstance(owner, Tensor):
            before.put(owner)
    elif isinstance(owner, nn.Module):
        attributes = owner.__dict__
        plain = {key: item for key, item in before.items() if not isinstance(key, tuple)}
        now = {key for key in attributes if _is_state(key)}
        for key in now - plain.keys():
            del attributes[key]
        attributes.update(plain)
        for kind in (*TENSORS, *HOOKS):
            held = attributes[kind]
            wanted = {key[1]: item for key, item in before.items() if isinstance(key, tuple) and key[0] == kind}
            if list(held) != list(wanted) or any(held[key] is not item for key, item in wanted.items()):
                held.clear()
                held.update(wanted)
    elif isinstance(owner, (list, deque)):
        if len(owner) != len(before) or any(a is not b for a, b in zip(owner, before, strict=True)):
            owner.clear()
            owner.extend(before)
    elif isinstance(owner, set):
        if owner != set(before):
            owner.clear()
            owner.update(before)
    elif isinstance(owner, dict):
        now = contents(owner)
        if list(now) != list(before) or any(dict.get(owner, key, ABSENT) is not item for key, item in before.items()):
            base = _dict_of(owner)
            kept = {key: item for key, item in owner.items() if key not in now} if "__builtins__" in owner else {}
            base.clear(owner)
            for key, item in (before | kept).items():
                base.__setitem__(owner, key, item)
    elif isinstance(owner, FunctionType):
        held_now = contents(owner) or {}
        for key in dict.fromkeys((*held_now, *before)):
            if held_now.get(key, ABSENT) is not before.get(key, ABSENT):
                put_in(owner, key, before.get(key, ABSENT))
    elif not isinstance(before, tuple):
        there: dict[str, Any] = contents(owner) or {}
        held = _attributes(owner) or {}
        for key in there.keys() - before.keys():
            if held.pop(key, ABSENT) is ABSENT:
                object.__delattr__(owner, key)
        slots = _slots(type(owner))
        for key, item in before.items():
            if there.get(key, ABSENT) is item:
                continue
            if key in slots:
                object.__setattr__(owner, key, item)
            else:
                held[key] = item
