"""Configured: the configuration object of a model, as a maker of models of its class at other sizes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ecospa_fx.passes.graph.stand_in_class import quiet_subclass
from ecospa_fx.plan import Plan

from .compiled import CompiledModel
from .described import Described
from .making import Maker, Number, Where


def configured(model: nn.Module, compiled: CompiledModel) -> Described:
    """Describe a compiled model by its `config`, from which its class makes it."""
    config: Any = getattr(model, "config")  # noqa: B009
    cls: Any = type(model)

    def make(changes: Mapping[Where, Number]) -> nn.Module:
        other = changed(config, changes)
        if hasattr(other, "validate"):
            other.validate()  # as it is when the configuration is saved and loaded
        made: nn.Module = cls(other)
        return made

    maker = Maker(dict(numbers_of(config)), make, _unset(cls, config))
    return Described(model, compiled, maker, f"a {type(config).__name__}")


def configuration_at(model: nn.Module, compiled: CompiledModel, plan: Plan) -> Any:
    """Return a configuration from which its class makes a model at the sizes of a plan; or why there is none."""
    found = configured(model, compiled).numbers(plan)
    return found if isinstance(found, str) else changed(getattr(model, "config"), found)  # noqa: B009


def _unset(cls: Any, config: Any) -> list[Where]:
    """Find the fields that a class asks for and that have no value: it has a default for them of its own."""
    asked: dict[str, None] = {}
    watched = copy.deepcopy(config)
    kind = type(config)
    watched.__class__ = quiet_subclass(kind, {"__getattribute__": _noting(asked, kind)})
    try:
        with torch.device("meta"):
            cls(watched)
    except Exception:  # a class that looks at the type of its configuration
        return []
    held = vars(config)
    free = [name for name in asked if name[:1] != "_" and getattr(config, name, None) is None]
    return [(name,) for name in free if name in held or not hasattr(kind, name)]


def _noting(asked: dict[str, None], kind: Any) -> Any:
    """Return a method that reads attributes as those of a class are read, and notes their names."""

    def get(self: Any, name: str) -> Any:
        asked.setdefault(name)
        return kind.__getattribute__(self, name)

    return get


def numbers_of(config: Any) -> Iterator[tuple[Where, Number]]:
    """Yield the numbers of a configuration and of those below it, with the way to each."""
    below = set(getattr(config, "sub_configs", ()))
    for name, value in vars(config).items():
        if name[:1] == "_":
            continue
        if name in below and hasattr(value, "to_dict"):
            yield from (((name, *where), number) for where, number in numbers_of(value))
        elif type(value) is int and value > 1:
            yield (name,), value
        elif type(value) in (list, tuple) and all(type(item) is int for item in value):
            yield from (((name, i), item) for i, item in enumerate(value) if item > 1)


def changed(config: Any, changes: Mapping[Where, Number]) -> Any:
    """Return a copy of a configuration with other numbers."""
    config = copy.deepcopy(config)
    for where, new in changes.items():
        *path, last = where
        inside = path.pop() if type(last) is int else None
        owner = config
        for name in path:
            owner = getattr(owner, str(name))
        if inside is None:
            setattr(owner, str(last), new)
        else:
            items: Any = getattr(owner, str(inside))
            setattr(owner, str(inside), type(items)(new if i == last else item for i, item in enumerate(items)))
    return config
