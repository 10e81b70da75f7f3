"""Even draws: a mode in which a random tensor holds one number in all of its entries, whatever its sizes are.

Python that has shrunk draws `torch.randn(h.shape)` at the sizes left, a program draws it whole and selects. Both are
right, and can be compared only where the entries of a draw are alike. They must not all be dropped either, or nothing
is compared: coins show heads, and uniform numbers are the middle of their range, with which a mask made of them keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ecospa_fx.passes.graph.nodes import may_draw


class EvenDraws(TorchDispatchMode):
    """A mode in which draws with numbers as parameters are made once, and repeated over the entries.

    Draws whose parameters are tensors are left alone: these tensors have the sizes of the draw.
    """

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op."""
        kwargs = kwargs or {}
        if not may_draw(func):
            return func(*args, **kwargs)
        schema = func._schema.arguments
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        names = [argument.name for argument in schema]
        if not tensors and "size" in names:
            at = names.index("size")
            size = args[at]
            one = _kept(func, args, func(*args[:at], [1], *args[at + 1 :], **kwargs))
            return one.expand(size).clone()
        if len(tensors) == 1 and tensors[0] is args[0]:
            if schema[0].alias_info is not None:
                return args[0].copy_(_kept(func, args, func(args[0].new_empty(1), *args[1:], **kwargs)))
            if func._schema.name.endswith("_like"):
                one = _kept(func, args, func(args[0].new_empty(1), *args[1:], **kwargs))
                return one.expand(args[0].shape).clone()
            if func is torch.ops.aten.bernoulli.p:
                return torch.ones_like(args[0])
        return func(*args, **kwargs)


def _kept(func: Any, args: Sequence[Any], drawn: Tensor) -> Tensor:
    """Return a draw with which a mask made of it keeps its entries."""
    aten = torch.ops.aten
    match func.overloadpacket:
        case aten.bernoulli_:
            return torch.ones_like(drawn)
        case aten.rand | aten.rand_like:
            return torch.full_like(drawn, 0.5)
        case aten.uniform_:
            low, high = args[1] if len(args) > 1 else 0.0, args[2] if len(args) > 2 else 1.0
            return torch.full_like(drawn, (low + high) / 2)
    return drawn


def even_draws() -> AbstractContextManager[Any]:
    """Return the mode, as a context."""
    return EvenDraws()  # type: ignore[no-untyped-call]
