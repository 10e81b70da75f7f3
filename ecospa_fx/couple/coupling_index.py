"""Numbering: which entry of a coupling each position of a parameter belongs to, as they are now."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ecospa_fx.passes.axes.algebra import Atom, Expr, Segments, atoms_of, size_of
from ecospa_fx.passes.axes.selection import PerContext, Selection, entries, index_of, mask_of, whole


class Numbering:
    """The entries of a coupling numbered as they are now, and so the contexts that it may differ by."""

    def __init__(self, atom: Atom, context: Atom | None, kept: Selection) -> None:
        choice = kept.get(atom, whole(atom))
        self.size = entries(choice)
        # An atom that differs by context has other numbers in each, also if it may not go on doing so.
        self.context = choice.context if isinstance(choice, PerContext) else context
        masks = choice.mask if isinstance(choice, PerContext) else choice[None]
        self._numbers = masks.cumsum(1) - 1  # [contexts or 1, atom.size]
        live = mask_of(self.context, kept) if self.context is not None else torch.ones(1, dtype=torch.bool)
        self.contexts = int(live.sum()) if context is not None else 1
        self._contexts = live.cumsum(0) - 1
        self._offered = context is not None

    def read(self, expr: Expr, index: Tensor, left: Tensor) -> tuple[Tensor, Tensor | None]:
        """The entry and the context of each position of `expr` that is left; -1 where `index` has none."""
        owned = index >= 0
        if self.context is None:
            return torch.where(owned, self._numbers[0][index], -1)[left], None
        context = index_of(expr, self.context)
        row = context if len(self._numbers) > 1 else torch.zeros_like(context)
        numbers = torch.where(owned, self._numbers[row, index], -1)[left]
        return numbers, torch.where(owned, self._contexts[context], -1)[left] if self._offered else None

    def in_first(self, index: Tensor, left: Tensor) -> Tensor:
        """The entry of each position of an axis that carries no context, as in the first one: all have as many."""
        return torch.where(index >= 0, self._numbers[0][index], -1)[left]


def by_part(expr: Expr, atom: Atom) -> Iterator[tuple[int | None, Tensor]]:
    """The index of an axis per outermost segment that carries `atom`; the segment's number where there are several."""
    index = index_of(expr, atom)
    if not isinstance(expr, Segments):
        yield None, index
        return
    start, carrying = 0, [i for i, part in enumerate(expr.parts) if atom in atoms_of(part)]
    for i, part in enumerate(expr.parts):
        stop = start + size_of(part)
        if i in carrying:
            here = torch.full_like(index, -1)
            here[start:stop] = index[start:stop]
            yield (i if len(carrying) > 1 else None), here
        start = stop
