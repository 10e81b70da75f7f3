"""Windows: equal pieces of work that tensors of any strides are cut into.

tensor, dim -> Walk per piece (a kept axis, and a reduced axis walked along) -> rows of an int64 table, one per program

A program holds a register tile `[ROWS, COLS]` and walks it along the axis that is summed over. `COLS` lies along the
axis that is contiguous in memory, whichever of the two that is, so that loads are wide:

    kept axis strided     ROWS along it, the tile walks along COLS, summed over COLS at the end     ("rows")
    kept axis contiguous  COLS along it, the tile walks along ROWS, summed over ROWS at the end     ("columns")
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

ROWS, COLS = 16, 256
LONGEST = 65_536
"""Entries of one window's walk: short enough that the last ones to finish leave no tail on the device."""

WIDTH = 14
"""Numbers per row of a window table; see `window`."""

BYTES = 16
"""Widest load of one thread."""


@dataclass(frozen=True)
class Axis:
    """An axis of a walk, which may take two strides: entry `i` lies at `i // inner * outer + i % inner * stride`."""

    size: int
    stride: int
    inner: int
    outer: int


@dataclass(frozen=True)
class Walk:
    """A part of a tensor to be summed: its start and its two axes, all in elements.

    Attributes:
        vector: elements that one load may take; 0 where an axis has two strides or neither is contiguous.
    """

    start: int
    kept: Axis
    summed: Axis
    vector: int

    @property
    def columns(self) -> bool:
        """True if the kept axis is the contiguous one."""
        return self.kept.stride == 1 and self.summed.stride != 1


def merged(sizes: list[int], strides: list[int]) -> list[tuple[int, int]]:
    """Return axes in order of decreasing stride, those merged that are contiguous with each other."""
    axes: list[tuple[int, int]] = []
    for size, stride in sorted(zip(sizes, strides, strict=True), key=lambda axis: (-axis[1], -axis[0])):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes


def walks(tensor: Tensor, dim: int, address: int | None = None) -> list[Walk]:
    """Split `tensor` into parts whose sums over all dims but `dim` add up to those of the tensor.

    Any strides will do, and nothing is copied: dims merge where memory allows it, one more is taken as a second stride,
    and the rest is looped over here.

    Args:
        tensor: the tensor to sum.
        dim: the dim that is kept.
        address: sets the alignment that loads may rely on; by default the tensor's, unless another is read with it.
    """
    address = tensor.data_ptr() if address is None else address
    size, stride = tensor.shape[dim], tensor.stride(dim)
    others = [d for d in range(tensor.ndim) if d != dim]
    axes = merged([tensor.shape[d] for d in others], [tensor.stride(d) for d in others])
    kept = Axis(size, stride, size, 0)
    if not axes:
        axes = [(1, 0 if stride == 1 else 1)]
    size, stride = axes.pop()
    summed = Axis(size, stride, size, 0)
    single = kept.stride == 1 or stride == 1
    base, count = ROWS if kept.stride == 1 else COLS, math.prod(n for n, _ in axes)
    if axes and not (single and size >= base and (size >= 8 * base or count <= 256)):
        outer, step = axes.pop()
        summed = Axis(size * outer, stride, size, step)
        single = False
    starts = [sum(i * s for i, (_, s) in zip(at, axes, strict=True)) for at in product(*(range(n) for n, _ in axes))]
    return [
        Walk(start, kept, summed, _vector(address, tensor.element_size(), start, kept, summed) if single else 0)
        for start in starts
    ]


def _vector(address: int, element: int, start: int, kept: Axis, summed: Axis) -> int:
    along, across = (summed, kept) if summed.stride == 1 else (kept, summed)
    aligned = math.gcd(address + start * element, BYTES) // element
    return math.gcd(aligned, along.size, across.stride) if aligned else 1


def windows(walk: Walk, source: int, slot: int, lines: int = ROWS) -> tuple[list[list[int]], int]:
    """Return the rows of the window table for a walk, and the number of partial sums per kept entry.

    Args:
        walk: the part to sum.
        source: row of the pointer table.
        slot: start of its partial sums, `[chunks, kept.size]`.
        lines: the kernel's `ROWS`.
    """
    if not walk.kept.size or not walk.summed.size:
        return [], 0
    wide, deep = (COLS, lines) if walk.columns else (lines, COLS)  # of the kept axis; of one step along the other
    length = LONGEST // wide // deep * deep
    chunks = range(0, walk.summed.size, length)
    rows = []
    for chunk, first in enumerate(chunks):
        last = min(walk.summed.size, first + length)
        for begin in range(0, walk.kept.size, wide):
            end = min(walk.kept.size, begin + wide)
            place = slot + chunk * walk.kept.size
            rows.append(window(walk, source, (begin, end), (first, last), place))
    return rows, len(chunks)


def window(walk: Walk, source: int, kept: tuple[int, int], summed: tuple[int, int], place: int) -> list[int]:
    """Return a row of the table: source, start, columns?, place, then begin, end, stride, inner, outer of both axes.

    In a vectorised window the start, positions along the contiguous axis and the other stride count whole vectors: only
    a product with a constant is known to the compiler to be aligned.
    """
    unit = max(walk.vector, 1)
    along_kept = walk.columns
    axes = []
    for axis, (begin, end), contiguous in ((walk.kept, kept, along_kept), (walk.summed, summed, not along_kept)):
        if contiguous:
            axes += [begin // unit, end // unit, axis.stride, axis.inner, axis.outer]
        else:
            axes += [begin, end, axis.stride // unit, axis.inner, axis.outer]
    return [source, walk.start // unit, int(along_kept), place, *axes]


def long_first(rows: list[list[int]]) -> list[list[int]]:
    """Sort the longest walks first, so that none of them is still running when all others are done."""
    return sorted(rows, key=lambda row: (row[9] - row[10]) * (row[5] - row[4]))


def table(rows: list[list[int]], width: int, device: torch.device) -> Tensor:
    """Return rows of numbers as an int64 tensor `[len(rows), width]` on `device`."""
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, width).to(device)
