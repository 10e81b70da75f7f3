"""Replay: read a plan, which speaks of parameters, as a selection of the atoms of one captured graph."""

from __future__ import annotations

import torch
from torch import Tensor

from ecospa_fx.errors import PinnedAxisError
from ecospa_fx.passes.axes.algebra import Atom, atoms_of
from ecospa_fx.passes.axes.selection import Selected, entries, mask_of, per_context_or_shared, project
from ecospa_fx.passes.graph.nodes import reason_text
from ecospa_fx.passes.graph.tensors import join
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.plan import Plan


def replay(axis_facts: AxisFacts, plan: Plan, difference: str = "") -> dict[Atom, Selected]:
    """What `plan` keeps of each atom of a graph.

    Args:
        axis_facts: axes of the graph.
        plan: the plan of the whole model.
        difference: how the call that the graph serves differs from earlier ones, for the message.

    Raises:
        PinnedAxisError: the graph needs an axis whole that has shrunk, or ties axes together that shrank apart.
    """
    region = axis_facts.captured.region
    masks: dict[Atom, Tensor] = {}
    for name in plan.under(region):
        if name not in axis_facts.parameters:
            continue
        for dim, expr in enumerate(axis_facts.parameters[name]):
            mask = plan.mask(join(region, name), dim)
            if not mask.all():
                for atom, part in project(expr, mask, axis_facts.contexts).items():
                    masks[atom] = masks[atom] | part if atom in masks else part
    why = f" The call differs from earlier ones: {difference}." if difference else ""
    kept = _choices(axis_facts, masks)
    for fact in axis_facts.facts:
        if fact.role == "pinned":
            for atom in atoms_of(fact.expr):
                if atom in kept:
                    reason = reason_text(fact.reason, fact.node, region)
                    raise PinnedAxisError(
                        f"this call needs an axis of {atom.size} whole that has shrunk to {entries(kept[atom])} "
                        f"({_members(axis_facts, atom)}): {reason}.{why} Call the model as before, or make this call "
                        "once before the first shrink, so that the axis is never offered"
                    )
    held = set(axis_facts.captured.tensors.values())
    for name, exprs in axis_facts.parameters.items():
        full = join(region, name)
        for dim, expr in enumerate(exprs):
            wanted = plan.mask(full, dim) if full in plan.original_shapes else None
            mine = mask_of(expr, kept)
            if not (mine.all() if wanted is None else torch.equal(mine, wanted)):
                raise PinnedAxisError(
                    f"this call ties dim {dim} of `{full}` to axes that have shrunk differently.{why} Call the model "
                    "as before"
                )
    for name in plan.under(region):
        if name in held and name not in axis_facts.parameters:
            raise PinnedAxisError(
                f"this call uses `{join(region, name)}`, which has shrunk, in a way that cannot follow.{why}"
            )
    return kept


def _choices(axis_facts: AxisFacts, masks: dict[Atom, Tensor]) -> dict[Atom, Selected]:
    """Masks read off the parameters as choices: what is whole left out, what is equal in every context made one."""
    kept: dict[Atom, Selected] = {}
    for atom, mask in masks.items():
        if atom not in axis_facts.contexts:
            kept[atom] = mask
            continue
        live = mask.any(1)
        counts = sorted(set(mask[live].sum(1).tolist()))
        if len(counts) > 1:
            raise PinnedAxisError(
                f"the plan keeps {counts[0]} entries of an axis of {atom.size} in one context, {counts[-1]} in another "
                f"({_members(axis_facts, atom)}); tensors are dense, so every one must keep as many"
            )
        kept[atom] = per_context_or_shared(axis_facts.contexts[atom], mask, live)
    return {atom: choice for atom, choice in kept.items() if entries(choice) < atom.size}


def _members(axis_facts: AxisFacts, atom: Atom) -> str:
    return ", ".join(
        f"{join(axis_facts.captured.region, name)}[{dim}]"
        for name, exprs in axis_facts.parameters.items()
        for dim, expr in enumerate(exprs)
        if atom in atoms_of(expr)
    )
