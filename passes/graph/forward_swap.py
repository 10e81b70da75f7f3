"""Forward swap: a subclass that gives a module object another forward, while it passes isinstance as before.

As in torch's parametrizations and FSDP2, a subclass is made per original class, under the same name, and
`module.__class__` is set to it. Parameters, hooks, attributes and state_dict keys stay where they were. Its forward
looks for a callable in the module's `__dict__` at each call, and is that of the class below where there is none: so a
swap is undone by removing that, whatever class others have put on top since.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .stand_in_class import below, is_stand_in, stand_in_class

_SWAPPED: dict[tuple[type, str], type] = {}


def swap_forward(module: nn.Module, attribute: str) -> None:
    """Route `module.forward` to the callable in `module.__dict__[attribute]`, which gets `(module, args, kwargs)`."""
    if swap_of(module, attribute) is None:
        module.__class__ = _swapped(type(module), attribute)


def swap_of(module: nn.Module, attribute: str) -> Any:
    """Return the class among those of a module that `swap_forward` has made for an attribute; None if there is none."""
    for cls in type(module).__mro__:
        if is_stand_in(cls) and _SWAPPED.get((below(cls), attribute)) is cls:
            return cls
    return None


def own_forward(module: nn.Module, attribute: str) -> Callable[..., Any]:
    """Return the forward that a module would run if it were not routed to the callable in that attribute."""
    swap = swap_of(module, attribute)
    forward: Callable[..., Any] = (type(module) if swap is None else below(swap)).forward
    return forward


def forwards_to(module: nn.Module, attribute: str) -> bool:
    """Decide whether a `forward` on the instance ends in a function of `swap_forward`.

    So it does where a module was compiled before accelerate wrapped its forward: that wrapper kept the function.
    """
    ours = [_SWAPPED[cls, attribute] for cls in type(module).__mro__ if (cls, attribute) in _SWAPPED]
    function = module.__dict__.get("forward")
    while function is not None:
        function = getattr(function, "__func__", function)
        if any(function is swap.__dict__["forward"] for swap in ours):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _swapped(original: type[nn.Module], attribute: str) -> type[nn.Module]:
    if (original, attribute) in _SWAPPED:
        return _SWAPPED[original, attribute]

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = self.__dict__.get(attribute)
        if run is None:  # the swap has been undone, under another class or for somebody who kept this function
            return original.forward(self, *args, **kwargs)
        return run(self, args, kwargs)

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        reduced = original.__reduce_ex__(self, protocol)
        # Pickle looks a class up by its name, and under the name of this one it would find the original.
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__ and reduced[1] == (type(self),):  # type: ignore[attr-defined]
            return _blank, (original, attribute), *reduced[2:]
        return reduced

    swapped = stand_in_class(original, {"forward": forward, "__reduce_ex__": reduce_ex})
    _SWAPPED[original, attribute] = swapped
    return swapped


def _blank(original: type[nn.Module], attribute: str) -> nn.Module:
    """Make an instance without state, for copy and pickle to fill."""
    swapped = _swapped(original, attribute)
    blank: nn.Module = swapped.__new__(swapped)
    return blank
