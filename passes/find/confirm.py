"""Confirmation: rules by experiment are used only once shrinking by them has equalled masking in the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from ecospa_fx.passes.axes.algebra import Atom, atoms_of
from ecospa_fx.passes.axes.selection import Selected, Selection, per_context_or_shared, whole
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.rewrite.verify import compare

from .discover import Discovery, RegionCoupling


def unconfirmed_ops(
    axis_facts: AxisFacts,
    discovery: Discovery,
    region: nn.Module,
    tensors: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
) -> set[str]:
    """Name the ops with a rule by experiment whose couplings differ from masking, or cannot be compared with it.

    Args:
        axis_facts: axes of a graph with such ops.
        discovery: the couplings found with them.
        region: the live region.
        tensors: parameters and buffers at original sizes.
        inputs: the tensor leaves of a call.
    """
    through = {op: _atoms_at(axis_facts, nodes) for op, nodes in axis_facts.experiments.items()}
    concerned = [c for c in discovery.couplings if any(c.atom in atoms for atoms in through.values())]
    if any(t.is_meta for t in (*tensors.values(), *inputs)):
        return set(through) if concerned else set()
    generator = torch.Generator().manual_seed(0)
    masks = {c.atom: _half(c, generator) for c in concerned}
    selections: list[Selection] = [
        *({atom: mask} for atom, mask in masks.items()),
        *([masks] if len(masks) > 1 else []),
    ]
    unconfirmed: set[str] = set()
    for kept in selections:
        try:
            exact = compare(axis_facts, kept, region, tensors, inputs, "an experiment").ok
        except RuntimeError:  # the op refuses the sizes that are left
            exact = False
        if not exact:
            unconfirmed |= {op for op, atoms in through.items() if atoms & kept.keys()}
    return unconfirmed


def _atoms_at(axis_facts: AxisFacts, nodes: Collection[fx.Node]) -> set[Atom]:
    exprs = (
        expr
        for node in nodes
        for axes in (*axis_facts.values[node], *(operand.exprs for operand in axis_facts.operands[node]))
        for expr in axes
    )
    return {atom for expr in exprs for atom in atoms_of(expr)}


def _half(coupling: RegionCoupling, generator: torch.Generator) -> Selected:
    """Select a random half of the entries, another half in each context where there are contexts."""
    size, context = coupling.atom.size, coupling.context
    rows = [torch.randperm(size, generator=generator) for _ in range(context.size if context is not None else 1)]
    masks = torch.stack(rows) < max(coupling.least, size // 2)
    return masks[0] if context is None else per_context_or_shared(context, masks, whole(context))
