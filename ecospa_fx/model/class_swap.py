"""Class swaps: the classes that modules of a compiled model get, and their way back.

A module is routed to a program, or to the capture of its first call, by `ecospa_fx.passes.graph.forward_swap`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ecospa_fx.passes.follow.given import GIVEN
from ecospa_fx.passes.graph.forward_swap import swap_forward, swap_of
from ecospa_fx.passes.graph.isolate import weight_of
from ecospa_fx.passes.graph.stand_in_class import below, is_stand_in, stand_in_class, stands_for
from ecospa_fx.ranks.fsdp2 import class_inside
from ecospa_fx.threads import in_call, is_alone


class ShrinkableLinear(nn.Linear):
    """An nn.Linear that reads `in_features` and `out_features` off its weight `[out, in]`."""

    __jit_unused_properties__ = ("in_features", "out_features")  # torch.jit.script compiles all others

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return int(weight_of(self).shape[1])

    @in_features.setter
    def in_features(self, value: int) -> None:
        """Ignore the value, which nn.Linear's constructor assigns."""

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return int(weight_of(self).shape[0])

    @out_features.setter
    def out_features(self, value: int) -> None:
        """Ignore the value, which nn.Linear's constructor assigns."""


def swap_linears(region: nn.Module) -> None:
    """Make every plain nn.Linear of a region a `ShrinkableLinear`."""
    for module in region.modules():
        if type(module) is nn.Linear:
            module.__class__ = ShrinkableLinear


class CopiesWait:
    """An entry of a module's `__dict__`: copies of the module, by copy or pickle, wait for their first call.

    The module itself has its own class and runs its own forward; each copy is made as after `swap_forward`, and hears
    of calls that go past it.

    Args:
        module: the module.
        attribute: as for `swap_forward`.
    """

    def __init__(self, module: nn.Module, attribute: str) -> None:
        self.module, self.attribute = weakref.ref(module), attribute

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _copy_waits, (self.module(), self.attribute)


def _copy_waits(copied: nn.Module, attribute: str) -> CopiesWait:
    swap_forward(copied, attribute, missed=True)
    return CopiesWait(copied, attribute)


def is_waiting(module: nn.Module, attribute: str) -> bool:
    """Decide whether the class of a module routes its forward to the callable in that attribute, and it is there."""
    return attribute in module.__dict__ and swap_of(module, attribute) is not None


def unswap_forward(module: nn.Module) -> None:
    """Give a module its original class back, as far as no class of others lies on top of those made here.

    One that takes only some entries of what it is given goes on doing so.
    """
    while is_stand_in(type(module)):
        module.__class__ = below(type(module))
    if GIVEN in module.__dict__:
        swap_forward(module, GIVEN)


@contextmanager
def own_forward_aside(module: nn.Module) -> Iterator[None]:
    """Remove for a while a `forward` on the instance that wraps the one of its class, as accelerate sets it.

    Inside of that wrapper a call of the module must not go through it once more.
    """
    outer = module.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if outer is not None:
            module.__dict__["forward"] = outer


@contextmanager
def others_wait(module: nn.Module) -> Iterator[None]:
    """Let calls of a module by other threads wait for this one, which is alone, while it has its own class."""
    if threading.active_count() == 1:
        yield
        return
    cls = type(module)

    def waiting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_alone():
            with in_call():
                pass
            if not isinstance(self, waits):
                return self(*args, **kwargs)
        return cls.__call__(self, *args, **kwargs)

    module.__class__ = waits = stand_in_class(cls, {"__call__": waiting})
    try:
        yield
    finally:
        module.__class__ = cls


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before any class swap, those on top of ours included."""
    return stands_for(class_inside(stands_for(type(module))))
