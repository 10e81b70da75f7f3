"""Forward swap: a subclass that gives a module object another forward, while it passes isinstance as before.

As in torch's parametrizations and FSDP2, a subclass is made per original class, under the same name, and
`module.__class__` is set to it. Parameters, hooks, attributes and state_dict keys stay where they were. Its forward
looks for a callable in the module's `__dict__` at each call, and is that of the class below where there is none: so a
swap is undone by removing that, whatever class others have put on top since.

A callable with a method `refuse_script` is asked before torch.jit.script compiles the module.

A forward on the instance hides that of the class, and may go past it. A callable with a method `missed` can be told of
calls of the module that did so.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .stand_in_class import below, is_stand_in, stand_in_class

_SWAPPED: dict[tuple[type, str], type] = {}


def swap_forward(module: nn.Module, attribute: str, missed: bool = False) -> None:
    """Route `module.forward` to the callable in `module.__dict__[attribute]`, which gets `(module, args, kwargs)`.

    Args:
        module: the module.
        attribute: of the callable.
        missed: its `missed` gets them after each call of the module, as long as it is there: one that came to it has
            removed it, or will not mind. The same for all swaps to that attribute.
    """
    if swap_of(module, attribute) is None:
        module.__class__ = _swapped(type(module), attribute, missed)


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


def _swapped(original: type[nn.Module], attribute: str, missed: bool) -> type[nn.Module]:
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
            return _blank, (original, attribute, missed), *reduced[2:]
        return reduced

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original.__call__(self, *args, **kwargs)
        run = self.__dict__.get(attribute)
        if run is not None:
            run.missed(self, args, kwargs)
        return result

    def prepare_scriptable(self: nn.Module) -> nn.Module:
        # torch.jit.script asks each module for what to compile, and would compile the forward below.
        refuse = getattr(self.__dict__.get(attribute), "refuse_script", None)
        if refuse is not None:
            refuse()
        return self

    members: dict[str, Any] = {
        "forward": forward, "__reduce_ex__": reduce_ex, "__prepare_scriptable__": prepare_scriptable,
    }  # fmt: skip
    swapped = stand_in_class(original, members | ({"__call__": call} if missed else {}), announced=True)
    _SWAPPED[original, attribute] = swapped
    return swapped


def _blank(original: type[nn.Module], attribute: str, missed: bool) -> nn.Module:
    """Make an instance without state, for copy and pickle to fill."""
    swapped = _swapped(original, attribute, missed)
    blank: nn.Module = swapped.__new__(swapped)
    return blank
