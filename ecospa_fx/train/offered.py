"""Couplings that every rank offers: one rank may have met a call that needs an axis whole, which others do not know."""

from __future__ import annotations

from torch import nn

from ecospa_fx.logs import logger
from ecospa_fx.model.journal import Journal
from ecospa_fx.model.lookup import couplings, regions_of, state_of
from ecospa_fx.ranks.agreement import Ranks

ELSEWHERE = "another rank has met a call of the model that needs it whole"


def offered_everywhere(model: nn.Module, ranks: Ranks, journal: Journal) -> None:
    """Leave out, on every rank, the couplings that are not offered on all; take the sizes of the first rank's calls.

    Args:
        model: a compiled model that has been called.
        ranks: the processes that train it.
        journal: that of the sparsification step.
    """
    if not ranks:
        return
    regions = regions_of(model)
    sizes_of_calls = {name: region.first_sizes for name, region in regions.items()}
    for name, called in ranks.first(sizes_of_calls, "the sizes of the first call").items():
        if name in regions and called != sizes_of_calls[name]:  # by which FLOPs are counted
            journal.note_attribute(regions[name], "called")
            regions[name].called = called
    sizes = {coupling.name: f"{coupling.size} {coupling.name}" for coupling in couplings(model)}
    common = set(ranks.common(sizes.values(), "the couplings that ranks offer"))
    missing = frozenset(name for name, size in sizes.items() if size not in common)
    if missing:
        state = state_of(model).state
        journal.note_attribute(state, "elsewhere")
        state.elsewhere |= missing
        journal.note(state.forget_couplings)
        state.forget_couplings()
        listed = ", ".join(f"`{name}`" for name in sorted(missing)[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        logger("shrink").warning("%s%s left out: %s", listed, more, ELSEWHERE)
