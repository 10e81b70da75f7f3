"""Isolate: run a forward without leaving a trace in buffers, generators or the autocast cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .tensors import named_tensors, swapped


def fresh_leaf(leaf: Any) -> Any:
    """A copy of a tensor to differentiate by, where it can be; what is no tensor as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach().clone()
    return leaf.requires_grad_() if leaf.is_floating_point() else leaf


def forked_rng(module: nn.Module) -> AbstractContextManager[None]:
    """Random draws inside leave the generators of the CPU and of the module's devices as they were."""
    devices = {tensor.device.index for tensor in named_tensors(module).values() if tensor.is_cuda}
    forked: AbstractContextManager[None] = torch.random.fork_rng(devices=sorted(devices))
    return forked


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Autocast keeps the casts of parameters it makes; those made here without gradients must not be met later."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Forwards inside leave buffers (running statistics) and the random state as they were."""
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    with forked_rng(model), swapped(model, buffers):
        yield
