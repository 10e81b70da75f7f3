"""Signature: what a call of a region must look like for a captured graph to serve it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .passes.axes import Size

AUTOCAST = ("cpu", "cuda")  # kinds of devices that autocast is looked at for
Autocast = tuple[torch.dtype | None, ...]
TENSOR = object()  # stands for a tensor among the leaves of arguments and results


@dataclass(frozen=True, eq=False)
class Signature:
    """What a call must look like for a captured graph to serve it.

    Attributes:
        spec: tree of the arguments.
        leaves: the leaves of that tree: `TENSOR` where there is a tensor, else the value itself.
        tensors: (dtype, device, sizes) of each tensor, a size being an int where it was specialised.
        training: the training flag of each module of the region.
        ranges: least and largest size of each dynamic dim.
        autocast: the dtypes that autocast casts to, under which the graph has been compared with eager.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    tensors: tuple[tuple[torch.dtype, torch.device, tuple[Size, ...]], ...]
    training: tuple[bool, ...]
    ranges: Mapping[sympy.Symbol, tuple[float, float]]
    autocast: Autocast

    def mismatch(self, spec: pytree.TreeSpec, leaves: Sequence[Any], training: tuple[bool, ...]) -> str | None:
        """Why a call does not fit, or None where it does."""
        if training != self.training:
            return "train and eval mode differ"
        if autocast_now() != self.autocast:
            return "autocast is another"
        if spec != self.spec:
            return "the arguments are structured differently"
        tensors = iter(self.tensors)
        sizes: dict[Any, int] = {}
        for mine, given in zip(self.leaves, leaves, strict=True):
            if isinstance(given, Tensor) != (mine is TENSOR):
                return "a tensor argument became a constant or the reverse"
            if mine is not TENSOR:
                if not _same_constant(mine, given):
                    return f"the constant argument {given!r} was {mine!r}"
                continue
            dtype, device, shape = next(tensors)
            if given.dtype != dtype or given.device != device or given.ndim != len(shape):
                return f"a tensor is {given.dtype} {tuple(given.shape)} on {given.device}, was {dtype} on {device}"
            for size, now in zip(shape, given.shape, strict=True):
                if type(size) is int:
                    if size != now:
                        return f"a dim of {now} was specialised to {size}"
                elif isinstance(size, sympy.Symbol) and sizes.setdefault(size, now) != now:
                    return f"dims that were equal are {sizes[size]} and {now}"
        for symbol, now in sizes.items():
            low, high = self.ranges.get(symbol, (0, math.inf))
            if not low <= now <= high:
                return f"a dim of {now} lies outside {low} to {high}"
        tensors = iter(self.tensors)
        for given in leaves:
            if isinstance(given, Tensor):
                for size, now in zip(next(tensors)[2], given.shape, strict=True):
                    if isinstance(size, sympy.Expr) and not size.is_Symbol and size.subs(sizes) != now:
                        return f"a dim of {now} was {size}"
        return None

    def dynamic_sizes(self, inputs: Sequence[Tensor]) -> dict[sympy.Symbol, int]:
        """The sizes that a call with these tensors gives to the dynamic dims."""
        return {
            size: now
            for given, (_, _, shape) in zip(inputs, self.tensors, strict=True)
            for size, now in zip(shape, given.shape, strict=True)
            if isinstance(size, sympy.Symbol)
        }


def _same_constant(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def autocast_now() -> Autocast:
    """The dtype that autocast casts to on each kind of device, None where it is off."""
    return tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in AUTOCAST)


def training_flags(module: nn.Module) -> tuple[bool, ...]:
    """The training flag of every module of a region: train and eval are two signatures, and so is a frozen norm."""
    # Asked at every call, so not by way of `nn.Module.modules`, whose generators cost as much as a small layer.
    return tuple(child.training for child in below(module))


def below(module: nn.Module) -> list[nn.Module]:
    """A module and all in it, in the order of `training_flags`."""
    found, waiting, seen = [], [module], {id(module)}
    while waiting:
        found.append(child := waiting.pop())
        for grandchild in child._modules.values():
            if grandchild is not None and id(grandchild) not in seen:
                seen.add(id(grandchild))
                waiting.append(grandchild)
    return found


def _state(module: nn.Module) -> tuple[Hashable, ...]:
    """`training_flags`, and how many hooks of each kind the submodules have, where they have any."""
    modules = below(module)
    state: list[Hashable] = [child.training for child in modules]
    for i, child in enumerate(modules[1:]):
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
            kinds = child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks
            state.append((i, *map(len, kinds)))
    return tuple(state)


def call_key(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Hashable, list[Tensor]] | None:
    """A key that equal calls share, for a look-up that is cheaper than `Signature.mismatch`, and the tensors in it.

    All that `Signature.mismatch` looks at must be in it. None where it cannot tell: where there are arguments of
    unknown types, or sizes that are not plain numbers.
    """
    if torch.compiler.is_compiling():
        return None  # a traced look-up by sizes would make every size a constant
    key: list[Any] = [_state(module)]
    if torch._C._is_any_autocast_enabled():
        key.append(autocast_now())
    tensors: list[Tensor] = []
    if not (_describe(args, key, tensors) and _describe(kwargs, key, tensors)):
        return None
    made = tuple(key)
    try:
        hash(made)
    except TypeError:  # a symbolic size
        return None
    return made, tensors


def _describe(value: Any, key: list[Any], tensors: list[Tensor]) -> bool:
    """Append all that `Signature.mismatch` looks at; False where `value` may hold more than that."""
    if isinstance(value, Tensor):
        key += (value.dtype, value.device, value.shape)
        tensors.append(value)
        return True
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        key += (kind, value)
        return True
    if kind in (tuple, list):
        key += (kind, len(value))
    elif kind is dict:
        key += (kind, tuple(value))
        value = value.values()
    else:
        return False
    return all(_describe(item, key, tensors) for item in value)
