"""Configured: the configuration object of a model, as a maker of models of its class at other sizes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ecospa_fx.plan import Plan

from .compiled import CompiledModel
from .made_values import difference_of_made
from .making import Maker, Number, Solution, Wanted, Where, solve, wanted_under


class Configured:
    """The numbers of a model's configuration, and what can be expressed with them.

    Args:
        model: a compiled model with a `config` from which its class makes it.
        compiled: its state.
    """

    def __init__(self, model: nn.Module, compiled: CompiledModel) -> None:
        self.model, self.compiled = model, compiled
        self.config: Any = getattr(model, "config")  # noqa: B009
        self.kind, self.config_kind = type(model).__name__, type(self.config).__name__
        self.maker = Maker(dict(_numbers(self.config)), self._make, self._unset())

    def expressing(self, plan: Plan) -> Any:
        """Return a configuration from which the class makes the model at the sizes of a plan; or why there is none."""
        found = self.numbers(plan)
        return found if isinstance(found, str) else changed(self.config, found)

    def numbers(self, plan: Plan, *, values: bool = True, like: Mapping[Where, Number] | None = None) -> Any:
        """Return the numbers that must change, by the way to each; or why there are none.

        Args:
            plan: the plan.
            values: compare results as well, not shapes alone.
            like: change these numbers and no others; values are a start for those that the configuration is without.
        """
        wanted = wanted_under(self.model, self.compiled, plan)
        maker = self.maker
        if like is not None:
            known = {where: maker.numbers[where] for where in like if where in maker.numbers}
            start = {where: value for where, value in like.items() if where not in maker.numbers}
            maker = Maker(known, lambda changes: self._make({**start, **changes}))
            solution = solve(maker, wanted)
            solution = Solution({**start, **solution.changes}, solution.wrong)
        else:
            solution = solve(maker, wanted)
        if solution.wrong:
            return self.says_no(wanted, min(solution.wrong, key=str))
        if values and not any(p.is_meta for p in self.model.parameters()):
            device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
            made = maker.in_memory(solution.changes, device)
            difference = difference_of_made(self.model, self.compiled, plan, made)
            if difference is not None:
                numbers = ", ".join(f"{'.'.join(map(str, where))}={new}" for where, new in solution.changes.items())
                return f"a {self.config_kind} with {numbers} gives the shapes of this {self.kind}, but {difference}"
        return solution.changes

    def says_no(self, wanted: Wanted, wrong: tuple[str, int | str]) -> str:
        """Say which size cannot be expressed."""
        name, dim = wrong
        where = f"`{name}`" if dim == "" else f"`{name}[{dim}]`"
        return (
            f"a {self.config_kind} cannot express the sizes of this {self.kind}: {where} is {wanted.facts.get(wrong)}, and "
            "no numbers in it give that together with the other sizes"
        )

    def _make(self, changes: Mapping[Where, Number]) -> nn.Module:
        cls, config = type(self.model), changed(self.config, changes)
        if hasattr(config, "validate"):
            config.validate()  # as it is when the configuration is saved and loaded
        made: nn.Module = cls(config)
        return made

    def _unset(self) -> list[Where]:
        """Find the fields that the class asks for and that have no value: it has a default for them of its own."""
        asked: dict[str, None] = {}
        config = copy.deepcopy(self.config)
        watched = type(type(config).__name__, (type(config),), {"__getattribute__": _noting(asked, type(config))})
        config.__class__ = watched
        cls: Any = type(self.model)
        try:
            with torch.device("meta"):
                cls(config)
        except Exception:  # a class that looks at the type of its configuration
            return []
        held = vars(self.config)
        free = [name for name in asked if name[:1] != "_" and getattr(self.config, name, None) is None]
        return [(name,) for name in free if name in held or not hasattr(type(self.config), name)]


def _noting(asked: dict[str, None], kind: type) -> Any:
    """Return a method that reads attributes as those of a class are read, and notes their names."""

    def get(self: Any, name: str) -> Any:
        asked.setdefault(name)
        return kind.__getattribute__(self, name)

    return get


def _numbers(config: Any) -> Iterator[tuple[Where, Number]]:
    """Yield the numbers of a configuration and of those below it, with the way to each."""
    below = set(getattr(config, "sub_configs", ()))
    for name, value in vars(config).items():
        if name[:1] == "_":
            continue
        if name in below and hasattr(value, "to_dict"):
            yield from (((name, *where), number) for where, number in _numbers(value))
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
