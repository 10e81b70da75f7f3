"""Tensors: the parameters and buffers of a module by name; swapping, tying and slicing them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import stateless
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .namespaces import foreign_code


def parameters_of(module: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield parameters by their paths.

    The `named_parameters` of a wrapper may leave the wrapper itself out of names, as that of torch for activation
    checkpointing does, and nothing is found by such a name.
    """
    return nn.Module.named_parameters(module, remove_duplicate=remove_duplicate)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under every name they have: a tied one occurs once per name."""
    return dict((*parameters_of(module, remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Swap parameters and buffers of a module, by any of their names, and put its own back on exit.

    They are put back in reverse order. A tensor of a module that has two names is swapped twice, in one place: the
    tensor that lay there before the first swap must come back last.
    """
    places = held_twice(module)
    with stateless._reparametrize_module(module, dict(tensors), stack_weights=True), held_alike(module, places):
        yield


Held = Sequence[tuple[Any, Any, str]]
"""Places of parameters beside their own: a dict or list, the key in it, and the name of the parameter."""


def held_twice(module: nn.Module) -> Held:
    """Return the places in attributes of a module, and in dicts, lists and objects there, that hold a parameter too.

    A forward that reads `self.weights["gain"]` computes with the parameter `self.gain`, of which nothing knows that
    swaps parameters.
    """
    names = {id(parameter): name for name, parameter in parameters_of(module)}
    places: list[tuple[Any, Any, str]] = []
    seen = set[int]()  # the attributes of objects: those of all layers may be one

    def search(holder: Any, entries: Iterable[tuple[Any, Any]], depth: int) -> None:
        for key, value in entries:
            if isinstance(value, nn.Parameter):
                if id(value) in names:
                    places.append((holder, key, names[id(value)]))
            elif depth and type(value) is dict:
                search(value, value.items(), depth - 1)
            elif depth and type(value) is list:
                search(value, enumerate(value), depth - 1)
            elif depth and _has_attributes(value) and id(value) not in seen:
                seen.add(id(value))
                search(vars(value), vars(value).items(), depth - 1)

    for child in module.modules():
        own = vars(child)
        search(own, ((key, value) for key, value in own.items() if key not in _KEPT), depth=2)
    return places


def _has_attributes(value: Any) -> bool:
    """Return whether a value is an object of somebody's own class, other than a module."""
    cls = type(value)
    if cls.__dictoffset__ == 0 or foreign_code(cls.__module__):
        return False
    return not isinstance(value, (nn.Module, Tensor, type, ModuleType)) and type(vars(value)) is dict


_KEPT = frozenset(vars(nn.Module()))  # `_parameters`, `_modules` and the like, which torch itself looks after


@contextmanager
def held_alike(module: nn.Module, places: Held) -> Iterator[None]:
    """Put what a module now has for its parameters also in the other places that hold them, for the time inside."""
    before = [holder[key] for holder, key, _ in places]
    try:
        for holder, key, name in places:
            owner, _, last = name.rpartition(".")
            holder[key] = module.get_submodule(owner)._parameters[last]  # a stand-in need not be a parameter
        yield
    finally:
        for (holder, key, _), value in zip(places, before, strict=True):
            holder[key] = value


def as_held(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make those of some tensors parameters, without gradients, that are to take the place of parameters of a module.

    Names that the module does not have are left out.
    """
    held = named_tensors(module)
    return {
        name: nn.Parameter(tensor.detach(), requires_grad=False) if isinstance(held[name], nn.Parameter) else tensor
        for name, tensor in tensors.items()
        if name in held
    }


def join(region: str, name: str) -> str:
    """Return the name in the model of something that a region calls `name`."""
    return f"{region}.{name}" if region else name


@contextmanager
def at_original_sizes(module: nn.Module, originals: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Swap in stand-ins at original sizes for the tensors of a module that have shrunk; None: for none."""
    if not originals:
        yield
        return
    with swapped(module, originals):
        yield


def same_storage(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the tied weights: name -> the first of `names` with the same storage."""
    named = named_tensors(module)
    first: dict[Any, str] = {}
    tied: dict[str, str] = {}
    for name in names:
        key = storage_key(named[name])
        if key in first:
            tied[name] = first[key]
        first.setdefault(key, name)
    return tied


def storage_key(tensor: Tensor) -> Any:
    """Return the identity of the memory behind a tensor, on the meta device too, where there is none.

    A tensor whose entries do not lie in one piece of memory (sparse, opaque) is tied to itself only.
    """
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its entries in one piece of memory: `tensor` itself where it is not sparse."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def is_quantized(tensor: Tensor) -> bool:
    """Decide whether a tensor is quantized: by torch itself, or of a class around tensors that says how to undo it."""
    own = is_traceable_wrapper_subclass(tensor) and type(tensor).dequantize is not Tensor.dequantize
    return own or tensor.is_quantized


def dequantized(tensor: Tensor) -> Tensor:
    """Return a tensor without gradients, as plain numbers where it is quantized."""
    return tensor.detach().dequantize() if is_quantized(tensor) else tensor.detach()


def as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as its real and imaginary parts, `[..., 2]`; any other is returned itself.

    Scores count a complex number as these two: |g|² is the sum of their squares, and the change of a loss along w is
    the real part of w times the conjugate of its gradient (torch's convention), the sum of their products.
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def squared(tensor: Tensor) -> Tensor:
    """Square the entries of a tensor, of complex ones their size, in float32; float64 stays float64."""
    if tensor.is_complex():
        return as_real(tensor).square().sum(-1)
    return tensor.double().square() if tensor.dtype == torch.float64 else tensor.float().square()


def twins(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Copy the tensors among some values, without gradients; those that share memory share it in the copies too."""
    memo: dict[int, Any] = {}
    return {
        key: copy.deepcopy(value.detach(), memo) if isinstance(value, Tensor) else value
        for key, value in values.items()
    }


def sliced(tensor: Tensor, positions: dict[int, Tensor]) -> Tensor:
    """Slice out the given positions of each given dim, into memory of their own; without dims, return `tensor`."""
    for dim, index in positions.items():
        tensor = tensor.detach().index_select(dim, index.to(tensor.device))
    return tensor
