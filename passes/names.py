"""Names: what the tensors of a module are called, in it and in the model around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.utils import stateless


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under every name they have: a tied one occurs once per name."""
    return dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """A module with other parameters and buffers, by any of their names, for a while; then with its own again.

    They are put back last first. A module under two names has one place for both: it was taken twice, and what it held
    before the first time is what must come back last.
    """
    with stateless._reparametrize_module(module, dict(tensors), stack_weights=True):
        yield


def join(region: str, name: str) -> str:
    """The name in the model of something that a region calls `name`."""
    return f"{region}.{name}" if region else name
