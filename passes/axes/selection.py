"""Selection: the entries of atoms that stay, and with them those of any axis.

Everything that a shrink changes follows from one boolean mask per atom: the mask of an axis is read off its
expression, new sizes are counts, new slice and split bounds are prefix sums, parameters are index-selected.

An atom may keep different entries in each entry of another atom, its *context* (different dims in each head). Its mask
then has a row per context, and every row keeps the same number of entries, so that tensors stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .algebra import Atom, Expr, Product, Segments, Size, as_size, atoms_of, product, quotient, size_of


@dataclass(frozen=True, eq=False)
class PerContext:
    """A selection that differs by context.

    Attributes:
        context: the atom by whose entries it differs.
        mask: bool `[context.size, atom.size]`, with as many entries in one row as in another.
    """

    context: Atom
    mask: Tensor

    @property
    def count(self) -> int:
        """The number of entries that stay in each context."""
        return int(self.mask[0].sum())


Selected: TypeAlias = "Tensor | PerContext"  # bool mask `[atom.size]`, the same in every context, or one per context
Selection: TypeAlias = Mapping[Atom, Selected]  # an atom that is absent keeps every entry


def touched(expr: Expr, kept: Selection) -> bool:
    """Return whether `expr` loses any entry under `kept`."""
    return any(atom in kept for atom in atoms_of(expr))


def mask_of(expr: Expr, kept: Selection) -> Tensor:
    """Return the bool mask `[size]` of the entries of `expr` that stay.

    `expr` must have a known size, and carry the context of each of its atoms that differs by one.
    """
    mask = _uniform_mask(expr, kept)
    for atom in set(atoms_of(expr)):
        choice = kept.get(atom)
        if isinstance(choice, PerContext):
            index, context = index_of(expr, atom), index_of(expr, choice.context)
            inside = index >= 0
            if bool((context[inside] < 0).any()):
                raise ValueError(f"{atom} differs by {choice.context}, which {expr} does not carry")
            mask[inside] &= choice.mask[context[inside], index[inside]]
    return mask


def _uniform_mask(expr: Expr, kept: Selection) -> Tensor:
    """Return the mask without the atoms that differ by context."""
    match expr:
        case Atom():
            choice = kept.get(expr)
            return choice.clone() if isinstance(choice, Tensor) else torch.ones(expr.size, dtype=torch.bool)
        case Product():
            mask = torch.ones(1, dtype=torch.bool)
            for factor in expr.factors:
                mask = (mask[:, None] & _uniform_mask(factor, kept)[None, :]).flatten()
            return mask
        case Segments():
            return torch.cat([torch.ones(0, dtype=torch.bool), *(_uniform_mask(part, kept) for part in expr.parts)])


def broadcast_mask(exprs: Sequence[Expr], dim: int, kept: Selection) -> Tensor:
    """Return the mask of one dim of a tensor with axes `exprs`, in a shape that broadcasts over the tensor.

    If the dim differs by a context that another dim carries, the mask has both dims.
    """
    shape = [1] * len(exprs)
    expr = exprs[dim]
    contexts = {c.context for a in atoms_of(expr) if isinstance(c := kept.get(a), PerContext)} - set(atoms_of(expr))
    if not contexts:
        shape[dim] = size_of(expr)
        return mask_of(expr, kept).view(shape)
    (context,) = contexts
    along = next(d for d, other in enumerate(exprs) if context in atoms_of(other))
    rows = [mask_of(expr, in_context(kept, context, entry)) for entry in index_of(exprs[along], context).tolist()]
    shape[dim], shape[along] = size_of(expr), len(rows)
    mask = torch.stack(rows)
    return (mask if along < dim else mask.T).reshape(shape)


def in_context(kept: Selection, context: Atom, entry: int) -> dict[Atom, Selected]:
    """Return the selection in one entry of `context`."""
    return {
        atom: choice.mask[entry] if isinstance(choice, PerContext) and choice.context is context else choice
        for atom, choice in kept.items()
    }


def in_first_contexts(kept: Selection) -> dict[Atom, Tensor]:
    """Return the selection in the first entry of each context, for uses in which only numbers of entries matter."""
    return {atom: choice.mask[0] if isinstance(choice, PerContext) else choice for atom, choice in kept.items()}


def entries(choice: Selected) -> int:
    """Return the number of entries that a choice keeps, in each context."""
    return choice.count if isinstance(choice, PerContext) else int(choice.sum())


def whole(atom: Atom) -> Tensor:
    """Make the choice that keeps all of an atom."""
    return torch.ones(atom.size, dtype=torch.bool)


def narrow(choice: Selected, keep: Tensor, context: Atom | None = None, live: Tensor | None = None) -> Selected:
    """Keep, of the entries that `choice` keeps, only those at the positions `keep`.

    Args:
        choice: the present choice.
        keep: LongTensor `[kept]`, or `[remaining contexts, kept]` where it differs by context.
        context: the atom by which `keep` differs.
        live: bool mask `[context.size]` of the remaining contexts.
    """
    if keep.ndim == 1 and not isinstance(choice, PerContext):
        return _at(choice, keep)
    context = choice.context if isinstance(choice, PerContext) else context
    assert context is not None
    live = whole(context) if live is None else live
    rows = choice.mask if isinstance(choice, PerContext) else choice.expand(context.size, -1)
    positions = keep.expand(int(live.sum()), -1)
    masks = rows.clone()
    for row, chosen in zip(live.nonzero().flatten().tolist(), positions, strict=True):
        masks[row] = _at(rows[row], chosen)
    return per_context_or_shared(context, masks, live)


def _at(mask: Tensor, positions: Tensor) -> Tensor:
    """Keep, of the entries in `mask`, only those at `positions`."""
    narrower = torch.zeros_like(mask)
    narrower[mask.nonzero().flatten()[positions]] = True
    return narrower


def per_context_or_shared(context: Atom, masks: Tensor, live: Tensor) -> Selected:
    """Make a choice from one mask per context; removed contexts get the mask of the first remaining one."""
    if not live.any():  # no context is left either
        return torch.zeros(masks.shape[-1], dtype=torch.bool)
    first = masks[live][0]
    masks = torch.where(live[:, None], masks, first)
    return first if bool((masks == first).all()) else PerContext(context, masks)


def count(expr: Expr, kept: Selection) -> Size:
    """Return the number of entries of `expr` that stay."""
    match expr:
        case Atom():
            return entries(kept[expr]) if expr in kept else expr.size
        case Product():
            size: Size = 1
            for factor in expr.factors:
                size = size * count(factor, kept)
            return as_size(size)
        case Segments():
            return as_size(sum(count(part, kept) for part in expr.parts))


def count_before(expr: Expr, bound: Size, kept: Selection) -> Size:
    """Return the number of entries of `expr` that stay before position `bound`, either of which may be dynamic.

    Raises:
        ValueError: no number of whole pieces lies before `bound`.
    """
    if not touched(expr, kept) or bound == 0:
        return bound
    if bound == size_of(expr):
        return count(expr, kept)
    if type(bound) is int and type(size_of(expr)) is int:
        return int(mask_of(expr, kept)[:bound].sum())
    if isinstance(expr, Product):
        rows = product(*expr.factors[1:])
        whole_rows = quotient(bound, size_of(rows))
        if whole_rows is not None:
            return as_size(count_before(expr.factors[0], whole_rows, kept) * count(rows, kept))
    if isinstance(expr, Segments):
        before: Size = 0
        for part in expr.parts:
            rest = as_size(bound - size_of(part))
            if rest < 0 if type(rest) is int else rest.is_negative:
                return as_size(before + count_before(part, bound, kept))
            before, bound = as_size(before + count(part, kept)), rest
            if bound == 0:
                return before
    raise ValueError(f"{bound} of {size_of(expr)} entries are not whole pieces")


def index_of(expr: Expr, atom: Atom) -> Tensor:
    """Return for each entry of `expr` the entry of `atom` that it belongs to, or -1: a LongTensor `[size]`."""
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
    """Return (offset, stride) of each occurrence of `atom` along `expr`."""
    match expr:
        case Atom():
            return ((0, 1),) if expr is atom else ()
        case Product():
            places: list[tuple[int, int]] = []
            inner = 1
            for factor in reversed(expr.factors):
                places += [(offset * inner, stride * inner) for offset, stride in placed(factor, atom)]
                inner *= size_of(factor)
            return tuple(places)
        case Segments():
            places, start = [], 0
            for part in expr.parts:
                places += [(start + offset, stride) for offset, stride in placed(part, atom)]
                start += size_of(part)
            return tuple(places)


def on_diagonal(expr: Expr) -> set[Atom]:
    """Collect atoms that occur in two factors of one product: an entry of the axis belongs to two of their entries."""
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


def static_end(expr: Expr) -> tuple[bool, Expr] | None:
    """Return the factors of known size at one end of a product with dynamic ones: heads folded into a batch, say.

    Returns:
        Whether that end runs fastest, and the factors; None if factors elsewhere have known sizes, too.
    """
    if not isinstance(expr, Product):
        return None
    static = [all(type(atom.size) is int for atom in atoms_of(factor)) for factor in expr.factors]
    number = sum(static)
    for fastest, part in ((True, expr.factors[len(static) - number :]), (False, expr.factors[:number])):
        rest = expr.factors[: len(static) - number] if fastest else expr.factors[number:]
        if number and not any(type(atom.size) is int for factor in rest for atom in atoms_of(factor)):
            return fastest, product(*part)
    return None


def project(expr: Expr, mask: Tensor, contexts: Mapping[Atom, Atom]) -> dict[Atom, Tensor]:
    """Return the smallest masks of the atoms of `expr` whose selection covers `mask` `[size]`.

    This is the inverse of `mask_of` where one exists: compare `mask_of` of the result with `mask`. An atom with one of
    `contexts` gets a mask `[context.size, atom.size]`.
    """
    kept = {}
    for atom in set(atoms_of(expr)):
        index = index_of(expr, atom)
        inside = mask & (index >= 0)
        if atom in contexts:
            context = contexts[atom]
            kept[atom] = torch.zeros(context.size, atom.size, dtype=torch.bool)
            kept[atom][index_of(expr, context)[inside], index[inside]] = True
        else:
            kept[atom] = torch.zeros(atom.size, dtype=torch.bool)
            kept[atom][index[inside]] = True
    return kept
