"""Data uses: reads and writes of `.data` in a forward, which torch.export does not follow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ecospa_fx.passes.graph.namespaces import foreign_code
from ecospa_fx.passes.graph.tensors import named_tensors, storage_key


class DataUses(TorchFunctionMode):
    """A mode that notes where a forward first replaces the data of a tensor, and where it first reads it.

    Attributes:
        replaced: the tensor in words, and the line, of the first `.data = ...`.
        read: the line of the first other use.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in named_tensors(module).items()}
        self.replaced: tuple[str, str] | None = None
        self.read: str | None = None

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and note it if it is of `.data`."""
        descriptor: Any = Tensor.data
        if getattr(func, "__self__", None) is descriptor and not isinstance(func, torch._ops.OpOverload):
            if func.__name__ == "__set__":
                name = self._names.get(id(args[0]))
                self.replaced = self.replaced or (f"`{name}`" if name else "a tensor", _line())
            else:
                self.read = self.read or _line()
        return func(*args, **(kwargs or {}))


def _line() -> str:
    """Return the line that runs, of code that is neither torch's nor this library's: ` at model.py:41`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and foreign_code(frame.f_globals.get("__name__")):
        frame = frame.f_back
    return "" if frame is None else f" at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


Memory = dict[str, tuple[Tensor, Any]]


def memory_of(module: nn.Module) -> Memory:
    """Return the parameters and buffers of a module by name, each with the memory that it has."""
    return {name: (tensor, storage_key(tensor)) for name, tensor in named_tensors(module).items()}


def other_memory(before: Memory) -> str | None:
    """Return the name of a tensor that has other memory than before; None if there is none."""
    return next((name for name, (tensor, key) in before.items() if storage_key(tensor) != key), None)
