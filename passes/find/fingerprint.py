"""Fingerprint: all of a block that its graph depends on, so that equal blocks are captured once.

Blocks of equal classes and shapes may differ in a plain attribute that matters (a sliding window or none, another
rotary base) or in one that does not (their number). So the attributes that a forward reads are recorded while a block
is captured; another block may use the graph if its classes, its shapes and *those* attributes are equal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ecospa_fx.passes.capture.reads import AttributeReads
from ecospa_fx.passes.graph.namespaces import ABSENT
from ecospa_fx.passes.graph.python_state import OWN, is_constant
from ecospa_fx.passes.graph.tensors import named_tensors, parameters_of


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """All of a block that its captured graph depends on, apart from the call.

    Attributes:
        modules: path -> class.
        tensors: name -> type, shape, dtype, device and whether it requires a gradient.
        read: (path, attribute) -> the value that the forward read.
        ties: groups of names of one parameter.
        hooked: whether submodules have forward hooks.
    """

    modules: dict[str, type]
    tensors: dict[str, tuple[Any, ...]]
    read: dict[tuple[str, str], Any]
    ties: list[list[str]]
    hooked: bool

    def fits(self, module: nn.Module) -> bool:
        """Return whether a graph captured from the block is right for `module` too."""
        other = fingerprint(module, {})
        if (self.modules, self.tensors, self.ties) != (other.modules, other.tensors, other.ties):
            return False
        if self.hooked or other.hooked:
            return False  # hooks may do anything
        submodules = dict(module.named_modules(remove_duplicate=False))
        return all(
            _same(value, submodules[path].__dict__.get(name, ABSENT)) for (path, name), value in self.read.items()
        )


Settings = dict[tuple[str, str], Any]  # (submodule path, attribute) -> a constant that forward reads

_MOST_ENTRIES = 64  # of a list or dict of constants, which is compared at every call


def frozen(value: Any) -> Any:
    """Copy a list, dict or set, one level deep, so that later changes of it do not reach the copy."""
    return value.copy() if type(value) in (list, dict, set) else value


def is_setting(value: Any) -> bool:
    """Return whether a value is a constant, or a small container of constants, and can be compared at every call."""
    if is_constant(value):
        return True
    if type(value) in (list, set, dict):
        parts = [*value, *value.values()] if type(value) is dict else value
        return len(parts) <= _MOST_ENTRIES and all(map(is_constant, parts))
    return False


def settings(module: nn.Module, names: Iterable[tuple[str, str]]) -> Settings:
    """Return the attributes of a module and its submodules that are constants, with their values now.

    An attribute that the instance does not have is looked up in its class, and is `ABSENT` where that has none.
    """
    named = dict(module.named_modules(remove_duplicate=False))
    constants: Settings = {}
    for path, name in names:
        child = named[path]
        value = child.__dict__.get(name, getattr(type(child), name, ABSENT))
        registered = any(name in child.__dict__.get(kind, ()) for kind in ("_parameters", "_buffers", "_modules"))
        if is_setting(value) or (value is ABSENT and not registered):
            constants[path, name] = frozen(value)
    return constants


def fingerprint(module: nn.Module, reads: AttributeReads, indices: Collection[tuple[str, str]] = ()) -> Fingerprint:
    """Return the fingerprint of a block whose forward read `reads`; `indices` among them may differ between blocks."""
    named = dict(module.named_modules(remove_duplicate=False))
    tensors = named_tensors(module).items()
    groups: dict[int, list[str]] = {}
    for name, parameter in parameters_of(module, remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return Fingerprint(
        modules={path: type(child) for path, child in named.items()},
        tensors={name: (type(t), t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors},
        # Attributes that are read and not in the instance belong to the class, or nn.Module looks them up itself.
        read={
            (path, name): frozen(named[path].__dict__[name])
            for path, names in reads.items()
            for name in names - OWN
            if name in named[path].__dict__ and (path, name) not in indices
        },
        ties=[names for names in groups.values() if len(names) > 1],
        hooked=any(child._forward_hooks or child._forward_pre_hooks for path, child in named.items() if path),
    )


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are certainly equal: objects of unknown types are equal only to themselves."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, (bool, int, float, str, torch.dtype, torch.device)) and bool(a == b)
