"""RecordedCall: the call of a whole model that its regions were captured in, to make one like it later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

MOST = 1 << 20  # integers that are remembered
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class _Blank:
    """A tensor of real numbers, without these."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def filled(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.shape, generator=generator).to(self.device, self.dtype)


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """The arguments of a call: integers (tokens, masks) as they were, real numbers by shape alone.

    Attributes:
        arguments: positional arguments and keyword arguments, with blanks in them.
    """

    arguments: tuple[tuple[Any, ...], Mapping[str, Any]]

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make a call: blanks are filled at random, always the same."""
        generator = torch.Generator().manual_seed(0)
        leaves, spec = pytree.tree_flatten(self.arguments, is_leaf=lambda leaf: isinstance(leaf, _Blank))
        filled = [each.filled(generator) if isinstance(each, _Blank) else _own(each) for each in leaves]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return args, kwargs


def recorded_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RecordedCall | None:
    """Record a call; None where it holds something that cannot be made again, such as a cache."""
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    kept: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and type(leaf) is Tensor:
            real = leaf.is_floating_point()
            if not real and (leaf.is_complex() or leaf.numel() > MOST):
                return None
            kept.append(_Blank(tuple(leaf.shape), leaf.dtype, leaf.device) if real else _own(leaf))
        elif isinstance(leaf, _PLAIN):
            kept.append(leaf)
        else:
            return None
    return RecordedCall(pytree.tree_unflatten(kept, spec))


def _own(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
