"""Indexing: ops that choose entries by the values of an index tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ecospa_fx.passes.ir.relations import Created, Indexed, Opaque, Operand, Pattern

from . import formulas as f
from .operands import letters, spaced, tensors
from .registry import axis_rule, refuse

if TYPE_CHECKING:
    from ecospa_fx.passes.ir.op_site import OpSite

aten = torch.ops.aten


@axis_rule(aten.embedding.default)
def embedding(weight: Operand, index: Operand, *_: Any) -> Pattern:
    """Entries along the axis are chosen by the values of an index."""
    return Pattern("v e, ... -> ... e", (weight, index), chosen={"v": index})


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
    spec = f"{' '.join(_in_order(x, indices))}, {', '.join(terms)} -> {' '.join(out)}"
    by = {letter: i for letter, (_, i) in zip(picked, chosen, strict=True)}
    return Pattern(spec, (x, *by.values()), chosen=by, moves=True)


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
    before, picked, after, terms = _places(x, indices)
    longest = max((term.split() for term in terms), key=len)
    places = [f"{letter}!" for letter in longest]  # entries that are not written stay as they were, which is not zero
    written = [*before, *places, *after][len(before) + len(places) + len(after) - values.ndim :]
    own = " ".join(_in_order(x, indices))
    placed = ", ".join("+" + " ".join(f"{letter}!" for letter in term.split()) for term in terms)
    by = dict(zip(picked, chosen, strict=True))
    return Pattern(f"{own}, {placed}, +{' '.join(written)} -> {own}", everything, apart=True, chosen=by)


@axis_rule(aten.gather.default)
def gather(x: Operand, dim: int, index: Operand, **_: Any) -> Pattern | Opaque:
    """Entries along the axis are chosen by the values of an index."""
    if x.ndim == 0 or not _alike(x, index, dim):
        return Opaque((x, index))
    spec = f"{letters(x, dim, 'from')}, +{letters(x, dim, 'to')} -> {letters(x, dim, 'to')}"
    return Pattern(spec, (x, index), apart=True, chosen={"from": index}, moves=True)


@axis_rule(aten.take_along_dim.default)
def take_along_dim(x: Operand, index: Operand, dim: int | None = None) -> Pattern | Opaque:
    """Entries along the axis are chosen by the values of an index."""
    if dim is None:
        return take(x, index) if index.ndim == 1 else Opaque((x, index))
    if x.ndim != index.ndim:
        return Opaque((x, index))
    spec = f"{letters(x, dim, 'from')}, +{letters(x, dim, 'to')} -> {letters(x, dim, 'to')}"
    return Pattern(spec, (x, index), apart=True, chosen={"from": index}, moves=True)


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
    own = letters(x, dim, "to")
    more = "".join(f", +{letters(x, dim, f'from{i}!')}" for i in range(len(written)))
    return Pattern(f"{own}{more} -> {own}", (x, *written), apart=True, chosen={"to": index})


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
    own = letters(x, dim, "to")
    spec = f"{own}, +{'chosen!' * index.ndim}, + -> {own}"
    return Pattern(spec, operands, apart=True, chosen={"to": index})


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
    own, added = letters(x, dim, "to"), letters(x, dim, "from~")
    spec = f"{own}, +from~, +{added} -> {own}"
    if index.shape[0] != source.shape[dim]:  # sizes that depend on values, which nothing proves equal
        spec = f"{own}, +chosen!, +{added.replace('~', '!')} -> {own}"
    return Pattern(spec, (x, index, source), apart=True, chosen={"to": index})


def _resize_classes(site: OpSite) -> None:
    site.args["num_classes"] = site.resized(site.args["num_classes"], site.outputs[0][-1])


@axis_rule(aten.one_hot.default, resize=_resize_classes)
def one_hot(x: Operand, classes: Any = -1) -> Pattern:
    """The value of an entry says which of the entries along the axis is one."""
    if type(classes) is not int or classes < 1:
        return Pattern("... -> ... classes!", (x,))
    return Pattern("... -> ... classes", (x,), {"classes": classes}, chosen={"classes": x})


def _resize_bins(site: OpSite) -> None:
    bins = site.count(site.outputs[0][0])
    site.args |= {"bins": bins, "max": site.args["max"] - (site.args["bins"] - bins)}


@axis_rule(aten.histc.default, resize=_resize_bins)
def histc(x: Operand, bins: int = 100, least: float = 0, most: float = 0) -> Pattern | Opaque:
    """The value of an entry decides where it is counted."""
    if type(bins) is not int or least != 0 or most not in (bins - 1, bins):  # else a position is no number of a bin
        return Opaque((x,))
    own = spaced("x", x.ndim, "!")
    return Pattern(f"{own} -> bins", (x,), {"bins": bins}, apart=True, chosen={"bins": x})


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
