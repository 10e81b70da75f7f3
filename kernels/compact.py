"""Compaction: copies of many tensors at once, each with only the chosen positions of some of its dims.

x [A, R, C] -> x[ia][:, ir][:, :, ic], contiguous        (without an index all of that dim is kept)

Entries are moved as integers of their size, so that parameters, gradients and optimizer state of any dtype go together,
one launch per element size and alignment. Indices and addresses come from tables.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .launch import compiled_for, jit, tl
from .register import operator
from .windows import BYTES, COLS, LONGEST, ROWS, table

COMPACT_WIDTH = 13
INTEGERS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}


def tile(vector: int) -> tuple[int, int]:
    """Return the lines and warps of a program; where every entry has an address of its own, more would spill."""
    return (ROWS, 8) if vector > 1 else (4, 4)


@torch.no_grad()
def compact_ref(x: list[Tensor], indices: list[Tensor], tensors: list[int], dims: list[int]) -> list[Tensor]:
    """Compute `compact` in plain torch."""
    made = list(x)
    for index, tensor, dim in zip(indices, tensors, dims, strict=True):
        made[tensor] = made[tensor].detach().index_select(dim, index.to(made[tensor].device))
    return [
        new.clone(memory_format=torch.contiguous_format) if new is old else new
        for new, old in zip(made, x, strict=True)
    ]


@jit
def compact_kernel(
    pointers,  # int64 [2, tensors], addresses of sources, then of results
    table,  # int64 [programs, WIDTH], see _windows
    indices,  # int64, all indices end to end
    count,  # tensors
    ELEMENT: tl.constexpr,
    VECTOR: tl.constexpr,  # elements of one load, 0 where the last dim is indexed or strided
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Fill some lines of one result."""
    row = table + tl.program_id(0) * WIDTH
    number = tl.load(row)
    source = tl.load(pointers + number).to(tl.pointer_type(ELEMENT))
    result = tl.load(pointers + count + number).to(tl.pointer_type(ELEMENT))
    inner = tl.load(row + 1)
    line = tl.load(row + 2) + tl.arange(0, ROWS)  # [ROWS], of the result seen as [A * R, C]
    valid = line < tl.load(row + 3)
    index_a, index_r, index_c = tl.load(row + 9), tl.load(row + 10), tl.load(row + 11)
    a, r = line // inner, line % inner
    # Comparisons of blocks, not of numbers: the interpreter takes no mixture of the two for a mask.
    chosen_a, chosen_r = line * 0 + index_a >= 0, line * 0 + index_r >= 0
    a = tl.where(chosen_a, tl.load(indices + index_a + a, mask=valid & chosen_a, other=0), a)
    r = tl.where(chosen_r, tl.load(indices + index_r + r, mask=valid & chosen_r, other=0), r)
    begin, end, length = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    from_a, from_r = tl.load(row + 7), tl.load(row + 8)
    j = tl.arange(0, COLS)  # [COLS]
    if VECTOR > 0:
        source = tl.multiple_of(source, ALIGN)
        result = tl.multiple_of(result, ALIGN)
        begin, end, length = begin * VECTOR, end * VECTOR, length * VECTOR
        from_a, from_r = from_a * VECTOR, from_r * VECTOR
    read = a * from_a + r * from_r  # [ROWS]
    write = line * length
    for step in range(((end - begin + COLS - 1) // COLS).to(tl.int32)):
        at = begin + step * COLS + j
        inside = valid[:, None] & (at < end)[None, :]
        if VECTOR > 0:
            where = read[:, None] + at[None, :]  # [ROWS, COLS]
        else:
            chosen = at * 0 + index_c >= 0
            c = tl.where(chosen, tl.load(indices + index_c + at, mask=(at < end) & chosen, other=0), at)
            where = read[:, None] + (c * tl.load(row + 12))[None, :]
        tl.store(result + write[:, None] + at[None, :], tl.load(source + where, mask=inside), mask=inside)


def _axes(x: Tensor, steps: dict[int, int]) -> list[tuple[int, int, int]] | None:
    """Return three axes (size, stride, start of its index or -1) of a compaction; None if it has more than three."""
    axes: list[tuple[int, int, int]] = []
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        place = steps.get(dim, -1)
        if place < 0 and size == 1:
            continue
        if axes and place < 0 and axes[-1][2] < 0 and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride, -1)
        else:
            axes.append((size, stride, place))
    return None if len(axes) > 3 else [(1, 0, -1)] * (3 - len(axes)) + axes


def _windows(
    number: int, x: Tensor, y: Tensor, axes: list[tuple[int, int, int]], sizes: tuple[int, int, int]
) -> tuple[int, list[list[int]]]:
    """Return the vector width and the table: per program the tensor, and the lines and columns that it fills."""
    (_, from_a, index_a), (_, from_r, index_r), (_, from_c, index_c) = axes
    a, r, c = sizes
    vector = 0
    if index_c < 0 and from_c == 1:
        aligned = math.gcd(x.data_ptr() | y.data_ptr(), BYTES) // x.element_size()
        vector = math.gcd(aligned, c, from_a, from_r)
    unit, (lines, _) = max(vector, 1), tile(vector)
    length = LONGEST // lines
    rows = [
        [
            number,
            r,
            first,
            min(a * r, first + lines),
            begin // unit,
            min(c, begin + length) // unit,
            c // unit,
            from_a // unit,
            from_r // unit,
            index_a,
            index_r,
            index_c,
            from_c,
        ]
        for first in range(0, a * r, lines)
        for begin in range(0, c, length)
    ]
    return vector, rows


@torch.no_grad()
def prepared(
    x: list[Tensor], indices: list[Tensor], tensors: list[int], dims: list[int]
) -> tuple[list[Tensor], list[Callable[[], object]]]:
    """Allocate the results of a compaction, and prepare the launches that fill them; all tensors on one device."""
    if not x:
        return [], []
    device = x[0].device
    steps: list[dict[int, Tensor]] = [{} for _ in x]
    for index, tensor, dim in zip(indices, tensors, dims, strict=True):
        steps[tensor][dim] = index
    placed: dict[int, int] = {}
    joined, length = [], 0
    for index in indices:
        if id(index) not in placed:
            placed[id(index)] = length
            joined.append(index)
            length += len(index)
    made = [
        torch.empty([len(of[d]) if d in of else n for d, n in enumerate(t.shape)], dtype=t.dtype, device=device)
        for t, of in zip(x, steps, strict=True)
    ]
    launches: dict[tuple[int, int], list[list[int]]] = {}
    for number, (old, new, of) in enumerate(zip(x, made, steps, strict=True)):
        axes = _axes(old, {dim: placed[id(index)] for dim, index in of.items()})
        if axes is None or old.element_size() not in INTEGERS:
            at = [k for k, tensor in enumerate(tensors) if tensor == number]
            (whole,) = compact_ref([old], [indices[k] for k in at], [0] * len(at), [dims[k] for k in at])
            new.copy_(whole)
            continue
        kept = iter([len(of[d]) for d in sorted(of)])
        sizes = tuple(next(kept) if place >= 0 else size for size, _, place in axes)
        vector, rows = _windows(number, old, new, axes, sizes)  # type: ignore[arg-type]
        launches.setdefault((old.element_size(), vector), []).extend(rows)
    pointers = table([[t.data_ptr() for t in x], [t.data_ptr() for t in made]], len(x), device)
    together = torch.cat([i.to("cpu", torch.int64) for i in joined] or [torch.zeros(1, dtype=torch.int64)]).to(device)
    calls: list[Callable[[], object]] = []
    for (size, vector), rows in launches.items():
        lines, warps = tile(vector)
        if rows:
            calls.append(
                partial(
                    compact_kernel[(len(rows),)],
                    pointers,
                    table(rows, COMPACT_WIDTH, device),
                    together,
                    len(x),
                    ELEMENT=getattr(tl, INTEGERS[size]),
                    VECTOR=vector,
                    ALIGN=max(vector, 1) * size,
                    ROWS=lines,
                    COLS=COLS,
                    WIDTH=COMPACT_WIDTH,
                    num_warps=warps,
                )
            )
    return made, calls


def compact_triton(x: list[Tensor], indices: list[Tensor], tensors: list[int], dims: list[int]) -> list[Tensor]:
    """Compute `compact` by the kernel of this file."""
    made, calls = prepared(x, indices, tensors, dims)
    for call in calls:
        call()
    return made


def _empty(x: list[Tensor], indices: list[Tensor], tensors: list[int], dims: list[int]) -> list[Tensor]:
    shapes = [list(t.shape) for t in x]
    for index, tensor, dim in zip(indices, tensors, dims, strict=True):
        shapes[tensor][dim] = index.shape[0]
    return [t.new_empty(shape) for t, shape in zip(x, shapes, strict=True)]


@operator("compact", fake=_empty)
def compact(x: list[Tensor], indices: list[Tensor], tensors: list[int], dims: list[int]) -> list[Tensor]:
    """Copy many tensors with only the chosen positions of some dims.

    Args:
        x: tensors of any dtype, shape and strides, on one device.
        indices: sorted LongTensors of positions to keep, on any device.
        tensors: per index, the number of its tensor in `x`.
        dims: per index, the dim that it selects from.

    Returns:
        A new contiguous tensor per `x`.
    """
    way = compact_triton if x and compiled_for(x[0].device) else compact_ref
    return way(x, indices, tensors, dims)


def compacted(jobs: list[tuple[Tensor, dict[int, Tensor]]]) -> list[Tensor]:
    """Compact tensors on any devices: those on a GPU in one launch, the others one by one.

    Args:
        jobs: tensors, and per dim the positions to keep.
    """
    made: dict[int, Tensor] = {}
    # A sparse tensor (the gradient of an embedding) has no addresses for a kernel to read.
    kinds = {(tensor.device, tensor.layout is torch.strided) for tensor, _ in jobs}
    for device, strided in kinds:
        here = [k for k, (t, _) in enumerate(jobs) if (t.device, t.layout is torch.strided) == (device, strided)]
        picked = [(n, dim, index) for n, k in enumerate(here) for dim, index in jobs[k][1].items()]
        way = compact if strided and compiled_for(device) else compact_ref
        new = way(
            [jobs[k][0].detach() for k in here],
            [index for _, _, index in picked],
            [n for n, _, _ in picked],
            [dim for _, dim, _ in picked],
        )
        made.update(zip(here, new, strict=True))
    return [made[k] for k in range(len(jobs))]
