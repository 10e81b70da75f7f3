"""Slice sums: sums of squares of every row or column of many tensors at once, for scores and slice norms.

x [any shape], dim -> sum over all other dims of x²          (and of (w·x)², if weights are given)

One launch reads all tensors through a table of addresses and writes partial sums, each program at positions of its own;
a small second one adds these up in a fixed order. There are no atomics, so a repeat is equal to the bit. Loads are
widened to fp32 before they are squared. A NaN or inf reaches the sums of the slices it lies in (0 · inf is NaN) and no
others.
"""

import torch
from torch import Tensor

from .launch import Pointers, cached, compiled_for, hold_for_graph, jit, tl
from .register import operator
from .windows import BYTES, COLS, ROWS, WIDTH, long_first, table, walks, windows

FINAL_ROWS, FINAL_COLS = 16, 128
WARPS, WARPS_WEIGHTED = 4, 8

BLOCK = 262_144
"""Entries that the reference squares at a time: enough to be worth the calls, few enough to stay in a cache."""

ELEMENTS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Dtypes that the kernel reads; anything else takes the reference."""


def slice_sums_ref(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Sum the squares of each slice of `x` along each of `dims`.

    Args:
        x: any shape, any floating dtype.
        dims: the dims to keep, one at a time.

    Returns:
        Per dim a tensor `[x.shape[dim]]` in float32 (float64 where `x` is).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.ndim > 1 and x.numel() > BLOCK:
        return _by_blocks(x.detach(), dims, wide)
    squares = x.detach().to(wide).square()
    return tuple(squares.sum([d for d in range(x.ndim) if d != dim]) if x.ndim > 1 else squares for dim in dims)


def _by_blocks(x: Tensor, dims: tuple[int, ...], wide: torch.dtype) -> tuple[Tensor, ...]:
    """Square a block at a time in one buffer: one as large as a weight would not stay in the cache."""
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda dim: -strides[dim])
    x, dims = x.permute(order), tuple(order.index(dim) for dim in dims)
    lines = max(1, BLOCK * x.shape[0] // x.numel())
    made = [torch.zeros(x.shape[dim], dtype=wide, device=x.device) for dim in dims]
    memory = torch.empty(lines, *x.shape[1:], dtype=wide, device=x.device)
    for first in range(0, x.shape[0], lines):
        part = x[first : first + lines]
        squares = memory[: len(part)].copy_(part).square_()
        for dim, sums in zip(dims, made, strict=True):
            others = [d for d in range(x.ndim) if d != dim]
            if dim == 0:
                torch.sum(squares, others, out=sums[first : first + lines])
            else:
                sums += squares.sum(others)
    return tuple(made)


@torch.no_grad()
def add_slice_sums_ref(
    out: Tensor,
    x: list[Tensor],
    weights: list[Tensor],
    tensors: list[int],
    dims: list[int],
    offsets: list[int],
    decay: float = 1.0,
    gain: float = 1.0,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Compute `add_slice_sums` in plain torch: one pass over each tensor for all of its dims."""
    wanted: dict[int, list[tuple[int, int]]] = {}
    for tensor, dim, offset in zip(tensors, dims, offsets, strict=True):
        wanted.setdefault(tensor, []).append((dim, offset))
    for tensor, targets in wanted.items():
        value = x[tensor].detach()
        if scale is not None:
            value = value.to(out.dtype) / scale
        planes = [value, value.to(out.dtype) * weights[tensor].detach()] if weights else [value]
        for plane, wide in enumerate(planes):
            sums = slice_sums_ref(wide, tuple(dim for dim, _ in targets))
            for (_, offset), fresh in zip(targets, sums, strict=True):
                place = out[plane, offset : offset + len(fresh)]
                if gain != 1.0:
                    fresh = fresh * gain
                if found_inf is not None:
                    kept = place if decay == 1.0 else place * decay
                    place.copy_(torch.where(found_inf > 0, place, kept + fresh if decay else fresh))
                elif decay == 0.0:
                    place.copy_(fresh)
                elif decay == 1.0:
                    place.add_(fresh)
                else:
                    place.mul_(decay).add_(fresh)


@jit
def slice_sums_kernel(
    pointers,  # int64 [tensors], addresses of x
    weight_pointers,  # int64 [tensors], of w; read if WEIGHTED
    table,  # int64 [programs, WIDTH], see windows.window
    partials,  # fp32 [1 or 2, plane]
    scale,  # fp32 [1]; read if SCALED
    plane,
    ELEMENT: tl.constexpr,
    VECTOR: tl.constexpr,  # elements of one load, 0 for windows with any strides
    ALIGN: tl.constexpr,  # bytes of one load
    WEIGHTED: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Walk one window and write its partial sums."""
    row = table + tl.program_id(0) * WIDTH
    source, columns, place = tl.load(row), tl.load(row + 2), tl.load(row + 3)
    across, along = row + 4 + 5 * columns, row + 9 - 5 * columns  # fields of the axes that ROWS and COLS lie on
    i = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    j = tl.arange(0, COLS)[None, :]  # [1, COLS]
    base = tl.load(pointers + source).to(tl.pointer_type(ELEMENT))
    weight = base
    if WEIGHTED:
        weight = tl.load(weight_pointers + source).to(tl.pointer_type(ELEMENT))
    first, last = tl.load(across).to(tl.int32), tl.load(across + 1).to(tl.int32)
    stride = tl.load(across + 2)
    if VECTOR > 0:
        base = tl.multiple_of(base, ALIGN)
        weight = tl.multiple_of(weight, ALIGN)
        begin, end = tl.load(along).to(tl.int32) * VECTOR, tl.load(along + 1).to(tl.int32) * VECTOR
        stride = stride * VECTOR
        corner = tl.load(row + 1) * VECTOR + first * stride + begin
        offsets = i * stride + j  # [ROWS, COLS]
    else:
        begin, end = tl.load(along).to(tl.int32), tl.load(along + 1).to(tl.int32)
        corner = tl.load(row + 1)
        offsets = i * stride + j
    inner_i, outer_i = tl.load(across + 3).to(tl.int32), tl.load(across + 4)
    stride_j, inner_j, outer_j = tl.load(along + 2), tl.load(along + 3).to(tl.int32), tl.load(along + 4)
    down = ROWS * columns.to(tl.int32)
    right = COLS * (1 - columns.to(tl.int32))
    steps = tl.where(columns != 0, (last - first + ROWS - 1) // ROWS, (end - begin + COLS - 1) // COLS)
    factor = 1.0
    if SCALED:
        factor = 1.0 / tl.load(scale)
    total = tl.full([ROWS, COLS], 0.0, tl.float32)
    weighted = tl.full([ROWS, COLS], 0.0, tl.float32)
    for step in range(steps):
        at_i, at_j = first + step * down + i, begin + step * right + j
        inside = (at_i < last) & (at_j < end)
        if VECTOR > 0:
            where = corner + step * (down * stride + right) + offsets
        else:
            where = corner + (at_i // inner_i) * outer_i + (at_i % inner_i) * stride
            where += (at_j // inner_j) * outer_j + (at_j % inner_j) * stride_j
        x = tl.load(base + where, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            x = x * factor
        total += x * x
        if WEIGHTED:
            y = x * tl.load(weight + where, mask=inside, other=0.0).to(tl.float32)
            weighted += y * y
    if columns != 0:
        entry = begin + tl.arange(0, COLS)  # [COLS]
        tl.store(partials + place + entry, tl.sum(total, 0), mask=entry < end)
        if WEIGHTED:
            tl.store(partials + plane + place + entry, tl.sum(weighted, 0), mask=entry < end)
    else:
        line = first + tl.arange(0, ROWS)  # [ROWS]
        tl.store(partials + place + line, tl.sum(total, 1), mask=line < last)
        if WEIGHTED:
            tl.store(partials + plane + place + line, tl.sum(weighted, 1), mask=line < last)


@jit
def finish_kernel(
    table,  # int64 [programs, 5]: where partials begin, entries, partials per entry, where in out, first entry
    partials,  # fp32 [1 or 2, plane]
    out,  # fp32 [1 or 2, width]
    found_inf,  # fp32 [1]; read if SKIPPING
    plane,
    width,
    decay,
    gain,
    DECAYING: tl.constexpr,  # out is read, not just written
    SKIPPING: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Add up the partial sums of some entries, in order, into `out`."""
    row = table + tl.program_id(0) * 5
    second = tl.program_id(1).to(tl.int64)
    size, count = tl.load(row + 1), tl.load(row + 2).to(tl.int32)
    entry = tl.load(row + 4) + tl.arange(0, COLS)  # [COLS]
    begin = partials + second * plane + tl.load(row)
    total = tl.full([ROWS, COLS], 0.0, tl.float32)
    for chunk in range((count + ROWS - 1) // ROWS):
        at = chunk * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
        inside = (at < count) & (entry[None, :] < size)
        total += tl.load(begin + at * size + entry[None, :], mask=inside, other=0.0)
    fresh = gain * tl.sum(total, 0)
    target = out + second * width + tl.load(row + 3) + entry
    inside = entry < size
    if DECAYING:
        fresh += decay * tl.load(target, mask=inside, other=0.0)
    if SKIPPING:
        inside = inside & (tl.load(found_inf + entry * 0) == 0)  # a block, which the interpreter wants
    tl.store(target, fresh, mask=inside)


class Layout:
    """The tables of one set of tensors and targets, made once and used at every step.

    Attributes:
        launches: (dtype, vector, window table) of each launch of the first kernel: a single one if all tensors have the
            same dtype and alignment.
    """

    def __init__(
        self,
        x: list[Tensor],
        alignment: tuple[int, ...],
        targets: list[tuple[int, int, int]],
        planes: int,
        device: torch.device,
    ) -> None:
        self.pointers, self.weight_pointers = Pointers(len(x), device), Pointers(len(x), device)
        by_kind: dict[tuple[torch.dtype, int], list[list[int]]] = {}
        final, slot = [], 0
        for source, dim, offset in targets:
            size, count = x[source].shape[dim], 0
            for walk in walks(x[source], dim, alignment[source]):
                rows, chunks = windows(walk, source, slot + count * size)
                by_kind.setdefault((x[source].dtype, walk.vector), []).extend(rows)
                count += chunks
            final += [[slot, size, count, offset, first] for first in range(0, size, FINAL_COLS)]
            slot += count * size
        self.launches = [
            (dtype, vector, table(long_first(rows), WIDTH, device)) for (dtype, vector), rows in by_kind.items() if rows
        ]
        self.final = table(final, 5, device)
        self.partials = torch.empty(planes, max(slot, 1), dtype=torch.float32, device=device)


def add_slice_sums_triton(
    out: Tensor,
    x: list[Tensor],
    weights: list[Tensor],
    tensors: list[int],
    dims: list[int],
    offsets: list[int],
    decay: float = 1.0,
    gain: float = 1.0,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Compute `add_slice_sums` by the kernels of this file."""
    fits = [t.dtype in ELEMENTS for t in x]
    if weights:
        pairs = zip(fits, x, weights, strict=True)
        fits = [ok and t.dtype == w.dtype and t.stride() == w.stride() for ok, t, w in pairs]
    if not all(fits):  # a dtype that the kernel does not read, or weights laid out in another way than gradients
        for way, mine in ((add_slice_sums_ref, False), (add_slice_sums_triton, True)):
            chosen = [t for t, ok in enumerate(fits) if ok == mine]
            picked = [k for k, t in enumerate(tensors) if fits[t] == mine]
            way(
                out,
                [x[t] for t in chosen],
                [weights[t] for t in chosen] if weights else [],
                [chosen.index(tensors[k]) for k in picked],
                [dims[k] for k in picked],
                [offsets[k] for k in picked],
                decay,
                gain,
                scale,
                found_inf,
            )
        return
    if not tensors:
        return
    device = out.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    addresses, weight_addresses = [t.data_ptr() for t in x], [w.data_ptr() for w in weights]
    # The low bits of both addresses tell how far both are aligned.
    alignment = tuple([(a | b) % BYTES for a, b in zip(addresses, weight_addresses or addresses, strict=True)])
    kinds = tuple([(t.dtype, t.shape, t.stride()) for t in x])
    key = ("slice_sums", device, stream, bool(weights), alignment, kinds, tuple(tensors), tuple(dims), tuple(offsets))

    def make() -> Layout:
        targets = list(zip(tensors, dims, offsets, strict=True))
        return Layout(x, alignment, targets, 2 if weights else 1, device)

    layout: Layout = cached(key, make)
    _launch(layout, out, addresses, weight_addresses, decay, gain, scale, found_inf)


def _launch(
    layout: Layout,
    out: Tensor,
    addresses: list[int],
    weight_addresses: list[int],
    decay: float,
    gain: float,
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    pointers = layout.pointers.of(addresses)
    weight_pointers = layout.weight_pointers.of(weight_addresses) if weight_addresses else pointers
    hold_for_graph(layout)
    for dtype, vector, rows in layout.launches:
        slice_sums_kernel[(len(rows),)](
            pointers,
            weight_pointers,
            rows,
            layout.partials,
            layout.partials if scale is None else scale,
            layout.partials.shape[1],
            ELEMENT=getattr(tl, ELEMENTS[dtype]),
            VECTOR=vector,
            ALIGN=max(vector, 1) * dtype.itemsize,
            WEIGHTED=bool(weight_addresses),
            SCALED=scale is not None,
            ROWS=ROWS,
            COLS=COLS,
            WIDTH=WIDTH,
            num_warps=WARPS_WEIGHTED if weight_addresses else WARPS,
        )
    finish_kernel[(len(layout.final), len(layout.partials))](
        layout.final,
        layout.partials,
        out,
        layout.partials if found_inf is None else found_inf,
        layout.partials.shape[1],
        out.shape[1],
        decay,
        gain,
        DECAYING=decay != 0.0,
        SKIPPING=found_inf is not None,
        ROWS=FINAL_ROWS,
        COLS=FINAL_COLS,
        num_warps=4,
    )


def add_slice_sums_now(
    out: Tensor,
    x: list[Tensor],
    weights: list[Tensor],
    tensors: list[int],
    dims: list[int],
    offsets: list[int],
    decay: float = 1.0,
    gain: float = 1.0,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Add to `out` the sums of squares of the slices of many tensors: `out = decay * out + gain * sums`.

    `decay=1, gain=1` sums, `decay=b, gain=1-b` averages, `decay=0` overwrites `out`. It may be
    captured in a CUDA graph once it has run outside of it with tensors of these shapes.

    Args:
        out: `[1, width]`, or `[2, width]` with weights; float32, or float64 for float64 tensors; on their device.
        x: tensors of any shape and strides.
        weights: empty, or a tensor `w` of the shape of each `x`; then `out[1]` takes the sums of `(w * x)²`.
        tensors: per target, the number of its tensor in `x`.
        dims: per target, the dim whose slices are summed.
        offsets: per target, the position in `out` of its `x.shape[dim]` sums.
        decay: factor on the values in `out`.
        gain: factor on the sums that are added.
        scale: one number by which `x` is divided first, on the device: the scale of a gradient scaler.
        found_inf: one number on the device; unless it is 0, `out` stays as it is.
    """
    way = add_slice_sums_triton if compiled_for(out.device) else add_slice_sums_ref
    way(out, x, weights, tensors, dims, offsets, decay, gain, scale, found_inf)


# For where it is traced. Else the plain function does without the time that the dispatcher takes.
add_slice_sums = operator("add_slice_sums", mutates=("out",))(add_slice_sums_now)


def slice_sums(x: list[Tensor], dims: list[int]) -> list[Tensor]:
    """Sum the squares of each slice along one dim of each tensor; the roots are the norms of rows or columns.

    Args:
        x: tensors of any dtype and shape.
        dims: the dim to keep of each.

    Returns:
        Per tensor `[x.shape[dim]]` in float32 (float64 where any is).
    """
    devices = {t.device for t in x}
    if len(devices) != 1:
        made: dict[int, Tensor] = {}
        for device in devices:
            here = [k for k, t in enumerate(x) if t.device == device]
            made.update(zip(here, slice_sums([x[k] for k in here], [dims[k] for k in here]), strict=True))
        return [made[k] for k in range(len(x))]
    sizes = [t.shape[dim] for t, dim in zip(x, dims, strict=True)]
    offsets = [sum(sizes[:k]) for k in range(len(sizes))]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in x) else torch.float32
    out = torch.empty(1, sum(sizes), dtype=wide, device=x[0].device)
    add_slice_sums(out, [t.detach() for t in x], [], list(range(len(x))), dims, offsets, 0.0, 1.0)
    return list(out[0].split(sizes))
