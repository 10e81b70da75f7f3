"""Ties: weights that have been tied or untied since the graphs of a region were made."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ecospa_fx.errors import EcoSpaError, PinnedAxisError
from ecospa_fx.passes.find.discover import discover
from ecospa_fx.passes.graph.shared_memory import SharedMemory
from ecospa_fx.passes.graph.tensors import join
from ecospa_fx.passes.infer.infer import inferred_again
from ecospa_fx.passes.rewrite.replay import replay
from ecospa_fx.passes.rewrite.rewrite import rewrite

from .region import Region
from .specialization import Specialization


def retied(region: Region, model: nn.Module, memory: SharedMemory) -> list[Specialization] | None:
    """Return the specializations as they must be after weights were tied or untied; None if none were.

    Raises:
        EcoSpaError: weights were tied that have shrunk apart.
    """
    outside, name = memory.outside(region.name), region.name
    ties = [memory.tied(name, tuple(each.captured.tensors.values())) for each in region.specializations]
    if outside == region.shared_outside and all(
        same == each.captured.same_storage for same, each in zip(ties, region.specializations, strict=True)
    ):
        return None
    specializations = []
    for each, same in zip(region.specializations, ties, strict=True):
        before = each.captured
        facts_now = replace(before, same_storage=same, shared_outside=outside)
        axis_facts = inferred_again(each.axis_facts, facts_now, region.state.experiments)
        try:
            kept = replay(axis_facts, region.state.plan)
        except PinnedAxisError as error:
            new = [f"`{join(name, a)}` as `{join(name, b)}`" for a, b in same.items()
                   if before.same_storage.get(a) != b]  # fmt: skip
            new += [f"`{join(name, a)}` {b}" for a, b in outside.items() if before.shared_outside.get(a) != b]
            raise EcoSpaError(
                f"weights have been tied since they shrank, {', '.join(new[:3])}, which cannot be followed: "
                f"{error}. Untie them, or tie them before the first shrink"
            ) from error
        module = model.get_submodule(name)
        specializations.append(Specialization(rewrite(axis_facts, kept, module), discover(axis_facts)))
    return specializations
