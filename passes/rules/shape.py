"""Shape ops: they move entries without changing them, as views, slices and repetitions do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ecospa_fx.passes.axes.algebra import as_size
from ecospa_fx.passes.ir.relations import (
    Expanded,
    Opaque,
    Operand,
    Pattern,
    Permuted,
    Picked,
    Regrouped,
    Repeated,
    SameDims,
    Sliced,
)

from .operands import letters, spaced
from .registry import axis_rule

if TYPE_CHECKING:
    from ecospa_fx.passes.ir.op_site import OpSite

aten = torch.ops.aten


def regrouped(x: Operand, *_: Any, **__: Any) -> Regrouped:
    """Entries keep their order, in other dims."""
    return Regrouped(x)


axis_rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default,
          resize=lambda site: site.resize_output("size", "shape"))(regrouped)  # fmt: skip
axis_rule(aten.unsqueeze.default, aten.flatten.using_ints, aten.ravel.default)(regrouped)
axis_rule(aten.atleast_1d.default, aten.atleast_2d.default, aten.atleast_3d.default)(regrouped)


@axis_rule(aten.atleast_1d.Sequence, aten.atleast_2d.Sequence, aten.atleast_3d.Sequence)
def regrouped_each(xs: list[Operand]) -> Regrouped | Opaque:
    """Several tensors get dims of one entry in one call."""
    return Regrouped(xs[0]) if len(xs) == 1 else Opaque(tuple(xs))


def resize_squeeze(site: OpSite) -> None:
    """Name the dims that had one entry at first: a dim that shrinks to one entry stays a dim."""
    x = site.operands[0]
    dims = site.args.get("dim", list(range(x.ndim)))
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    site.target = aten.squeeze.dims
    site.args["dim"] = [dim for dim in dims if x.shape[dim] == 1]


axis_rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, resize=resize_squeeze)(regrouped)


@axis_rule(aten.view_as.default, aten.reshape_as.default)
def view_as(x: Operand, other: Operand) -> Regrouped:
    """Entries keep their order, in the dims of another tensor."""
    return Regrouped(x, other)


def resize_unflatten(site: OpSite) -> None:
    """Write the sizes of the new dims, the only ones that `unflatten` names."""
    dim = site.args["dim"] % site.operands[0].ndim
    sizes = list(site.args["sizes"])
    for i, expr in enumerate(site.outputs[0][dim : dim + len(sizes)]):
        if site.touched(expr) and sizes[i] != -1:
            sizes[i] = site.resized(sizes[i], expr)
    site.args["sizes"] = sizes


axis_rule(aten.unflatten.int, resize=resize_unflatten)(regrouped)


@axis_rule(aten.transpose.int)
def transpose(x: Operand, a: int, b: int) -> Permuted:
    """Two dims change places."""
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return Permuted(x, tuple(order))


@axis_rule(aten.t.default, aten.numpy_T.default)
def reversed_dims(x: Operand) -> Permuted:
    """The dims come in reverse order."""
    return Permuted(x, tuple(reversed(range(x.ndim))))


@axis_rule(aten.mT.default, aten.mH.default, aten.matrix_H.default, aten.adjoint.default)
def transposed(x: Operand) -> Permuted:
    """The last two dims change places: `x.mT`."""
    return transpose(x, -2, -1)


@axis_rule(aten.permute.default)
def permute(x: Operand, dims: list[int]) -> Permuted:
    """The dims come in another order."""
    return Permuted(x, tuple(d % x.ndim for d in dims))


@axis_rule(aten.movedim)
def movedim(x: Operand, source: Any, destination: Any) -> Permuted:
    """Dims move to other positions."""
    sources, destinations = (dims if isinstance(dims, (list, tuple)) else [dims] for dims in (source, destination))
    order = [d for d in range(x.ndim) if d not in {s % x.ndim for s in sources}]
    for to, dim in sorted((d % x.ndim, s % x.ndim) for s, d in zip(sources, destinations, strict=True)):
        order.insert(to, dim)
    return Permuted(x, tuple(order))


@axis_rule(aten.expand.default, aten.broadcast_to.default, resize=lambda site: site.resize_output("size"))
def expand(x: Operand, *_: Any, **__: Any) -> Expanded:
    """The operand is repeated along new axes."""
    return Expanded(x)


@axis_rule(aten.expand_as.default)
def expand_as(x: Operand, other: Operand) -> Expanded:
    """The operand is repeated to the shape of another."""
    return Expanded(x, other)


def resize_repeats(site: OpSite) -> None:
    """Write the numbers of copies that are left: they are axes of their own, selected like any other."""
    if any(site.touched(expr) for expr in site.made):
        site.args["repeats"] = site.repeats()


@axis_rule(aten.repeat.default, resize=resize_repeats)
def repeat(x: Operand, repeats: list[Any]) -> Repeated:
    """The whole axis is repeated end to end."""
    return Repeated(x, tuple(map(as_size, repeats)))


def resize_tiles(site: OpSite) -> None:
    """Turn the op into a `repeat`, which takes a number for every dim, and resize that."""
    if any(site.touched(expr) for expr in site.made):
        site.target = aten.repeat.default
        times = [*(1 for _ in range(len(site.made) - len(site.args["dims"]))), *site.args["dims"]]
        site.args = {"self": site.args["self"], "repeats": times}
        site.args["repeats"] = site.repeats()


@axis_rule(aten.tile.default, resize=resize_tiles)
def tile(x: Operand, dims: list[Any]) -> Repeated:
    """The whole axis is repeated end to end."""
    return Repeated(x, tuple(map(as_size, [*(1 for _ in range(x.ndim - len(dims))), *dims])))


def resize_interleaved(site: OpSite) -> None:
    """Write the number of copies that is left, and leave out the size of the result, which may be given as a help."""
    resize_repeats(site)
    if any(site.touched(expr) for expr in site.outputs[0]):
        site.args.pop("output_size", None)


@axis_rule(aten.repeat_interleave.self_int, resize=resize_interleaved)
def repeat_interleave(x: Operand, repeats: int, dim: int | None = None, **_: Any) -> Repeated | SameDims:
    """Each entry along the axis is repeated in place."""
    if dim is None:
        return SameDims(x, pinned=tuple(range(x.ndim)))
    return Repeated(x, tuple(repeats if d == dim % x.ndim else 1 for d in range(x.ndim)), interleaved=True)


@axis_rule(aten.repeat_interleave.self_Tensor)
def repeat_unevenly(x: Operand, repeats: Operand, dim: int | None = None, **_: Any) -> Pattern | Opaque:
    """The position of an entry depends on how often those before it are repeated."""
    if dim is None or x.ndim == 0 or repeats.ndim != 1:
        return Opaque((x, repeats))
    return Pattern(f"{letters(x, dim, 'along!')}, +times! -> {letters(x, dim, 'new!')}", (x, repeats))


def resize_bounds(site: OpSite) -> None:
    """Write the new bounds: the numbers of kept entries before the old ones."""
    x = site.operands[0]
    expr = x.exprs[site.args["dim"] % x.ndim]
    if not site.touched(expr):
        return
    if site.args["step"] != 1:
        # Only whole rows go, and the slice takes the same column of each row as before.
        site.args["start"] = bound_of(site.args["start"], 0, x.shape[site.args["dim"] % x.ndim])
        site.args["end"] = None
        return
    for name in ("start", "end"):
        if site.args[name] is not None:
            site.args[name] = site.kept_before(expr, site.args[name])


@axis_rule(aten.slice.Tensor, resize=resize_bounds)
def slice_(x: Operand, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> Sliced:
    """A slice of the axis is taken."""
    dim %= x.ndim
    size = x.shape[dim]
    return Sliced(x, dim, bound_of(start, 0, size), bound_of(stop, size, size), step)


def resize_narrow(site: OpSite) -> None:
    """Write the new start and length of a slice that names its length instead of its end."""
    x, dim = site.operands[0], site.args["dim"] % site.operands[0].ndim
    if site.touched(x.exprs[dim]):
        site.args["start"] = site.kept_before(x.exprs[dim], site.args["start"])
        site.args["length"] = site.resized(site.args["length"], site.outputs[0][dim])


@axis_rule(aten.narrow.default, resize=resize_narrow)
def narrow(x: Operand, dim: int, start: Any, length: Any) -> Sliced:
    """A slice of the axis is taken."""
    dim %= x.ndim
    start = bound_of(start, 0, x.shape[dim])
    return Sliced(x, dim, start, as_size(start + as_size(length)), 1)


@axis_rule(aten.narrow.Tensor)
def narrow_by_value(x: Operand, dim: int, start: Operand, *_: Any) -> Pattern:
    """The value of a tensor says where the slice of the axis begins."""
    return Pattern(f"{letters(x, dim, 'along!')}, + -> {letters(x, dim, 'left!')}", (x, start))


def bound_of(bound: Any, default: Any, size: Any) -> Any:
    """Return a slice bound as Python reads it: None, negative, or beyond the end."""
    if bound is None:
        return default
    bound = as_size(bound)
    if type(bound) is not int:
        return as_size(size + bound) if bound.is_negative else bound
    if type(size) is not int:
        return bound if 0 <= bound < 2**62 else (size if bound > 0 else as_size(size + bound))
    return min(max(bound + size if bound < 0 else bound, 0), size)


@axis_rule(aten.select.int)
def select(x: Operand, dim: int, index: Any) -> Picked:
    """One entry along the axis is picked by its position."""
    return Picked(x, dim % x.ndim, index)


@axis_rule(aten.unbind.int)
def unbind(x: Operand, dim: int = 0) -> Picked:
    """Every entry along the axis is picked by its position."""
    return Picked(x, dim % x.ndim)


@axis_rule(aten.meshgrid)
def meshgrid(tensors: list[Operand], indexing: str = "ij") -> Pattern:
    """Each operand is repeated along the others."""
    names = [f"x{i}" for i in range(len(tensors))]
    out = [*reversed(names[:2]), *names[2:]] if indexing == "xy" else names
    terms = (name if x.ndim else "" for name, x in zip(names, tensors, strict=True))
    return Pattern(f"{', '.join(terms)} -> {' '.join(out)}", tuple(tensors), apart=True)


@axis_rule(aten.diagonal.default)
def diagonal(x: Operand, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Pattern:
    """Entries are picked whose positions along two axes are the same, or differ by an offset."""
    dims = [f"d{i}" for i in range(x.ndim)]
    a, b = dim1 % x.ndim, dim2 % x.ndim
    rest = [d for i, d in enumerate(dims) if i not in (a, b)]
    if offset == 0 and x.shape[a] == x.shape[b]:
        dims[a] = dims[b] = along = "n"
    else:
        dims[a], dims[b], along = "m!", "n!", "k!"
    return Pattern(f"{' '.join(dims)} -> {' '.join((*rest, along))}", (x,), moves=True)


@axis_rule(aten.linalg_diagonal.default)
def linalg_diagonal(x: Operand, *, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Pattern:
    """Entries are picked whose positions along two axes are the same, or differ by an offset."""
    return diagonal(x, offset, dim1, dim2)


@axis_rule(aten.diag_embed.default)
def diag_embed(x: Operand, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Pattern:
    """Entries along the axis are laid out along a diagonal."""
    dims = [f"d{i}" for i in range(x.ndim - 1)]
    out: list[str] = list(dims)
    for dim, name in sorted(((dim1 % (x.ndim + 1), "m!"), (dim2 % (x.ndim + 1), "k!"))):
        out.insert(dim, name)
    return Pattern(f"{' '.join((*dims, 'n!'))} -> {' '.join(out)}", (x,), moves=True)


@axis_rule(aten.diag.default)
def diag(x: Operand, offset: int = 0) -> Pattern:
    """Entries along the axis are laid out along a diagonal, or taken from it."""
    return diagonal(x, offset) if x.ndim == 2 else diag_embed(x, offset)


@axis_rule(aten.diagflat.default)
def diagflat(x: Operand, *_: Any) -> Pattern:
    """Entries along the axis are laid out along a diagonal."""
    return Pattern(f"{spaced('d', x.ndim, '!')} -> m! n!", (x,), moves=True)


@axis_rule(aten.tril.default, aten.triu.default)
def triangular(x: Operand, *_: Any) -> SameDims:
    """Entries are kept or zeroed by their position along the axis."""
    return SameDims(x, pinned=(x.ndim - 2, x.ndim - 1), moves=True)
