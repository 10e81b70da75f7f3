"""Room: memory that a change needs for a moment, asked for before anything changes, and given back afterwards."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from ecospa_fx.errors import ShrinkError

_WORTH_IT = 2**20
"""Bytes; with less, looking for free pages takes longer than they are worth."""


def check_room(device: torch.device, size: int) -> None:
    """Refuse a change that there is no room for.

    Args:
        device: the device that it takes memory of.
        size: bytes that it will take.

    Raises:
        ShrinkError: there is not that much room.
    """
    try:
        torch.empty(size, dtype=torch.uint8, device=device)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        raise ShrinkError(
            f"there is no room to shrink on {device}: beside the model, {size / 2**20:,.1f} MB are needed for a "
            f"moment, and could not be had ({type(error).__name__}). Free memory first, for instance with "
            "optimizer.zero_grad(), or let less go at once"
        ) from error


def give_back(count: int) -> None:
    """Hand memory that has become free back to the system, where C's allocator keeps it for itself.

    Args:
        count: bytes that have become free.
    """
    trim = _trim()
    if trim is not None and count >= _WORTH_IT:
        trim(0)


@cache
def _trim() -> Any:
    """Return glibc's `malloc_trim`, or None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
