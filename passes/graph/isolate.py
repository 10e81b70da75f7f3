"""Isolation: a forward leaves no trace in parameters, buffers, attributes, random generators or the autocast cache."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from .python_state import PythonState
from .tensors import named_tensors, storage_key, swapped
from .uncompiled import uncompiled


def fresh_leaf(leaf: Any) -> Any:
    """Return a detached copy of a tensor, to differentiate by where its dtype allows; anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach().clone()
    return leaf.requires_grad_() if leaf.is_floating_point() else leaf


def seed(number: int) -> None:
    """Seed the generators of torch, of accelerators only if they are in use: that takes as long as a small layer."""
    torch.default_generator.manual_seed(number)
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and (accelerator.type != "cuda" or torch.cuda.is_initialized()):
        torch.manual_seed(number)


@contextmanager
def forked_rng(module: nn.Module) -> Iterator[None]:
    """Restore the random generators after the forwards inside: torch's on the module's devices, Python's, numpy's."""
    devices = {tensor.device.index for tensor in named_tensors(module).values() if tensor.is_cuda}
    python, numpy = random.getstate(), sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(drawn)


class Draws:
    """The states of the random generators, to see whether something has drawn from them."""

    def __init__(self) -> None:
        self._before = self.state()

    def state(self) -> dict[str, Any]:
        """Return the state of each generator."""
        numpy = sys.modules.get("numpy")
        drawn = numpy.random.get_state() if numpy else None
        numbers = None if drawn is None else (drawn[1].tobytes(), *drawn[2:])
        with unset_fake_temporarily(), torch._C.DisableTorchFunction():
            drawn_by_torch = torch.get_rng_state().numpy().tobytes()
        return {"Python": random.getstate(), "numpy": numbers, "torch": drawn_by_torch}

    def moved(self, among: Collection[str] = ("Python", "numpy", "torch")) -> str | None:
        """Return the name of a generator that has moved."""
        now = self.state()
        return next((name for name in among if self._before[name] not in (None, now[name])), None)


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
def isolated(model: nn.Module, state: PythonState | None = None) -> Iterator[None]:
    """Restore everything that forwards inside change: parameters, buffers, attributes, random generators, casts.

    Args:
        model: the model.
        state: to restore, where it is known; by default, that of now.
    """
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    state = PythonState(model) if state is None else state
    try:
        state.lend()
        with (
            forked_rng(model), restored_parameters(model), swapped(model, buffers), uncompiled(), uncached_autocast()
        ):  # fmt: skip
            yield
    finally:
        state.restore()


def weight_of(layer: nn.Module) -> Any:
    """Return the weight of a layer, None if it has none; looking at one that is computed leaves no trace.

    A parametrization computes it at every look, and may take a step of a power iteration, or draw.
    """
    if "weight" in layer._parameters:
        return layer._parameters["weight"]
    if not hasattr(type(layer), "weight"):
        return getattr(layer, "weight", None)
    with isolated(layer), torch.no_grad():
        return layer.weight


class restored_parameters(TorchFunctionMode):
    """A context that puts back the parameters that a forward writes into, such as those of a momentum encoder.

    A parameter is copied when something is about to write into it, because a copy of all may not fit into memory.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._needing = [(p, p.requires_grad) for p in model.parameters()]
        # Each parameter and its data, which may be replaced: by `.data =`, or by `set_`, which no mode hears of. To put
        # values back into `.data` leaves alone the backward of whoever has computed with the parameter before.
        self._data = [(p, p.data) for p in model.parameters() if _memory(p) is not None]
        self._held: dict[Any, list[Tensor]] = {}  # by memory, of which parameters may share one
        for _, data in self._data:
            if not data.is_meta:
                self._held.setdefault(_memory(data), []).append(data)
        self._values: list[tuple[Tensor, Tensor]] = []  # the data of a parameter that is written into, and a copy

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`; copy first the parameters that it may write into."""
        kwargs = kwargs or {}
        if func is torch._weight_norm:
            _check_rows(*args, **kwargs)
        if _writes(func, kwargs):
            for leaf in pytree.tree_leaves((args, kwargs)):
                key = _memory(leaf) if isinstance(leaf, Tensor) else None
                self._values += [(data, data.clone()) for data in self._held.pop(key, ())]
        return func(*args, **kwargs)

    def wrote(self, parameter: Tensor) -> bool:
        """Return whether a parameter may have been written into, or has other data."""
        written = {_memory(data) for data, _ in self._values}
        return _memory(parameter) in written or any(
            p is parameter and _memory(data) != _memory(parameter) for p, data in self._data
        )

    def __exit__(self, *error: Any) -> None:
        """Put the parameters back."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for parameter, needed in self._needing:
            if not parameter.is_leaf:  # written into with gradients
                Tensor.detach_(parameter)
            if parameter.requires_grad != needed:
                parameter.requires_grad_(needed)
        with torch.no_grad():
            for data, value in self._values:
                data.copy_(value)
            for parameter, data in self._data:
                if _memory(parameter) != _memory(data) or parameter.shape != data.shape:
                    parameter.data = data


def _check_rows(v: Tensor, g: Tensor, dim: int = 0) -> None:
    """Refuse to normalise no rows at all: torch divides by their number, which ends the process.

    It does so in `_weight_norm` alone, of the functions that a call of a layer without entries may reach: all samples
    of `torch.testing._internal.common_methods_invocations.op_db` were tried without entries.
    """
    if dim >= 0 and not v.shape[dim]:
        raise RuntimeError("torch cannot normalise a weight without any rows")


def _memory(tensor: Tensor) -> Any:
    """Return the `storage_key` of a tensor; None of one that torch.func has wrapped, which has no memory to ask for."""
    try:
        return storage_key(tensor)
    except (NotImplementedError, RuntimeError):
        return None


def _writes(func: Callable[..., Any], kwargs: Any) -> bool:
    """Decide whether a function of torch writes into its arguments, by its schema or its name."""
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.is_mutable
    if isinstance(func, torch._ops.OpOverloadPacket):
        return any(getattr(func, overload)._schema.is_mutable for overload in func.overloads())
    name = getattr(func, "__name__", "")
    if name in _IN_PLACE or "out" in kwargs:
        return True
    return name.endswith("_") and not name.endswith("__")


_IN_PLACE = frozenset(("__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod",
                       "pow", "and", "or", "xor", "lshift", "rshift"))))  # fmt: skip
