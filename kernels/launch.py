"""Launching: kernels run compiled on a GPU, interpreted on a CPU for tests, and not at all without Triton."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch do not bring Triton, and nothing here needs it then
    triton, tl = None, SimpleNamespace(constexpr=None)

__all__ = ["Pointers", "cached", "compiled_for", "hold_for_graph", "interpreting", "jit", "tl"]


def jit(function: Callable[..., Any]) -> Any:
    """Decorate with `triton.jit`, or return the function unchanged if Triton is not installed."""
    return function if triton is None else triton.jit(function)


@jit
def _probe():
    pass


def interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter: `TRITON_INTERPRET=1` was set before the import of Triton."""
    return triton is not None and not isinstance(_probe, triton.JITFunction)


def compiled_for(device: torch.device) -> bool:
    """Return whether tensors on `device` go to the kernels rather than to the plain-torch references."""
    return device.type == "cuda" and triton is not None and not interpreting()


class Pointers:
    """Addresses of tensors, on the device for a kernel to read and on the host to compare with.

    As a rule gradients have the same addresses step after step. Then a step compares two lists and copies nothing. In a
    CUDA graph a copy is recorded with its source, so a capture takes a pair of buffers that nothing else writes to;
    they are made in the steps before it, because pinned memory cannot be allocated during a capture.

    Args:
        count: number of tensors.
        device: where the kernel runs.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.device = device
        self.known: list[int] | None = None
        self._current = torch.zeros(count, dtype=torch.int64, device=device)
        self._spare: tuple[Tensor, Tensor] | None = None

    def of(self, addresses: list[int]) -> Tensor:
        """Return the addresses as int64 `[count]` on the device."""
        if self.device.type != "cuda":
            if addresses != self.known:
                self._current.copy_(torch.tensor(addresses, dtype=torch.int64))
                self.known = addresses
            return self._current
        if torch.cuda.is_current_stream_capturing():
            return self._for_capture(addresses)
        if self._spare is None:
            self._spare = (torch.zeros_like(self._current), torch.empty(len(addresses), dtype=torch.int64).pin_memory())
        if addresses != self.known:
            # The allocator of pinned memory holds on to the source until the copy is done.
            self._current.copy_(torch.tensor(addresses, dtype=torch.int64).pin_memory(), non_blocking=True)
            self.known = addresses
        return self._current

    def _for_capture(self, addresses: list[int]) -> Tensor:
        if self._spare is None:
            raise RuntimeError(
                "a CUDA graph is being captured and the addresses of its tensors cannot be stored: run the step once "
                "outside of the capture first, with tensors of the same shapes"
            )
        device, host = self._spare
        hold_for_graph(self._spare)
        self._spare = None
        host.copy_(torch.tensor(addresses, dtype=torch.int64))
        device.copy_(host, non_blocking=True)
        return device


_made: dict[Any, Any] = {}
_held: list[Any] = []


def cached(key: Any, make: Callable[[], Any], *, most: int = 64) -> Any:
    """Return the value that `make` gave for `key`, from a cache of the `most` newest."""
    if key not in _made:
        while len(_made) >= most:
            del _made[next(iter(_made))]
        _made[key] = make()
    return _made[key]


def hold_for_graph(*tables: Any) -> None:
    """Keep `tables` for good if a CUDA graph is being captured, which will read them at every replay."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        _held.append(tables)
