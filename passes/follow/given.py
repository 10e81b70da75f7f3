"""Given tensors: arguments of which a module takes only some entries once its weights have shrunk.

A rotary table, or a bias of positions, is computed once and handed to every layer at its full size. Generated code
gathers the entries that go with a layer's weights at each call, and so does a module whose own Python runs: `Given` is
a dim of such an argument, and its value the positions that are taken. An argument that the module hands on is handed on
as it came. As for integers (`attributes.py`), trials find which arguments need it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.errors import ShrinkError
from ecospa_fx.passes.axes.algebra import Expr
from ecospa_fx.passes.axes.selection import Selection, in_first_contexts, mask_of, touched
from ecospa_fx.passes.graph.forward_swap import own_forward, swap_forward, swap_of
from ecospa_fx.passes.graph.stand_in_class import below

from .attributes import Attribute

GIVEN = "_ecospa_given"  # key in a module's __dict__
Places = dict[str, dict[str, tuple[int, ...]]]  # path of a module -> place among its arguments -> shape


@dataclass(frozen=True, order=True)
class Given(Attribute):
    """A dim of a tensor that a module gets, of which it takes some entries; its value is their positions.

    Attributes:
        dim: the dim.
        size: the number of entries that are given.
    """

    dim: int = 0
    size: int = 0

    def __str__(self) -> str:
        return f"{self.module}({self.inside})[{self.dim}]"

    def read(self, root: nn.Module) -> tuple[int, ...]:
        """Return the positions that are taken now.

        Raises:
            AttributeError: there is no such module.
        """
        taken: _Taken | None = root.get_submodule(self.module).__dict__.get(GIVEN)
        held = {} if taken is None else taken.positions
        return held.get(replace(self, module=""), tuple(range(self.size)))

    def write(self, root: nn.Module, value: Any) -> None:
        """Let the module take the entries at other positions, or all."""
        module = root.get_submodule(self.module)
        taken: _Taken | None = module.__dict__.pop(GIVEN, None)
        positions = {} if taken is None else dict(taken.positions)
        positions[replace(self, module="")] = tuple(value)
        positions = {each: kept for each, kept in positions.items() if len(kept) < each.size}
        if positions:
            module.__dict__[GIVEN] = _Taken(positions)
            swap_forward(module, GIVEN)
        elif type(module) is swap_of(module, GIVEN):
            module.__class__ = below(type(module))


class _Taken:
    """The forward of a module that takes only some entries of what it is given.

    Attributes:
        positions: dims of arguments -> the positions that are taken.
    """

    def __init__(self, positions: Mapping[Given, tuple[int, ...]]) -> None:
        self.positions = positions
        self._indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._named: list[str] | None = None

    def __reduce__(self) -> Any:
        return _Taken, (dict(self.positions),)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own forward with the entries that it takes."""
        forward = own_forward(module, GIVEN)
        if self._named is None:
            self._named = [*inspect.signature(forward).parameters][1:]  # without self
        whole: dict[int, tuple[Tensor, Tensor]] = {}  # id of a part -> part, and the tensor it is taken from

        def take(given: Given, tensor: Any) -> Any:
            if not isinstance(tensor, Tensor):
                return tensor
            part = self._part(given, tensor, module)
            whole[id(part)] = (part, whole[id(tensor)][1] if id(tensor) in whole else tensor)
            return part

        for given in self.positions:
            name, *path = str(given.inside).split(".")
            number = self._named.index(name) if name in self._named else int(name) if name.isdecimal() else -1
            if name in kwargs:
                kwargs = {**kwargs, name: _replaced(kwargs[name], path, partial(take, given))}
            elif 0 <= number < len(args):
                args = (*args[:number], _replaced(args[number], path, partial(take, given)), *args[number + 1 :])
        return _handed_on(forward(module, *args, **kwargs), whole)

    def _part(self, given: Given, tensor: Tensor, module: nn.Module) -> Tensor:
        """Return the entries that are taken; a dim of one entry is the same for all."""
        entries = tensor.shape[given.dim] if given.dim < tensor.ndim else None
        if entries == 1:
            return tensor
        if entries != given.size:
            raise ShrinkError(
                f"{type(module).__name__} has shrunk and takes {len(self.positions[given])} of {given.size} entries of "
                f"dim {given.dim} of `{given.inside}`, which is {tuple(tensor.shape)}: call it as the model was "
                "captured, or use execution='graph'"
            )
        return tensor.index_select(given.dim, self._index(self.positions[given], tensor.device))

    def _index(self, positions: tuple[int, ...], device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.tensor(positions, device=device)
        key = (positions, device)
        if key not in self._indices:
            with torch.inference_mode(False):  # autograd saves it
                index = torch.tensor(positions, device=device)
            if type(index) is not Tensor:
                return index  # made inside a tracer
            self._indices[key] = index
        return self._indices[key]


def _replaced(value: Any, path: Sequence[str], take: Any) -> Any:
    """Replace the tensor at the end of a path through tuples, lists and dicts."""
    if not path:
        return take(value)
    key, *rest = path
    if isinstance(value, dict):
        return {**value, key: _replaced(value[key], rest, take)} if key in value else value
    if type(value) in (tuple, list) and int(key) < len(value):
        return type(value)(_replaced(v, rest, take) if i == int(key) else v for i, v in enumerate(value))
    return value


def _handed_on(result: Any, whole: Mapping[int, tuple[Tensor, Tensor]]) -> Any:
    """Put the tensors that came in the place of the parts of them that a result hands on."""
    if isinstance(result, Tensor):
        return whole[id(result)][1] if id(result) in whole else result
    if type(result) in (tuple, list):
        return type(result)(_handed_on(each, whole) for each in result)
    if isinstance(result, dict):
        for key, value in [*result.items()]:
            if (other := _handed_on(value, whole)) is not value and isinstance(value, Tensor):
                result[key] = other
    return result


@contextmanager
def noted_arguments(module: nn.Module) -> Iterator[Places]:
    """Note the tensors of real numbers that modules inside are given, for the time inside."""
    places: Places = {}

    def entering(path: str, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = [*inspect.signature(type(child).forward).parameters][1:]
        given = {**{names[i] if i < len(names) else str(i): value for i, value in enumerate(args)}, **kwargs}
        for name, value in given.items():
            for place, tensor in _tensors(value, name):
                places.setdefault(path, {})[place] = tuple(tensor.shape)

    with torch.no_grad():
        handles = [
            child.register_forward_pre_hook(partial(entering, path), with_kwargs=True)
            for path, child in module.named_modules()
            if path
        ]
    try:
        yield places
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield place, value
    elif type(value) in (tuple, list):
        for i, each in enumerate(value):
            yield from _tensors(each, f"{place}.{i}")
    elif type(value) is dict:
        for key, each in value.items():
            if isinstance(key, str) and "." not in key:
                yield from _tensors(each, f"{place}.{key}")


def given_along(
    places: Places, axes: Sequence[tuple[str, int]], axes_of_size: Mapping[int, Sequence[Expr]], kept: Selection
) -> Iterator[tuple[Given, Expr]]:
    """Yield the dims of arguments that may run along a selection, with the axis that each may be.

    Args:
        places: the arguments of each module.
        axes: the (parameter, dim) along which the selection runs: the module that holds them all is given the tensors.
        axes_of_size: number of entries -> axes with as many.
        kept: the selection.
    """
    paths = [name.split(".")[:-1] for name, _ in axes]
    shared = itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*paths, strict=False))
    module = ".".join(parts[0] for parts in shared)
    for place, shape in places.get(module, {}).items():
        for dim, size in enumerate(shape):
            seen = set()
            for expr in axes_of_size.get(size, ()):
                if touched(expr, kept) and (positions := positions_under(expr, kept)) not in seen:
                    seen.add(positions)
                    yield Given(module, GIVEN, place, dim, size), expr


def positions_under(expr: Expr, kept: Selection) -> tuple[int, ...]:
    """Return the positions along an axis that a selection leaves."""
    return tuple(mask_of(expr, in_first_contexts(kept)).nonzero().flatten().tolist())
