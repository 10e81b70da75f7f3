"""Replay: a plan, which speaks of parameters, read as a selection of the atoms of one captured graph, and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ecospa_fx.errors import PinnedAxisError
from ecospa_fx.passes.axes.algebra import Atom, Expr, atoms_of, size_of
from ecospa_fx.passes.axes.selection import (
    Selected,
    Selection,
    count,
    entries,
    in_first_contexts,
    mask_of,
    per_context_or_shared,
    project,
    touched,
)
from ecospa_fx.passes.graph.nodes import op_name, reason_text
from ecospa_fx.passes.graph.tensors import join
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Exprs
from ecospa_fx.passes.ir.border import WeightDim
from ecospa_fx.plan import Plan

_LISTED = 6  # members of a coupling in a message


def replay(axis_facts: AxisFacts, plan: Plan, difference: str = "") -> dict[Atom, Selected]:
    """Select the entries of each atom of a graph that `plan` keeps.

    Args:
        axis_facts: axes of the graph.
        plan: the plan of the whole model.
        difference: how the call that the graph serves differs from earlier ones, for the message.

    Raises:
        PinnedAxisError: the graph needs an axis whole that has shrunk, or ties axes together that have shrunk
            differently.
    """
    region = axis_facts.captured.region
    why = f" The call differs from earlier ones: {difference}." if difference else ""
    kept = selected_by(axis_facts, plan)
    for fact in axis_facts.facts:
        if fact.role == "pinned":
            for atom in atoms_of(fact.expr):
                if atom in kept:
                    reason = reason_text(fact.reason, fact.node, region)
                    raise PinnedAxisError(
                        f"this call needs all {atom.size} entries of an axis that has shrunk to {entries(kept[atom])} "
                        f"({_members(axis_facts, atom)}): {reason}.{why} Call the model as before, or make this call "
                        "once before the first shrink, so that the axis is never offered"
                    )
    gone = {atom for atom, choice in kept.items() if not entries(choice)}
    for fact in axis_facts.facts if gone else ():
        if fact.role in ("reduced", "chosen") and gone & set(atoms_of(fact.expr)):
            members = _members(axis_facts, next(iter(gone & set(atoms_of(fact.expr)))))
            raise PinnedAxisError(
                f"this call needs an entry of an axis of which none is left ({members}): "
                f"{reason_text(op_name(fact.node), fact.node, region)}.{why} Call the model as before, or make this "
                "call once before the first shrink, so that one stays"
            )
    for expr, number, node in axis_facts.least:
        left = count(expr, in_first_contexts(kept))
        if type(left) is int and touched(expr, kept) and left < number:
            raise PinnedAxisError(
                f"this call takes {number} entries of an axis that has shrunk to {left} "
                f"({_members(axis_facts, atoms_of(expr)[0])}): {reason_text(op_name(node), node, region)}.{why} Call "
                "the model as before, or make this call once before the first shrink, so that enough stay"
            )
    for name, exprs in axis_facts.parameters.items():
        full = join(region, name)
        for dim, expr in enumerate(exprs):
            planned = plan.mask(full, dim) if full in plan.original_shapes else None
            mask = mask_of(expr, kept)
            if not (mask.all() if planned is None else torch.equal(mask, planned)):
                left = len(mask) if planned is None else int(planned.sum())
                raise PinnedAxisError(
                    f"this call ties dim {dim} of `{full}`, which keeps {left} of {len(mask)} entries, to an axis that "
                    f"has shrunk differently.{why} Call the model as before, or make this call once before the first "
                    "shrink, so that neither is offered"
                )
    for edge, of in axis_facts.captured.border.along().items():
        crossing = axis_facts.crossing.get(edge)
        if crossing is not None and not _keeps(crossing, kept, _planned(plan, of)):
            kind, place, number = edge
            what = {"argument": f"the argument `{place}`", "result": f"output {place}", "tied": f"`{place}`"}[kind]
            raise PinnedAxisError(
                f"dim {number} of {what} of `{region}` has shrunk with `{of[0] if of else place}`, and this call keeps "
                f"it in another way.{why} Call the model as before, or make this call once before the first shrink, so "
                "that the axis is never offered"
            )
    names = axis_facts.captured.used()
    for name in plan.under(region):
        if name in names and name not in axis_facts.parameters:
            full = join(region, name)
            raise PinnedAxisError(
                f"this call uses `{full}`, which has shrunk from {plan.original_shapes[full]}, in a way that cannot "
                f"follow the shrink.{why} Call the model as before"
            )
    return kept


def _planned(plan: Plan, of: WeightDim | None) -> Tensor | None:
    """Return the mask that a plan has for a dim of a parameter; None where that is whole."""
    if of is None or of[0] not in plan.original_shapes:
        return None
    mask = plan.mask(*of)
    return None if mask.all() else mask


def _keeps(expr: Expr, kept: Selection, mask: Tensor | None) -> bool:
    """Return whether an axis keeps the entries of a mask; None for all."""
    if not touched(expr, kept):
        return mask is None
    return mask is not None and type(size_of(expr)) is int and torch.equal(mask_of(expr, kept), mask)


def selected_by(axis_facts: AxisFacts, plan: Plan) -> dict[Atom, Selected]:
    """Select the entries that a plan keeps of the atoms of a graph, without asking whether the graph can follow.

    Raises:
        PinnedAxisError: other numbers of entries are kept in each context.
    """
    region = axis_facts.captured.region
    masks: dict[Atom, Tensor] = {}
    empty: list[Expr] = []
    for name in plan.under(region):
        if name not in axis_facts.parameters:
            continue
        for dim, expr in enumerate(axis_facts.parameters[name]):
            mask = plan.mask(join(region, name), dim)
            if not mask.any():
                empty.append(expr)
            elif not mask.all():
                for atom, part in project(expr, mask, axis_facts.contexts).items():
                    masks[atom] = masks[atom] | part if atom in masks else part
    if empty:
        masks |= _emptied(axis_facts, plan, masks, empty)
    for edge, of in axis_facts.captured.border.along().items():
        crossing, planned = axis_facts.crossing.get(edge), _planned(plan, of)
        if planned is None or not isinstance(crossing, Atom) or crossing.size != len(planned):
            continue
        if crossing not in masks and crossing not in axis_facts.contexts:  # no weight of the region has it
            masks[crossing] = planned
    return _selection(axis_facts, masks)


def _emptied(
    axis_facts: AxisFacts, plan: Plan, masks: Mapping[Atom, Tensor], empty: Sequence[Expr]
) -> dict[Atom, Tensor]:
    """Return masks, without any entry, of the atoms that are gone where dims of parameters have no entry left.

    Nothing tells an axis of no heads from one of heads without entries. Those that some parameter still has are there;
    of the rest all are gone, but for those that an op needs an entry of, if that explains each of the dims.
    """
    region, known = axis_facts.captured.region, {atom for atom, mask in masks.items() if mask.any()}
    for name, exprs in axis_facts.parameters.items():
        full = join(region, name)
        for dim, expr in enumerate(exprs):
            if full not in plan.original_shapes or (full, dim) not in plan.kept:
                known.update(atoms_of(expr))
    needed = {atom for fact in axis_facts.facts if fact.role in ("reduced", "chosen") for atom in atoms_of(fact.expr)}
    gone: set[Atom] = set()
    for expr in empty:
        unknown = set(atoms_of(expr)) - known
        gone |= (unknown - needed) or unknown
    contexts = axis_facts.contexts
    return {
        atom: torch.zeros(*((contexts[atom].size,) if atom in contexts else ()), atom.size, dtype=torch.bool)
        for atom in gone
    }


def write_plan(plan: Plan, region: str, parameters: Mapping[str, Exprs], kept: Selection) -> None:
    """Write into a plan the entries that parameters and buffers of a region keep under a selection.

    Args:
        plan: the plan of the whole model.
        region: name of the region.
        parameters: their axis expressions, by name in the region.
        kept: the entries of each atom that stay.
    """
    for name, exprs in parameters.items():
        masks = [mask_of(expr, kept) for expr in exprs]
        if all(bool(mask.all()) for mask in masks):
            continue
        plan.original_shapes[join(region, name)] = tuple(len(mask) for mask in masks)
        for dim, mask in enumerate(masks):
            if not mask.all():
                plan.kept[join(region, name), dim] = mask.nonzero().flatten()


def _selection(axis_facts: AxisFacts, masks: dict[Atom, Tensor]) -> dict[Atom, Selected]:
    """Turn masks read off the parameters into a selection: without whole atoms, equal contexts merged."""
    kept: dict[Atom, Selected] = {}
    for atom, mask in masks.items():
        if atom not in axis_facts.contexts:
            kept[atom] = mask
            continue
        if not mask.any():
            kept[atom] = mask[0]
            continue
        live = mask.any(1)
        counts = sorted(set(mask[live].sum(1).tolist()))
        if len(counts) > 1:
            raise PinnedAxisError(
                f"the plan keeps {counts[0]} entries of an axis of {atom.size} in one context, {counts[-1]} in another "
                f"({_members(axis_facts, atom)}); tensors are dense, so keep the same number in every context"
            )
        kept[atom] = per_context_or_shared(axis_facts.contexts[atom], mask, live)
    return {atom: selected for atom, selected in kept.items() if entries(selected) < atom.size}


def _members(axis_facts: AxisFacts, atom: Atom) -> str:
    members = [
        f"{join(axis_facts.captured.region, name)}[{dim}]"
        for name, exprs in axis_facts.parameters.items()
        for dim, expr in enumerate(exprs)
        if atom in atoms_of(expr)
    ]
    more = f" and {len(members) - _LISTED} more" if len(members) > _LISTED else ""
    return ", ".join(members[:_LISTED]) + more
