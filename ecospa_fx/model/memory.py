"""Memory of one tensor that loses entries: what it held before can be had again, and little is held for that.

copied_out(tensor, keep)  -> the entries that go
Memory(tensor, keep, gone)
  .cut(holders)           -> the tensor without them: in its own memory if nobody else holds it, else in new memory
  .whole()                -> the tensor as it was; it may be called at any moment, and again
  .settle()               the rest of its own memory is given up

In its own memory, chunks of rows move forward, each by way of `Scratch`; back they move in the opposite order. Nothing
has to be allocated for either.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ecospa_fx.kernels import compacted

Keep = dict[int, Tensor]

CHUNK = 2**18
"""Bytes of rows that move at once, of tensors that are not large."""


class Scratch:
    """Two buffers on one device, for rows that move."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]

    def taken(self, tensor: Tensor, positions: Keep) -> Tensor:
        """Copy entries of a tensor, dim after dim."""
        for number, (dim, at) in enumerate(positions.items()):
            shape = [*tensor.shape[:dim], len(at), *tensor.shape[dim + 1 :]]
            tensor = torch.index_select(tensor, dim, at, out=self._view(number % 2, shape, tensor.dtype))
        return tensor

    def beside(self, part: Tensor, shape: list[int]) -> Tensor:
        """Return a tensor in the buffer that a part does not lie in."""
        number = int(part.untyped_storage()._cdata == self.buffers[0].untyped_storage()._cdata)
        return self._view(number, shape, part.dtype)

    def _view(self, number: int, shape: list[int], dtype: torch.dtype) -> Tensor:
        return self.buffers[number][: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def rows_at_once(tensor: Tensor) -> tuple[int, int]:
    """Return how many rows of a tensor move at once, and their bytes: a 32nd of a large tensor, for few launches."""
    row = max(1, tensor.element_size() * math.prod(tensor.shape[1:]))
    rows = max(1, min(len(tensor), max(1, CHUNK // row, len(tensor) // 32)))
    return rows, rows * row


def pieces(tensor: Tensor, keep: Keep) -> Iterator[tuple[Tensor, Keep]]:
    """Yield, for `compacted`, a job per dim of `keep`: the entries that it drops, of what the dims before it keep."""
    before: Keep = {}
    for dim in sorted(keep):
        yield tensor, {**before, dim: dropped(keep[dim], tensor.shape[dim])}
        before[dim] = keep[dim]


def can_be_remade(tensor: Tensor) -> bool:
    """Decide whether a tensor is its entries and strides, each entry in a place of its own, and nothing besides."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
        return False
    reach = 1
    for step, size in sorted((step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step < reach:
            return False
        reach = max(reach, step * size)
    return True


def in_shared_memory(tensor: Tensor) -> bool:
    """Decide whether other processes may hold the memory of a tensor, too."""
    return tensor.device.type == "cpu" and tensor.is_shared()  # of CUDA's torch always says so


class Memory:
    """The memory of a tensor that loses entries.

    Args:
        tensor: the tensor, which must stay as it is until `cut`; this holds its memory and not the object.
        keep: dim -> sorted positions that stay.
        gone: the results of `pieces`; empty if the tensor cannot be remade, which is then held.
    """

    def __init__(self, tensor: Tensor, keep: Keep, gone: list[Tensor]) -> None:
        self._keep = {dim: keep[dim] for dim in sorted(keep)}
        self._gone, self._object = gone, weakref.ref(tensor)
        self._held: Tensor | None = None if can_be_remade(tensor) else tensor
        self._new: Tensor | None = None
        self._mover: _Mover | None = None
        if self._held is None:
            self._storage: Any = tensor.untyped_storage()
            self._weak = StorageWeakRef(self._storage)
            self._geometry = tensor.storage_offset(), tensor.shape, tensor.stride()
            self._like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            self._fills = tensor.is_contiguous() and self._storage.nbytes() == tensor.numel() * tensor.element_size()
            self._fills = self._fills and not in_shared_memory(tensor)

    def cut(self, holders: int, scratch: Scratch) -> Tensor:
        """Make the tensor without the entries that go.

        Args:
            holders: the number of tensors that are known to hold its memory and will let it go.
            scratch: buffers that nothing else uses until `settle` or `whole`.
        """
        if self._held is not None:
            (self._new,) = compacted([(self._held, self._keep)])
        elif self._object() is None and self._fills and held_by(self._storage, holders):
            old = self._over(self._storage, *self._geometry)
            self._mover = _Mover(old, self._keep, self._gone, scratch)
            self._new = self._mover.forward()
        else:
            (self._new,) = compacted([(self._over(self._storage, *self._geometry), self._keep)])
            self._storage = None  # whoever else holds it keeps it
        return self._new

    def whole(self) -> Tensor:
        """Return the tensor as it was: the object itself, or one in its memory, where anything else holds these."""
        if self._held is None:
            self._held = self._object()
        if self._held is None:
            storage = self._storage
            if storage is None:
                storage = torch.UntypedStorage._new_with_weak_ptr(self._weak.cdata)
            if self._mover is not None:
                self._mover.back()
            if storage is not None:
                self._held = self._over(storage, *self._geometry)
        if self._held is None:
            assert self._new is not None
            _, shape, stride = self._geometry
            whole = torch.empty_strided(shape, stride, dtype=self._like.dtype, device=self._like.device)
            fill(whole, self._keep, self._new)
            fill_gone(whole, self._keep, self._gone)
            self._held = whole
        return self._held

    def settle(self) -> None:
        """Give up the entries that are gone, and the memory that the others do not fill, if they can be copied."""
        self._gone.clear()
        if self._mover is not None and self._new is not None:
            with suppress(RuntimeError, MemoryError):
                self._storage.resize_(self._new.numel() * self._new.element_size())

    def _over(self, storage: Any, offset: Any, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
        return self._like.new_empty(0).set_(storage, offset, shape, stride)


class _Mover:
    """Entries of a contiguous tensor that move forward in its own memory, and back.

    Attributes:
        moved: the number of rows (of those that stay) that lie in their new places.
        moving: rows that are about to be written to their places, which may be half done by then.
    """

    def __init__(self, old: Tensor, keep: Keep, gone: list[Tensor], scratch: Scratch) -> None:
        self.old, self.gone, self.scratch = old, gone, scratch
        self.keep = {dim: at.to(old.device) for dim, at in keep.items()}
        self.inner = {dim: at for dim, at in self.keep.items() if dim}
        self.shape = [len(self.keep[dim]) if dim in keep else size for dim, size in enumerate(old.shape)]
        self.rows, _ = rows_at_once(old)
        self.moved = 0
        self.moving: Tensor | None = None

    def forward(self) -> Tensor:
        """Move what stays forward, and return it."""
        for first in range(0, self.shape[0], self.rows):
            last = min(self.shape[0], first + self.rows)
            self.moving = self.scratch.taken(self.old, {0: self._positions(first, last), **self.inner})
            self._places(first, last).copy_(self.moving)
            self.moved, self.moving = last, None
        return self._places(0, self.shape[0])

    def back(self) -> None:
        """Move everything back to where it was."""
        inner_gone = [piece for dim, piece in zip(self.keep, self.gone, strict=True) if dim]
        while self.moved or self.moving is not None:
            first, last = self.moved, min(self.shape[0], self.moved + self.rows)
            part = self.moving
            if part is None:
                first, last = (self.moved - 1) // self.rows * self.rows, self.moved
                part = self.scratch.taken(
                    self._places(first, last), {0: torch.arange(last - first, device=self.old.device)}
                )
            rows = part
            if self.inner:
                rows = self.scratch.beside(part, [last - first, *self.old.shape[1:]])
                fill(rows, self.inner, part)
                fill_gone(rows, self.inner, [piece[first:last] for piece in inner_gone])
            self.old.index_copy_(0, self._positions(first, last), rows)
            self.moved, self.moving = first, None
        if 0 in self.keep:
            self.old.index_copy_(0, dropped(self.keep[0], len(self.old)), self.gone[0])

    def _places(self, first: int, last: int) -> Tensor:
        """Return the new places of some rows."""
        length = math.prod(self.shape[1:])
        return self.old.view(-1)[first * length : last * length].view(last - first, *self.shape[1:])

    def _positions(self, first: int, last: int) -> Tensor:
        """Return the old positions of some rows."""
        rows = torch.arange(first, last, device=self.old.device)
        return self.keep[0][rows] if 0 in self.keep else rows


def dropped(keep: Tensor, size: int) -> Tensor:
    """Return the positions among `size` that are not kept."""
    mask = torch.ones(size, dtype=torch.bool, device=keep.device)
    mask[keep] = False
    return mask.nonzero().flatten()


def fill(whole: Tensor, positions: Keep, part: Tensor) -> None:
    """Write into the given positions of some dims, and all of the others."""
    at = [
        positions.get(dim, torch.arange(size)).to(whole.device).view([-1] + [1] * (whole.ndim - 1 - dim))
        for dim, size in enumerate(whole.shape)
    ]
    whole[tuple(at)] = part


def fill_gone(whole: Tensor, keep: Keep, gone: list[Tensor]) -> None:
    """Write the entries that `pieces` has copied out."""
    before: Keep = {}
    for (dim, at), piece in zip(keep.items(), gone, strict=True):
        fill(whole, {**before, dim: dropped(at, whole.shape[dim])}, piece)
        before[dim] = at


def held_by(storage: Any, holders: int) -> bool:
    """Decide whether only the caller and a number of tensors hold some memory, which torch has allocated itself."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    alone = count is not None and count(storage._cdata) == holders + 1
    return alone and storage.resizable() and not storage.is_shared()
