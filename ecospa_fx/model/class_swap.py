"""Class swaps: the same module object, of the same class by isinstance, with a forward that follows a plan.

As torch's parametrizations and FSDP2 do: a subclass is made per original class, under the same name, and
`module.__class__` is set to it. Parameters, hooks, attributes and state_dict keys stay where they were.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_SWAPPED: dict[tuple[type, str], type] = {}


class ShrinkableLinear(nn.Linear):
    """An nn.Linear whose `in_features` and `out_features` are those of its weight `[out, in]` now."""

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return int(self.weight.shape[1])

    @in_features.setter
    def in_features(self, value: int) -> None:
        """Read off the weight; nn.Linear's constructor assigns it."""

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return int(self.weight.shape[0])

    @out_features.setter
    def out_features(self, value: int) -> None:
        """Read off the weight; nn.Linear's constructor assigns it."""


def swap_linears(region: nn.Module) -> None:
    """Make every plain nn.Linear of a region a `ShrinkableLinear`."""
    for module in region.modules():
        if type(module) is nn.Linear:
            module.__class__ = ShrinkableLinear


def swap_forward(module: nn.Module, attribute: str) -> None:
    """Route `module.forward` to the callable in `module.__dict__[attribute]`, which gets `(module, args, kwargs)`."""
    module.__class__ = _swapped(type(module), attribute)


def _swapped(original: type[nn.Module], attribute: str) -> type[nn.Module]:
    if (original, attribute) in _SWAPPED:
        return _SWAPPED[original, attribute]

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[attribute](self, args, kwargs)

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        made = original.__reduce_ex__(self, protocol)
        # Pickle finds a class by its name, and under this one's name lies the original.
        if isinstance(made, tuple) and made[0] is copyreg.__newobj__ and made[1] == (type(self),):  # type: ignore[attr-defined]
            return _blank, (original, attribute), *made[2:]
        return made

    body = {"forward": forward, "__reduce_ex__": reduce_ex, "_ecospa_class": original, "__doc__": original.__doc__}
    swapped = type(original.__name__, (original,), body)
    swapped.__module__, swapped.__qualname__ = original.__module__, original.__qualname__
    _SWAPPED[original, attribute] = swapped
    return swapped


def _blank(original: type[nn.Module], attribute: str) -> nn.Module:
    """An instance without state, for copy and pickle to fill."""
    swapped = _swapped(original, attribute)
    blank: nn.Module = swapped.__new__(swapped)
    return blank


def unswap_forward(module: nn.Module) -> None:
    """Give a module its original class back."""
    module.__class__ = original_class(module)


@contextmanager
def own_forward_aside(module: nn.Module) -> Iterator[None]:
    """Without the `forward` that someone has set on the instance and that calls the one of its class.

    Accelerate sets one for mixed precision. What we run inside of it must not begin there again.
    """
    outer = module.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if outer is not None:
            module.__dict__["forward"] = outer


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before any forward of ours."""
    cls = type(module)
    while "_ecospa_class" in cls.__dict__:
        cls = cls.__dict__["_ecospa_class"]
    return cls
