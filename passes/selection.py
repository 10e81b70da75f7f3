"""Selection: what keeping some entries of some atoms means for any axis.

Everything that a shrink changes follows from one boolean mask per atom: the mask of an axis is read off its
expression, new sizes are counts, new slice and split bounds are prefix sums, parameters are index-selected.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .axes import Atom, Expr, Product, Segments, Size, as_size, atoms_of, size_of

Kept = Mapping[Atom, Tensor]  # atom -> bool mask `[atom.size]`; an atom that is absent keeps every entry


def touched(expr: Expr, kept: Kept) -> bool:
    """Whether `expr` loses any entry under `kept`."""
    return any(atom in kept for atom in atoms_of(expr))


def mask_of(expr: Expr, kept: Kept) -> Tensor:
    """The bool mask `[size]` of the entries of `expr` that stay. `expr` must have a known size."""
    match expr:
        case Atom():
            return kept[expr] if expr in kept else torch.ones(expr.size, dtype=torch.bool)
        case Product():
            mask = torch.ones(1, dtype=torch.bool)
            for factor in expr.factors:
                mask = (mask[:, None] & mask_of(factor, kept)[None, :]).flatten()
            return mask
        case Segments():
            return torch.cat([torch.ones(0, dtype=torch.bool), *(mask_of(part, kept) for part in expr.parts)])


def count(expr: Expr, kept: Kept) -> Size:
    """Number of entries of `expr` that stay."""
    match expr:
        case Atom():
            return int(kept[expr].sum()) if expr in kept else expr.size
        case Product():
            size: Size = 1
            for factor in expr.factors:
                size = size * count(factor, kept)
            return as_size(size)
        case Segments():
            return as_size(sum(count(part, kept) for part in expr.parts))


def index_of(expr: Expr, atom: Atom) -> Tensor:
    """For each entry of `expr` the entry of `atom` it belongs to, or -1: a LongTensor `[size]`."""
    match expr:
        case Atom():
            return torch.arange(expr.size) if expr is atom else torch.full((expr.size,), -1)
        case Product():
            index = torch.full((1,), -1)
            for factor in expr.factors:
                # A product with the atom in two factors would be a diagonal; `on_diagonal` refuses those.
                index = torch.maximum(index[:, None], index_of(factor, atom)[None, :]).flatten()
            return index
        case Segments():
            return torch.cat([torch.zeros(0, dtype=torch.long), *(index_of(part, atom) for part in expr.parts)])


def placed(expr: Expr, atom: Atom) -> tuple[tuple[int, int], ...]:
    """Where `atom` lies along `expr`: (offset, stride) per occurrence, which with its size says what it owns."""
    match expr:
        case Atom():
            return ((0, 1),) if expr is atom else ()
        case Product():
            found: list[tuple[int, int]] = []
            inner = 1
            for factor in reversed(expr.factors):
                found += [(offset * inner, stride * inner) for offset, stride in placed(factor, atom)]
                inner *= size_of(factor)
            return tuple(found)
        case Segments():
            found, start = [], 0
            for part in expr.parts:
                found += [(start + offset, stride) for offset, stride in placed(part, atom)]
                start += size_of(part)
            return tuple(found)


def on_diagonal(expr: Expr) -> set[Atom]:
    """Atoms that occur in two factors of one product: one entry of the axis then belongs to two of theirs."""
    match expr:
        case Atom():
            return set()
        case Product():
            seen: set[Atom] = set()
            twice: set[Atom] = set()
            for factor in expr.factors:
                atoms = set(atoms_of(factor))
                twice |= (seen & atoms) | on_diagonal(factor)
                seen |= atoms
            return twice
        case Segments():
            return set().union(*map(on_diagonal, expr.parts))


def project(expr: Expr, mask: Tensor) -> dict[Atom, Tensor]:
    """The smallest masks of the atoms of `expr` whose selection covers `mask` `[size]`.

    The inverse of `mask_of` wherever there is one; compare `mask_of(expr, project(expr, mask))` with `mask` to know.
    """
    kept = {}
    for atom in set(atoms_of(expr)):
        index = index_of(expr, atom)
        kept[atom] = torch.zeros(size_of(atom), dtype=torch.bool)
        kept[atom][index[mask & (index >= 0)]] = True
    return kept
