"""CouplingIndex: the entry of a coupling that each position of a parameter belongs to, at the sizes of now."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ecospa_fx.passes.axes.algebra import Atom, Expr, Segments, atoms_of, size_of
from ecospa_fx.passes.axes.selection import PerContext, Selection, entries, index_of, mask_of, whole


class CouplingIndex:
    """The entries of a coupling, and the contexts that it may differ by, numbered among those that are left.

    Attributes:
        size: number of entries now, in each context.
        context: the atom by which its entries differ, or may do so.
        contexts: number of contexts now; 1 where none is offered.
    """

    def __init__(self, atom: Atom, context: Atom | None, kept: Selection) -> None:
        choice = kept.get(atom, whole(atom))
        self.size = entries(choice)
        # An atom that differs by context already has other numbers in each, even where no context is offered any more.
        self.context = choice.context if isinstance(choice, PerContext) else context
        masks = choice.mask if isinstance(choice, PerContext) else choice[None]
        self._numbers = masks.cumsum(1) - 1  # [contexts or 1, atom.size]
        live = mask_of(self.context, kept) if self.context is not None else torch.ones(1, dtype=torch.bool)
        self.contexts = int(live.sum()) if context is not None else 1
        self._contexts = live.cumsum(0) - 1
        self._offered = context is not None

    def read(self, expr: Expr, index: Tensor, live: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the entry and the context of each live position of an axis.

        Args:
            expr: the axis.
            index: entry of the atom at each position, at original sizes; -1 where there is none.
            live: mask of the positions that are left.

        Returns:
            Entry of each position that is left, -1 where it belongs to none; likewise the context, None where none is
            offered.
        """
        member = index >= 0
        if self.context is None:
            return torch.where(member, self._numbers[0][index], -1)[live], None
        context = index_of(expr, self.context)
        row = context if len(self._numbers) > 1 else torch.zeros_like(context)
        numbers = torch.where(member, self._numbers[row, index], -1)[live]
        return numbers, torch.where(member, self._contexts[context], -1)[live] if self._offered else None

    def in_first(self, index: Tensor, live: Tensor) -> Tensor:
        """Return the entry of each live position of an axis without contexts, as in the first: all have as many."""
        return torch.where(index >= 0, self._numbers[0][index], -1)[live]


def by_part(expr: Expr, atom: Atom) -> Iterator[tuple[int | None, Tensor]]:
    """Yield (segment, index) for each outermost segment of an axis that carries `atom`; None if it is the only one."""
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
