"""Border: the dims of a region's arguments, results and tied weights along which it shrinks together with the model.

A tensor that one region returns and another takes carries an axis of both. Where all that it meets on the way is known,
the axis is one coupling, and no edge of a region pins it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch.utils._pytree as pytree
from torch import Tensor

from .state_access import foreign

WeightDim: TypeAlias = tuple[str, int]  # full name of a parameter, dim

Argument: TypeAlias = tuple[str, int]  # name of an argument, see `argument_names`; dim
Result: TypeAlias = tuple[int, int]  # number among the tensors that a region returns, dim

Edge: TypeAlias = tuple[str, "str | int", int]  # "argument", "result" or "tied"; name or number; dim


@dataclass(frozen=True)
class Border:
    """The dims at the edge of one region that shrink with the model around it.

    Each has the dim of a parameter of the model that runs along the same axis; None while that is still looked for.

    Attributes:
        arguments: dims of tensors that the region is called with.
        results: dims of tensors that it returns.
        tied: dims of weights that something outside the region holds too, by name in the region.
    """

    arguments: Mapping[Argument, WeightDim | None] = field(default_factory=dict)
    results: Mapping[Result, WeightDim | None] = field(default_factory=dict)
    tied: Mapping[WeightDim, WeightDim | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.arguments or self.results or self.tied)

    def __hash__(self) -> int:
        return hash(self.edges())

    def edges(self) -> frozenset[Edge]:
        """Return all dims, without the parameters along which they run."""
        return frozenset(self.along())

    def along(self) -> dict[Edge, WeightDim | None]:
        """Map each dim to the dim of a parameter that runs along it."""
        along: dict[Edge, WeightDim | None] = {
            ("argument", name, dim): of for (name, dim), of in self.arguments.items()
        }
        along |= {("result", number, dim): of for (number, dim), of in self.results.items()}
        return along | {("tied", name, dim): of for (name, dim), of in self.tied.items()}

    def dims_of(self, argument: str) -> list[int]:
        """List the dims of an argument that shrink."""
        return [dim for name, dim in self.arguments if name == argument]

    @staticmethod
    def of(edges: Mapping[Edge, WeightDim | None]) -> Border:
        """Make a border of what `along` returns."""
        parts: dict[str, dict[Any, WeightDim | None]] = {"argument": {}, "result": {}, "tied": {}}
        for (kind, name, dim), of in edges.items():
            parts[kind][name, dim] = of
        return Border(parts["argument"], parts["result"], parts["tied"])


NO_BORDER = Border()


def argument_names(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Name the tensors of a call, in order, by the parameters of the forward that they are passed to.

    A tensor inside a container gets the path to it: `states[0]`.

    Args:
        forward: as a class has it, with the module as its first parameter.
        args: positional arguments of the call.
        kwargs: keyword arguments of it.
    """
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]  # without the module itself
    except (TypeError, ValueError):
        parameters = []
    names: list[str] = []
    for i in range(len(args)):
        rest = next((p for p in parameters if p.kind is p.VAR_POSITIONAL), None)
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if i < len(positional):
            names.append(positional[i].name)
        else:
            names.append(f"{rest.name if rest else 'argument'}[{i - len(positional)}]")
    found: list[str] = []
    for name, value in (*zip(names, args, strict=True), *kwargs.items()):
        for path, leaf in pytree.tree_flatten_with_path(value, is_leaf=foreign)[0]:
            if isinstance(leaf, Tensor):
                found.append(f"{name}{pytree.keystr(path)}")
    return tuple(found)
