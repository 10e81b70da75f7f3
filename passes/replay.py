"""Replay: read a plan, which speaks of parameters, as a selection of the atoms of one captured graph."""

from __future__ import annotations

import torch
from torch import Tensor

from ecospa_fx.errors import PinnedAxisError
from ecospa_fx.plan import Plan

from .axes import Atom, atoms_of
from .inference import Inference
from .names import join
from .nodes import reason_text
from .selection import mask_of, project


def replay(inference: Inference, plan: Plan, difference: str = "") -> dict[Atom, Tensor]:
    """What `plan` keeps of each atom of a graph.

    Args:
        inference: axes of the graph.
        plan: the plan of the whole model.
        difference: how the call that the graph serves differs from earlier ones, for the message.

    Raises:
        PinnedAxisError: the graph needs an axis whole that has shrunk, or ties axes together that shrank apart.
    """
    region = inference.captured.region
    kept: dict[Atom, Tensor] = {}
    for name in plan.under(region):
        if name not in inference.parameters:
            continue
        for dim, expr in enumerate(inference.parameters[name]):
            mask = plan.mask(join(region, name), dim)
            if not mask.all():
                for atom, part in project(expr, mask).items():
                    kept[atom] = kept[atom] | part if atom in kept else part
    kept = {atom: mask for atom, mask in kept.items() if not mask.all()}
    why = f" The call differs from earlier ones: {difference}." if difference else ""
    for fact in inference.facts:
        if fact.role == "pinned":
            for atom in atoms_of(fact.expr):
                if atom in kept:
                    reason = reason_text(fact.reason, fact.node, region)
                    raise PinnedAxisError(
                        f"this call needs an axis of {atom.size} whole that has shrunk to {int(kept[atom].sum())} "
                        f"({_members(inference, atom)}): {reason}.{why} Call the model as before, or make this call "
                        "once before the first shrink, so that the axis is never offered"
                    )
    held = set(inference.captured.tensors.values())
    for name, exprs in inference.parameters.items():
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
        if name in held and name not in inference.parameters:
            raise PinnedAxisError(
                f"this call uses `{join(region, name)}`, which has shrunk, in a way that cannot follow.{why}"
            )
    return kept


def _members(inference: Inference, atom: Atom) -> str:
    return ", ".join(
        f"{join(inference.captured.region, name)}[{dim}]"
        for name, exprs in inference.parameters.items()
        for dim, expr in enumerate(exprs)
        if atom in atoms_of(expr)
    )
