"""Names: what the tensors of a module are called, in it and in the model around it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def at_original_sizes(module: nn.Module, originals: Mapping[str, Tensor] | None) -> Iterator[None]:
    """A module with stand-ins at original sizes for what has shrunk."""
    if not originals:
        yield
        return
    with swapped(module, originals):
        yield


def same_storage(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Tied weights: name -> the first of `names` with the same storage."""
    named = named_tensors(module)
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    for name in names:
        key = storage_key(named[name])
        if key in first:
            same[name] = first[key]
        first.setdefault(key, name)
    return same


def storage_key(tensor: Tensor) -> Any:
    """Identity of the memory behind a tensor, also where there is none (meta)."""
    return tensor.untyped_storage()._cdata


def sliced(tensor: Tensor, steps: dict[int, Tensor]) -> Tensor:
    """`tensor` with only the given positions of each given dim, in memory of its own."""
    for dim, index in steps.items():
        tensor = tensor.detach().index_select(dim, index.to(tensor.device))
    return tensor
