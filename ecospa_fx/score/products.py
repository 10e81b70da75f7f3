"""Products: the places in a region's graph where a coupling is contracted, and how to read the operands there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.couple.coupling_index import CouplingIndex
from ecospa_fx.passes.axes.algebra import Atom, Expr, atoms_of, size_of
from ecospa_fx.passes.axes.selection import Selected, index_of, mask_of
from ecospa_fx.passes.find.discover import RegionCoupling
from ecospa_fx.passes.ir.axis_facts import AxisFacts


@dataclass(frozen=True, eq=False)
class Side:
    """One factor of a product.

    Attributes:
        node: the node that computes it.
        dim: its dim along the coupling.
        along: its dim along the contexts, if that is another one.
        beside: LongTensor, the context at each position of `along`.
    """

    node: fx.Node
    dim: int
    along: int | None = None
    beside: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ProductSite:
    """A place in a graph that says something about the entries of a coupling.

    Attributes:
        coupling: its name.
        op: the op that multiplies.
        sides: the factors of a product; of an attention its queries and keys, or its weights.
        entry: LongTensor `[positions]`, the entry of the coupling at each position of a side's `dim`, -1 for none.
        context: LongTensor `[positions]`, likewise its context, if that lies on the same dim.
        contexts: number of contexts; 1 if they are not told apart.
        scale: factor on the logits of an attention.
        causal: whether an attention sees earlier positions only.
        mask: the node of its mask.
        parts: the number of ranks that the entries are shared out over, of which this one has its own.
    """

    coupling: str
    op: fx.Node
    sides: tuple[Side, ...]
    entry: Tensor
    size: int
    contexts: int = 1
    context: Tensor | None = None
    scale: float | None = None
    causal: bool = False
    mask: fx.Node | None = None
    mask_rows: tuple[Tensor | None, ...] = ()
    parts: int = 1

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes whose values must be read."""
        return (*(side.node for side in self.sides), *((self.mask,) if self.mask is not None else ()))


def product_sites(
    axis_facts: AxisFacts,
    found: RegionCoupling,
    coupling: Coupling,
    kept: dict[Atom, Selected],
    here: dict[Atom, Selected],
) -> Iterator[ProductSite]:
    """Find the products in which the entries of `found` are summed over.

    Args:
        axis_facts: axes of a graph.
        found: the coupling, as that graph has it.
        coupling: the same at the sizes of now.
        kept: the entries of each atom that stay.
        here: of these the ones that this rank computes.
    """
    if not coupling.size:
        return
    context = found.context if coupling.context is not None else None
    numbers = CouplingIndex(found.atom, context, kept)
    for fact in axis_facts.facts:
        if fact.role != "contracted" or found.atom not in atoms_of(fact.expr) or len(fact.operands) < 2:
            continue
        sides, beside_parts = [], 1
        for operand in axis_facts.operands[fact.node]:
            dims = [dim for dim, expr in enumerate(operand.exprs) if expr == fact.expr]
            if len(dims) == 1 and operand.weighted:
                other = [(d, set(atoms_of(e))) for d, e in enumerate(operand.exprs) if d != dims[0]]
                beside = [d for d, atoms in other if context in atoms]
                if any(type(size_of(operand.exprs[d])) is not int for d in beside):
                    break  # heads folded into the batch: the graph does not say which row is of which head
                rows = None
                if beside and context is not None:
                    rows = _contexts(operand.exprs[beside[0]], context, kept, here)
                    beside_parts = len(_contexts(operand.exprs[beside[0]], context, kept, kept)) // max(1, len(rows))
                sides.append(Side(operand.node, dims[0], beside[0] if beside else None, rows))
        if len(sides) != 2:
            continue
        whole, remaining = (mask_of(fact.expr, _along(each, fact.expr)) for each in (kept, here))
        index, apart = index_of(fact.expr, found.atom), parts(whole, remaining) * beside_parts
        common: dict[str, Any] = {"size": coupling.size, "contexts": coupling.contexts, "parts": apart}
        if context is None or context in atoms_of(fact.expr):
            entry, on = numbers.read(fact.expr, index, remaining)
            yield ProductSite(coupling.name, fact.node, tuple(sides), entry, context=on, **common)
        elif all(side.along is not None for side in sides):  # every context has a row of its own
            yield ProductSite(coupling.name, fact.node, tuple(sides), numbers.in_first(index, whole), **common)


def parts(whole: Tensor, here: Tensor) -> int:
    """Return over how many ranks an axis is shared out, from masks of what is left of it and of what is here."""
    return int(whole.sum()) // max(1, int(here.sum()))


def _along(kept: dict[Atom, Selected], expr: Expr) -> dict[Atom, Selected]:
    """Return the selection for reading `expr` alone: where it differs by a context not in `expr`, the first one's."""
    own = set(atoms_of(expr))
    return {
        atom: choice if isinstance(choice, Tensor) or choice.context in own else choice.mask[0]
        for atom, choice in kept.items()
    }


def _contexts(expr: Expr, context: Atom, kept: dict[Atom, Selected], here: dict[Atom, Selected]) -> Tensor:
    """Return the context, in the numbering of now, at each position here of an axis that carries it."""
    live = mask_of(context, kept)
    return (live.cumsum(0) - 1)[index_of(expr, context)[mask_of(expr, _along(here, expr))]]
