"""Isolation: a forward leaves no trace in buffers, random generators or the autocast cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .tensors import named_tensors, swapped


def fresh_leaf(leaf: Any) -> Any:
    """Return a detached copy of a tensor, to differentiate by where its dtype allows; anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach().clone()
    return leaf.requires_grad_() if leaf.is_floating_point() else leaf


def forked_rng(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context that restores the random generators of the CPU and of the module's devices."""
    devices = {tensor.device.index for tensor in named_tensors(module).values() if tensor.is_cuda}
    forked: AbstractContextManager[None] = torch.random.fork_rng(devices=sorted(devices))
    return forked


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Turn the autocast cache off: casts of parameters made here, without gradients, must not serve later calls."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Restore buffers (running statistics) and the random state after the forwards inside."""
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    with forked_rng(model), swapped(model, buffers):
        yield
