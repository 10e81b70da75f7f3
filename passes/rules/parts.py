"""Parts: an axis is cut into pieces, and pieces are joined to an axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ecospa_fx.passes.axes.algebra import as_size, quotient
from ecospa_fx.passes.ir.relations import Halved, Joined, Opaque, Operand, Parted, Pattern, SameDims, Stacked

from .operands import letters
from .registry import axis_rule
from .shape import bound_of

if TYPE_CHECKING:
    from ecospa_fx.passes.ir.op_site import OpSite

aten = torch.ops.aten


def resize_parts(site: OpSite, dim: int | None = None) -> None:
    """Name the size of each part, since they may come out unequal."""
    x = site.operands[0]
    dim = (site.args.get("dim", 0) if dim is None else dim) % x.ndim
    if not site.touched(x.exprs[dim]):
        return
    tensor = next(iter(site.args.values()))
    left = [site.count(output[dim]) for output in site.outputs]
    if not all(type(size) is int for size in left):
        left = [site.share(tensor, dim, x.exprs[dim], output[dim]) for output in site.outputs]
    site.target = aten.split_with_sizes.default
    site.args = {"self": tensor, "split_sizes": left, "dim": dim}


@axis_rule(aten.split_with_sizes.default, aten.split.sizes, aten.unsafe_split_with_sizes.default, resize=resize_parts)
def split_with_sizes(x: Operand, sizes: list[Any], dim: int = 0) -> Parted:
    """The axis is split into parts."""
    return Parted(x, dim % x.ndim, tuple(map(as_size, sizes)))


@axis_rule(aten.split.Tensor, aten.unsafe_split.Tensor, resize=resize_parts)
def split(x: Operand, size: int, dim: int = 0) -> Parted | SameDims:
    """The axis is split into parts."""
    total = x.shape[dim % x.ndim]
    if type(total) is not int or type(size) is not int:
        pieces = quotient(total, size)
        if type(pieces) is not int:
            return SameDims(x, pinned=(dim % x.ndim,))
        return Parted(x, dim % x.ndim, (size,) * pieces)
    return Parted(x, dim % x.ndim, tuple(min(size, total - start) for start in range(0, total, size or 1)) or (total,))


@axis_rule(aten.chunk.default, aten.unsafe_chunk.default, resize=resize_parts)
def chunk(x: Operand, chunks: int, dim: int = 0) -> Parted | SameDims:
    """The axis is split into parts."""
    total = x.shape[dim % x.ndim]
    if type(total) is int and type(chunks) is int:
        return split(x, -(-total // chunks), dim)
    size = quotient(total, chunks)
    return SameDims(x, pinned=(dim % x.ndim,)) if size is None else split(x, size, dim)


@axis_rule(aten.tensor_split.sections, aten.tensor_split.indices, resize=resize_parts)
def tensor_split(x: Operand, where: Any, dim: int = 0) -> Parted | SameDims:
    """The axis is split into parts, some a little longer than others, or at positions."""
    dim %= x.ndim
    total = x.shape[dim]
    if type(total) is not int or not all(type(n) is int for n in (where if isinstance(where, list) else [where])):
        return SameDims(x, pinned=(dim,))
    if isinstance(where, int):
        return Parted(x, dim, tuple(total // where + (i < total % where) for i in range(where)))
    ends = [bound_of(end, 0, total) for end in where]
    bounds = zip([0, *ends], [*ends, total], strict=True)
    return Parted(x, dim, tuple(max(end - start, 0) for start, end in bounds))


@axis_rule(aten.tensor_split.tensor_indices_or_sections)
def split_by_values(x: Operand, where: Operand, dim: int = 0) -> Pattern:
    """The values of a tensor say where the axis is split."""
    own = letters(x, dim, "along!")
    return Pattern(f"{own}, +{'where!' * where.ndim} -> {own}", (x, where))


def _split_along(dim: int, *ops: Any) -> None:
    def split_along(x: Operand, where: Any) -> Parted | SameDims:
        """The axis is split into parts."""
        return tensor_split(x, where, min(dim, x.ndim - 1))

    axis_rule(*ops, resize=lambda site: resize_parts(site, min(dim, site.operands[0].ndim - 1)))(split_along)


_split_along(0, aten.vsplit.int, aten.vsplit.array)
_split_along(1, aten.hsplit.int, aten.hsplit.array)
_split_along(2, aten.dsplit.int, aten.dsplit.array)


@axis_rule(aten.glu.default)
def glu(x: Operand, dim: int = -1) -> Halved:
    """One half of the axis gates the other."""
    return Halved(x, dim % x.ndim)


@axis_rule(aten.cat.default)
def cat(tensors: list[Operand], dim: int = 0) -> Joined:
    """The axes of the operands are joined end to end."""
    return Joined(tuple(tensors), dim % tensors[0].ndim)


@axis_rule(aten.stack.default)
def stack(tensors: list[Operand], dim: int = 0) -> Stacked:
    """The tensors are put side by side along a new axis."""
    return Stacked(tuple(tensors), dim % (tensors[0].ndim + 1))


@axis_rule(aten.hstack.default)
def hstack(tensors: list[Operand]) -> Joined | Opaque:
    """The axes of the operands are joined end to end."""
    return _joined(tensors, 1 if tensors[0].ndim > 1 else 0, 1)


@axis_rule(aten.vstack.default)
def vstack(tensors: list[Operand]) -> Joined | Stacked | Opaque:
    """Rows of the operands are put one below another."""
    return Stacked(tuple(tensors), 0) if _vectors(tensors) else _joined(tensors, 0, 2)


@axis_rule(aten.column_stack.default)
def column_stack(tensors: list[Operand]) -> Joined | Stacked | Opaque:
    """Columns of the operands are put side by side."""
    return Stacked(tuple(tensors), 1) if _vectors(tensors) else _joined(tensors, 1, 2)


@axis_rule(aten.dstack.default)
def dstack(tensors: list[Operand]) -> Joined | Stacked | Opaque:
    """The operands are put one behind another."""
    return Stacked(tuple(tensors), 2) if all(x.ndim == 2 for x in tensors) else _joined(tensors, 2, 3)


def _vectors(tensors: list[Operand]) -> bool:
    return all(x.ndim == 1 for x in tensors)


def _joined(tensors: list[Operand], dim: int, least: int) -> Joined | Opaque:
    return Joined(tuple(tensors), dim) if all(x.ndim >= least for x in tensors) else Opaque(tuple(tensors))
