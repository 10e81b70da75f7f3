"""Indexing: ops that choose entries by the values of an index tensor."""

from __future__ import annotations

from typing import Any

import torch

from ecospa_fx.passes.ir.relations import Created, Indexed, Opaque, Operand, Pattern

from . import formulas as f
from .operands import letters, spaced, tensors
from .registry import axis_rule, refuse

aten = torch.ops.aten


@axis_rule(aten.embedding.default)
def embedding(weight: Operand, index: Operand, *_: Any) -> str:
    """Entries along the axis are chosen by the values of an index."""
    return "v! e, ... -> ... e"


@axis_rule(aten.embedding_bag)
def embedding_bag(weight: Operand, index: Operand, offsets: Operand, by_frequency: bool = False, mode: int = 0,
                  sparse: bool = False, per_sample: Operand | None = None, *_: Any, **__: Any) -> Pattern:  # fmt: skip
    """Entries along the axis are chosen by the values of an index."""
    own = spaced("i", index.ndim, "!")
    operands = tensors(weight, index, offsets, per_sample)
    largest = "n! e" if mode == 2 else "n!"
    return Pattern(f"v! e, +{own}, +o!, +{own} -> bags! e, a!, c!, {largest}", operands, apart=True)


@axis_rule(aten.bucketize.Tensor, aten.bucketize.Scalar)
def bucketize(x: Any, bounds: Operand, **_: Any) -> Pattern:
    """Every bound along the axis counts in the place of a value."""
    own = "..." if isinstance(x, Operand) else ""
    return Pattern(f"{own}, +bounds! -> {own}" if own else "bounds! ->", tensors(x, bounds), apart=True)


@axis_rule(aten.searchsorted.Tensor, aten.searchsorted.Scalar)
def searchsorted(bounds: Operand, x: Any, *, sorter: Operand | None = None, **_: Any) -> Pattern:
    """Every bound along the axis counts in the place of a value."""
    if not isinstance(x, Operand):
        return Pattern("... bounds!, +... bounds! -> ...", tensors(bounds, sorter), apart=True)
    if bounds.ndim == 1:
        return Pattern("bounds!, ..., +bounds! -> ...", tensors(bounds, x, sorter), apart=True)
    rows = spaced("d", bounds.ndim - 1)
    spec = f"{rows} bounds!, {rows} x, +{rows} bounds! -> {rows} x"
    return Pattern(spec, tensors(bounds, x, sorter), apart=True)


@axis_rule(aten.isin)
def isin(x: Any, among: Any, **_: Any) -> Pattern | Opaque:
    """Every entry of the second operand is compared with each of the first."""
    if not isinstance(x, Operand):
        return Opaque(tensors(among))
    tested = spaced("t", among.ndim, "!") if isinstance(among, Operand) else ""
    return Pattern(f"..., +{tested} -> ...", tensors(x, among), apart=True)


@axis_rule(aten.index_select.default)
def index_select(x: Operand, dim: int, index: Operand) -> Indexed | Opaque:
    """Entries along the axis are chosen by the values of an index."""
    if x.ndim == 0:
        return Opaque((x, index))
    return Indexed(x, dim % x.ndim, index)


@axis_rule(aten.index.Tensor)
def index(x: Operand, indices: list[Operand | None]) -> Indexed | Pattern | Opaque:
    """Entries along the axis are chosen by the values of an index."""
    chosen = [(dim, i) for dim, i in enumerate(indices) if i is not None]
    if any(_is_condition(i) for _, i in chosen):
        return _chosen(x, *chosen[0]) if len(chosen) == 1 else Opaque((x, *(i for _, i in chosen)))
    if len(chosen) == 1:
        return Indexed(x, *chosen[0])
    before, picked, after, terms = _places(x, indices)
    adjacent = chosen[-1][0] - chosen[0][0] == len(chosen) - 1
    longest = max((term.split() for term in terms), key=len)
    out = [*before, *longest, *after] if adjacent else [*longest, *before, *after]
    own = " ".join(f"{n}!" if n in picked else n for n in _in_order(x, indices))
    return Pattern(f"{own}, {', '.join(terms)} -> {' '.join(out)}", (x, *(i for _, i in chosen)))


def _is_condition(index: Operand) -> bool:
    return index.node.meta["val"].dtype in (torch.bool, torch.uint8)


def _chosen(x: Operand, dim: int, condition: Operand) -> Pattern:
    """Write the pattern of the entries at which a condition holds; its dims become one."""
    dims = [f"d{i}" for i in range(x.ndim)]
    here = slice(dim, dim + condition.ndim)
    picked = " ".join(f"{letter}!" for letter in dims[here])
    before, after = " ".join(dims[: here.start]), " ".join(dims[here.stop :])
    return Pattern(f"{before} {picked} {after}, +{picked} -> {before} chosen! {after}", (x, condition))


def _in_order(x: Operand, indices: list[Operand | None]) -> list[str]:
    """Return a letter per dim of `x`: `p` where an index picks, `d` elsewhere."""
    picks = {dim for dim, i in enumerate(indices) if i is not None}
    return [f"{'p' if dim in picks else 'd'}{dim}" for dim in range(x.ndim)]


def _places(x: Operand, indices: list[Operand | None]) -> tuple[list[str], list[str], list[str], list[str]]:
    """Return the letters of dims before the picked ones, of the picked ones, of those after, and of each index."""
    dims = _in_order(x, indices)
    picked = [letter for letter in dims if letter[0] == "p"]
    first = dims.index(picked[0])
    before, after = dims[:first], [letter for letter in dims[first:] if letter[0] == "d"]
    terms = [" ".join(f"i{n}" for n in range(i.ndim, 0, -1)) for i in indices if i is not None]
    return before, picked, after, terms


@axis_rule(aten.index_put.default)
def index_put(x: Operand, indices: list[Operand | None], values: Operand, *_: Any) -> Pattern | Opaque:
    """The values of an index decide which entries along the axis are written."""
    chosen = [i for i in indices if i is not None]
    everything = (x, *chosen, values)
    picks = [dim for dim, i in enumerate(indices) if i is not None]
    adjacent = picks[-1] - picks[0] == len(picks) - 1
    if not adjacent or any(map(_is_condition, chosen)):
        return Opaque(everything)
    before, _picked, after, terms = _places(x, indices)
    longest = max((term.split() for term in terms), key=len)
    places = [f"{letter}!" for letter in longest]  # entries that are not written stay as they were, which is not zero
    written = [*before, *places, *after][len(before) + len(places) + len(after) - values.ndim :]
    own = " ".join(f"{n}!" if n[0] == "p" else n for n in _in_order(x, indices))
    placed = ", ".join("+" + " ".join(f"{letter}!" for letter in term.split()) for term in terms)
    return Pattern(f"{own}, {placed}, +{' '.join(written)} -> {own}", everything, apart=True)


@axis_rule(aten.gather.default)
def gather(x: Operand, dim: int, index: Operand, **_: Any) -> Pattern | Opaque:
    """Entries along the axis are chosen by the values of an index."""
    if x.ndim == 0 or not _alike(x, index, dim):
        return Opaque((x, index))
    spec = f"{letters(x, dim, 'from!')}, +{letters(x, dim, 'to')} -> {letters(x, dim, 'to')}"
    return Pattern(spec, (x, index), apart=True)


@axis_rule(aten.take_along_dim.default)
def take_along_dim(x: Operand, index: Operand, dim: int | None = None) -> Pattern | Opaque:
    """Entries along the axis are chosen by the values of an index."""
    if dim is None:
        return take(x, index) if index.ndim == 1 else Opaque((x, index))
    if x.ndim != index.ndim:
        return Opaque((x, index))
    return Pattern(
        f"{letters(x, dim, 'from!')}, +{letters(x, dim, 'to')} -> {letters(x, dim, 'to')}", (x, index), apart=True
    )


@axis_rule(aten.take.default)
def take(x: Operand, index: Operand) -> Pattern:
    """Entries of the whole tensor are chosen by the values of an index."""
    return Pattern(f"{spaced('x', x.ndim, '!')}, +{spaced('i', index.ndim)} -> {spaced('i', index.ndim)}", (x, index))


@axis_rule(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def scatter(x: Operand, dim: int, index: Operand, values: Any, *_: Any, **__: Any) -> Pattern | Opaque:
    """The values of an index decide which entries along the axis are written."""
    written = (index, values) if isinstance(values, Operand) and values.ndim else (index,)
    everything = (x, index, values) if isinstance(values, Operand) else (x, index)
    if x.ndim == 0 or len(everything) - 1 != len(written) or not all(_alike(x, w, dim) for w in written):
        return Opaque(everything)
    own = letters(x, dim, "to!")
    more = "".join(f", +{letters(x, dim, f'from{i}!')}" for i in range(len(written)))
    return Pattern(f"{own}{more} -> {own}", (x, *written), apart=True)


def _alike(x: Operand, other: Operand, dim: int) -> bool:
    """Return True if two operands have the same sizes, except along `dim`."""
    sizes = zip(x.shape, other.shape, strict=False)
    return x.ndim == other.ndim and all(a == b for d, (a, b) in enumerate(sizes) if d != dim % x.ndim)


@axis_rule(aten.index_fill)
def index_fill(x: Operand, dim: int, index: Operand, value: Any) -> Pattern | Opaque:
    """The values of an index decide which entries along the axis are written."""
    operands = tensors(x, index, value)
    if x.ndim == 0 or index.ndim > 1:
        return Opaque(operands)
    own = letters(x, dim, "to!")
    return Pattern(f"{own}, +{'chosen!' * index.ndim}, + -> {own}", operands, apart=True)


@axis_rule(aten.select_scatter.default)
def select_scatter(x: Operand, source: Operand, dim: int, *_: Any) -> Pattern:
    """One entry along the axis is written."""
    own = letters(x, dim, "to!")
    return Pattern(f"{own}, +{own.replace('to!', '')} -> {own}", (x, source), apart=True)


@axis_rule(aten.slice_scatter.default)
def slice_scatter(x: Operand, source: Operand, dim: int = 0, *_: Any) -> Pattern:
    """Some entries along the axis are written."""
    own = letters(x, dim, "to!")
    return Pattern(f"{own}, +{letters(x, dim, 'from!')} -> {own}", (x, source), apart=True)


@axis_rule(aten.multinomial.default)
def multinomial(x: Operand, *_: Any, **__: Any) -> Pattern:
    """Every entry along the axis may be drawn."""
    return Pattern("... n! -> ... drawn!", (x,), apart=True)


@axis_rule(aten.index_add, aten.index_copy, aten.index_reduce)
def index_add(x: Operand, dim: int, index: Operand, source: Operand, *_: Any, **__: Any) -> Pattern | Opaque:
    """The values of an index decide which entries along the axis are written or added to."""
    if x.ndim == 0 or index.ndim != 1 or not _alike(x, source, dim):
        return Opaque((x, index, source))
    own, added = letters(x, dim, "to!"), letters(x, dim, "from!")
    # There are as many entries to add as the index has, but nothing proves it where sizes depend on values.
    return Pattern(f"{own}, +chosen!, +{added} -> {own}", (x, index, source), apart=True)


@axis_rule(aten.one_hot.default)
def one_hot(x: Operand, *_: Any) -> str:
    """The axis has one entry per class."""
    return "... -> ... classes!"


def created(*_: Any, **__: Any) -> Created:
    """A new tensor of a given size is made."""
    return Created()


for _ops, _formula in (
    ((aten.empty, aten.new_empty, aten.empty_permuted), None),
    ((aten.rand, aten.randn, aten.randint, aten.normal.float_float), None),
    ((aten.zeros, aten.new_zeros), f.ZEROS), ((aten.ones, aten.new_ones), f.ONES),
    ((aten.full,), f.SECOND), ((aten.new_full,), f.THIRD),
):  # fmt: skip
    axis_rule(*_ops, resize=lambda site: site.resize_output("size"), formula=_formula)(created)
axis_rule(aten.scalar_tensor, formula=f.FIRST)(created)


refuse(
    "Each entry along the axis is its own position",
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace, aten.logspace, aten.eye,
    aten.tril_indices, aten.triu_indices, aten.randperm, aten.hann_window, aten.hamming_window, aten.bartlett_window,
    aten.blackman_window, aten.kaiser_window,
)  # fmt: skip
refuse("Its entries lie in memory as its strides say", aten.empty_strided, aten.new_empty_strided)
