"""Products: the places in a region's graph where a coupling is contracted, and how to read the operands there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes whose values must be read."""
        return (*(side.node for side in self.sides), *((self.mask,) if self.mask is not None else ()))


def product_sites(
    axis_facts: AxisFacts, found: RegionCoupling, coupling: Coupling, kept: dict[Atom, Selected]
) -> Iterator[ProductSite]:
    """Find the products in which the entries of `found` are summed over."""
    context = found.context if coupling.context is not None else None
    numbers = CouplingIndex(found.atom, context, kept)
    for fact in axis_facts.facts:
        if fact.role != "contracted" or found.atom not in atoms_of(fact.expr) or len(fact.operands) < 2:
            continue
        sides = []
        for operand in axis_facts.operands[fact.node]:
            dims = [dim for dim, expr in enumerate(operand.exprs) if expr == fact.expr]
            if len(dims) == 1 and operand.weighted:
                other = [(d, set(atoms_of(e))) for d, e in enumerate(operand.exprs) if d != dims[0]]
                beside = [d for d, atoms in other if context in atoms]
                if any(type(size_of(operand.exprs[d])) is not int for d in beside):
                    break  # heads folded into the batch: the graph does not say which row is of which head
                rows = _contexts(operand.exprs[beside[0]], context, kept) if beside and context is not None else None
                sides.append(Side(operand.node, dims[0], beside[0] if beside else None, rows))
        if len(sides) != 2:
            continue
        remaining = mask_of(fact.expr, _along(kept, fact.expr))
        index = index_of(fact.expr, found.atom)
        if context is None or context in atoms_of(fact.expr):
            entry, on = numbers.read(fact.expr, index, remaining)
            yield ProductSite(coupling.name, fact.node, tuple(sides), entry, coupling.size, coupling.contexts, on)
        elif all(side.along is not None for side in sides):  # every context has a row of its own
            entry = numbers.in_first(index, remaining)
            yield ProductSite(coupling.name, fact.node, tuple(sides), entry, coupling.size, coupling.contexts)


def _along(kept: dict[Atom, Selected], expr: Expr) -> dict[Atom, Selected]:
    """Return the selection for reading `expr` alone: where it differs by a context not in `expr`, the first one's."""
    own = set(atoms_of(expr))
    return {
        atom: choice if isinstance(choice, Tensor) or choice.context in own else choice.mask[0]
        for atom, choice in kept.items()
    }


def _contexts(expr: Expr, context: Atom, kept: dict[Atom, Selected]) -> Tensor:
    """Return the context, in the numbering of now, at each position of an axis that carries it."""
    live = mask_of(context, kept)
    return (live.cumsum(0) - 1)[index_of(expr, context)[mask_of(expr, _along(kept, expr))]]
