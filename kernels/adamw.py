"""AdamW with slice sums inside, so that gradients are read once for both.

p, g, m, v [any shape] -> p, m, v one step on, and per chosen dim the sums of g² over all other dims

A step of AdamW moves 28 bytes per entry in fp32 and has g in registers, so the sums cost no traffic of their own.
The windows are those of `slice_sums`; together they visit every entry exactly once, as the update requires.
"""

import math

import torch
from torch import Tensor

from .launch import Pointers, cached, compiled_for, hold_for_graph, jit, tl
from .register import operator
from .slice_sums import ELEMENTS, FINAL_COLS, FINAL_ROWS, add_slice_sums, add_slice_sums_ref, finish_kernel
from .windows import BYTES, COLS, WIDTH, long_first, table, walks, windows

WARPS = 8


def lines(vector: int) -> int:
    """Return the lines of a tile: as many as leave room for other programs on the same processor; more would spill."""
    return min(16, 2 * vector) if vector > 1 else 4


@torch.no_grad()
def adamw_slice_sums_ref(
    out: Tensor,
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    tensors: list[int],
    dims: list[int],
    offsets: list[int],
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decay: float = 1.0,
    gain: float = 1.0,
) -> None:
    """Compute `adamw_slice_sums` in plain torch: Algorithm 2 of arXiv 1711.05101, line by line."""
    for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
        wide = g.to(m.dtype)
        p.mul_(1 - lr * weight_decay)
        m.lerp_(wide, 1 - beta1)
        v.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
        denominator = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
        p.sub_(m / denominator * (lr / (1 - beta1**step)))
    add_slice_sums_ref(out, gradients, [], tensors, dims, offsets, decay, gain)


@jit
def adamw_kernel(
    pointers,  # int64 [4, count], addresses of p, g, m, v
    table,  # int64 [programs, WIDTH], see windows.window
    partials,  # fp32
    count,
    keep,  # 1 - lr * weight_decay; this and what follows computed in fp64 on the host
    toward,  # 1 - beta1
    beta2,
    fresh,  # 1 - beta2
    rate,  # lr / (1 - beta1 ** step)
    root,  # 1 / sqrt(1 - beta2 ** step)
    eps,
    ELEMENT: tl.constexpr,
    STATE: tl.constexpr,  # dtype of m and v
    VECTOR: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Walk one window: update its entries and write its partial sums."""
    row = table + tl.program_id(0) * WIDTH
    source, columns, place = tl.load(row), tl.load(row + 2), tl.load(row + 3)
    across, along = row + 4 + 5 * columns, row + 9 - 5 * columns
    i = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    j = tl.arange(0, COLS)[None, :]  # [1, COLS]
    p = tl.load(pointers + source).to(tl.pointer_type(ELEMENT))
    g = tl.load(pointers + count + source).to(tl.pointer_type(ELEMENT))
    m = tl.load(pointers + 2 * count + source).to(tl.pointer_type(STATE))
    v = tl.load(pointers + 3 * count + source).to(tl.pointer_type(STATE))
    first, last = tl.load(across).to(tl.int32), tl.load(across + 1).to(tl.int32)
    begin, end = tl.load(along).to(tl.int32), tl.load(along + 1).to(tl.int32)
    stride, corner = tl.load(across + 2), tl.load(row + 1)
    if VECTOR > 0:
        p, g = tl.multiple_of(p, ALIGN), tl.multiple_of(g, ALIGN)
        m, v = tl.multiple_of(m, ALIGN), tl.multiple_of(v, ALIGN)
        begin, end, stride = begin * VECTOR, end * VECTOR, stride * VECTOR
        corner = corner * VECTOR + first * stride + begin
    inner_i, outer_i = tl.load(across + 3).to(tl.int32), tl.load(across + 4)
    stride_j, inner_j, outer_j = tl.load(along + 2), tl.load(along + 3).to(tl.int32), tl.load(along + 4)
    down = ROWS * columns.to(tl.int32)
    right = COLS * (1 - columns.to(tl.int32))
    steps = tl.where(columns != 0, (last - first + ROWS - 1) // ROWS, (end - begin + COLS - 1) // COLS)
    total = tl.full([ROWS, COLS], 0.0, tl.float32)
    for step in range(steps):
        at_i, at_j = first + step * down + i, begin + step * right + j
        inside = (at_i < last) & (at_j < end)
        if VECTOR > 0:
            where = corner + step * (down * stride + right) + (i * stride + j)
        else:
            where = corner + (at_i // inner_i) * outer_i + (at_i % inner_i) * stride
            where += (at_j // inner_j) * outer_j + (at_j % inner_j) * stride_j
        grad = tl.load(g + where, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(m + where, mask=inside, other=0.0).to(tl.float32)
        square = tl.load(v + where, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(p + where, mask=inside, other=0.0).to(tl.float32)
        squared = grad * grad
        total += squared
        mean += toward * (grad - mean)
        square = beta2 * square + fresh * squared
        value = keep * value - rate * mean / (tl.sqrt(square) * root + eps)
        tl.store(m + where, mean.to(STATE), mask=inside)
        tl.store(v + where, square.to(STATE), mask=inside)
        tl.store(p + where, value.to(ELEMENT), mask=inside)
    if columns != 0:
        entry = begin + tl.arange(0, COLS)  # [COLS]
        tl.store(partials + place + entry, tl.sum(total, 0), mask=entry < end)
    else:
        line = first + tl.arange(0, ROWS)  # [ROWS]
        tl.store(partials + place + line, tl.sum(total, 1), mask=line < last)


class UpdateLayout:
    """The tables of one set of parameters, each walked once, along its first target or else dim 0."""

    def __init__(
        self, x: list[Tensor], states: list[Tensor], alignment: tuple[int, ...], targets: dict[int, tuple[int, int]]
    ) -> None:
        device = x[0].device
        self.pointers = Pointers(4 * len(x), device)
        by_kind: dict[tuple[torch.dtype, torch.dtype, int], list[list[int]]] = {}
        final, slot = [], 0
        for source, (tensor, state) in enumerate(zip(x, states, strict=True)):
            dim, offset = targets.get(source, (0, -1))
            tensor = tensor if tensor.ndim else tensor.view(1)
            size, count = tensor.shape[dim], 0
            for walk in walks(tensor, dim, alignment[source]):
                rows, chunks = windows(walk, source, slot + count * size, lines(walk.vector))
                by_kind.setdefault((tensor.dtype, state.dtype, walk.vector), []).extend(rows)
                count += chunks
            if offset >= 0:
                final += [[slot, size, count, offset, start] for start in range(0, size, FINAL_COLS)]
            slot += count * size
        self.launches = [(kind, table(long_first(rows), WIDTH, device)) for kind, rows in by_kind.items() if rows]
        self.final = table(final, 5, device)
        self.partials = torch.empty(max(slot, 1), dtype=torch.float32, device=device)


def adamw_slice_sums_triton(
    out: Tensor,
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    tensors: list[int],
    dims: list[int],
    offsets: list[int],
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decay: float = 1.0,
    gain: float = 1.0,
) -> None:
    """Compute `adamw_slice_sums` by the kernel of this file."""
    if not parameters:
        return
    device = out.device
    quads = list(zip(parameters, gradients, first, second, strict=True))
    for number, (p, g, m, v) in enumerate(quads):
        alike = p.dtype == g.dtype and m.dtype == v.dtype and p.stride() == g.stride() == m.stride() == v.stride()
        if not alike or p.dtype not in ELEMENTS or m.dtype not in ELEMENTS:
            raise ValueError(
                f"parameter {number} is {p.dtype} of strides {p.stride()}, its gradient {g.dtype} of {g.stride()}, "
                f"its moments {m.dtype} of {m.stride()} and {v.dtype} of {v.stride()}: all four need the same strides, "
                "each pair the same dtype of 32 or 16 bits; use torch.optim.AdamW(fused=True) and add_slice_sums"
            )
    targets: dict[int, tuple[int, int]] = {}
    others = []
    for k, (tensor, dim, offset) in enumerate(zip(tensors, dims, offsets, strict=True)):
        if tensor in targets:
            others.append(k)
        else:
            targets[tensor] = (dim, offset)
    addresses = [[t.data_ptr() for t in part] for part in (parameters, gradients, first, second)]
    # The low bits of the addresses tell how far all are aligned; moments may be wider than what they belong to.
    alignment = tuple([(a | b | c | d) % BYTES for a, b, c, d in zip(*addresses, strict=True)])
    kinds = tuple([(p.dtype, m.dtype, p.shape, p.stride()) for p, _, m, _ in quads])
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = ("adamw", device, stream, alignment, kinds, tuple(targets.items()))
    layout: UpdateLayout = cached(key, lambda: UpdateLayout(parameters, first, alignment, targets))
    pointers = layout.pointers.of([address for part in addresses for address in part])
    hold_for_graph(layout)
    for (dtype, state, vector), rows in layout.launches:
        adamw_kernel[(len(rows),)](
            pointers,
            rows,
            layout.partials,
            len(parameters),
            1.0 - lr * weight_decay,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            lr / (1.0 - beta1**step),
            1.0 / math.sqrt(1.0 - beta2**step),
            eps,
            ELEMENT=getattr(tl, ELEMENTS[dtype]),
            STATE=getattr(tl, ELEMENTS[state]),
            VECTOR=vector,
            ALIGN=max(vector, 1) * min(dtype.itemsize, state.itemsize),
            ROWS=lines(vector),
            COLS=COLS,
            WIDTH=WIDTH,
            num_warps=WARPS,
        )
    if len(layout.final):
        finish_kernel[(len(layout.final), 1)](
            layout.final,
            layout.partials,
            out,
            layout.partials,
            layout.partials.numel(),
            out.shape[1],
            decay,
            gain,
            DECAYING=decay != 0.0,
            SKIPPING=False,
            ROWS=FINAL_ROWS,
            COLS=FINAL_COLS,
            num_warps=4,
        )
    if others:  # a second dim of the same tensor is read once more
        picked = [[of[k] for k in others] for of in (tensors, dims, offsets)]
        add_slice_sums(out, gradients, [], *picked, decay, gain)


@operator("adamw_slice_sums", mutates=("out", "parameters", "first", "second"))
def adamw_slice_sums(
    out: Tensor,
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    tensors: list[int],
    dims: list[int],
    offsets: list[int],
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decay: float = 1.0,
    gain: float = 1.0,
) -> None:
    """Take a step of AdamW, and add the sums of squared gradients to `out` on the way.

    Meant for GPUs; on a CPU, torch's fused AdamW and `add_slice_sums` are faster. The step number is a constant of the
    launch, so it does not belong in a CUDA graph.

    Args:
        out: `[1, width]` float32, see `add_slice_sums`.
        parameters: updated in place; float32, bfloat16 or float16.
        gradients: of the same dtype and strides.
        first: first moments, updated in place, of the same strides.
        second: second moments, likewise.
        tensors: per target, the number of its parameter; parameters without a target are updated all the same.
        dims: per target, the dim whose slices are summed.
        offsets: per target, the position in `out` of its sums.
        step: number of this step, from 1.
        lr: learning rate.
        beta1: decay of the first moments.
        beta2: decay of the second moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient.
        decay: factor on the values in `out`.
        gain: factor on the sums that are added.

    Raises:
        ValueError: the four tensors of a parameter differ in dtype or strides (on a GPU).
    """
    way = adamw_slice_sums_triton if compiled_for(out.device) else adamw_slice_sums_ref
    way(
        out,
        parameters,
        gradients,
        first,
        second,
        tensors,
        dims,
        offsets,
        step,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        decay,
        gain,
    )
