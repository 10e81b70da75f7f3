"""Sensitivity: the measured loss of a model without a share of each kind of coupling, or of each in each layer.

half of the batches  -> saliency of entries at every position, as `compress` reads it
the other half       -> loss; again with each kind shrunk alone, by each share, and put back
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from ecospa_fx.api import compile as compiled
from ecospa_fx.arguments import FUNCTION, MODULE, NAMES, SEVERAL, TEXT, either, optional, takes
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import TargetError
from ecospa_fx.logs import logger
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.cost import CostModel
from ecospa_fx.model.lookup import check_values, couplings, state_of
from ecospa_fx.model.restore import restore
from ecospa_fx.passes.graph.isolate import isolated
from ecospa_fx.ranks.members import ranks_of
from ecospa_fx.ranks.wrappers import check_wrappers, unwrapped

from .measuring import (
    as_it_was_unless_shrunk,
    check_kinds,
    check_plain_numbers,
    evaluating,
    listed_calls,
    smaller,
    unwatched,
    value_of,
    weakest_first,
)
from .objective import Loss, Objective
from .sensitivities import Measured, Sensitivity
from .settings import check_option

SHARES = (0.1, 0.25, 0.5)

By = Literal["kind", "layer"]


@takes(
    model=MODULE, batches=SEVERAL, loss=optional(FUNCTION), shares=SEVERAL, kinds=optional(either(NAMES, TEXT)),
    by=TEXT,
)  # fmt: skip
def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    shares: Sequence[float] = SHARES,
    kinds: Collection[str] | None = None,
    by: By = "kind",
) -> Sensitivity:
    """Measure how much the loss rises without a share of each kind of coupling, before one chooses how much goes.

    >>> table = ecospa_fx.sensitivity(model, batches)
    >>> print(table)
    >>> table.plot("sensitivity.png")
    >>> trainer = ecospa_fx.EcoSpaTrainer(ecospa_fx.compile(model), optimizer, target=table.targets(0.7))

    The weakest entries go, by their squared Taylor terms at every position, the same share of each coupling of the
    kind; nothing takes over. The model is really smaller while its loss is measured, and afterwards as it was, to the
    bit.

    Args:
        model: any module. One that is not compiled is plain again afterwards.
        batches: calls of the model, as `compress` takes them. The first, third, fifth, ... say which entries go, and
            the others measure; a single one does both.
        loss: `loss(model, batch)` -> a scalar, as of `compress`.
        shares: shares of the entries that go.
        kinds: kinds of coupling to measure; None: all that the model has.
        by: `"kind"`: all couplings of a kind at once; `"layer"`: those of a kind in each repeated block, one after the
            other.

    Raises:
        TargetError: there are no batches, the model cannot be called with one, a share is out of range, or the model
            has no such kind.
    """
    begun, module = time.perf_counter(), unwrapped(model)
    check_wrappers(model)
    if ranks_of(module):
        raise TargetError("several processes train this model: measure it in one, before it is wrapped or sharded")
    check_option("by", by, get_args(By))
    removed = _checked_shares(shares)
    check_kinds(kinds)
    check_values(module, "measure")
    calls = listed_calls(batches)
    check_plain_numbers(module)
    own = Objective()
    measured: Loss = loss or own.measured
    judges = calls[1::2] or calls
    plain = MODEL not in module.__dict__
    with as_it_was_unless_shrunk(module), evaluating(module), isolated(module), unwatched(module):
        if plain:
            with torch.no_grad():
                value_of(loss or own, module, calls[0], 0)  # its own Python says best what is wrong with a batch
            compiled(module)
        whole = _mean(measured, module, judges)
        groups = _groups(module, kinds, by)
        together = {key: _in_step(module, group) for key, group in groups.items()}
        wanted = {c for group in together.values() for c in group}
        order, _ = weakest_first(module, list(enumerate(calls))[::2], loss or own, wanted)
        costs = {
            "parameters": CostModel(module, state_of(module)),
            "flops": CostModel(module, state_of(module), "flops"),
        }
        cost = costs["parameters"]
        found = []
        for (kind, layer), group in groups.items():
            for share in removed:
                keeps = {c: order[c][..., _gone(c, share) :].sort(-1).values for c in together[kind, layer]}
                gone = sum(_gone(c, share) for c in group)
                if not gone:
                    continue
                with smaller(module, {c.name: keep for c, keep in keeps.items()}):
                    value = _mean(measured, module, judges)
                left = cost.total({c.name: keep.shape[-1] for c, keep in keeps.items()})
                part = gone / sum(c.size for c in group)
                found.append(Measured(kind, layer, share, part, gone, cost.total({}) - left, value, value - whole))
                logger("shrink").info("%s", found[-1])
        seen = {(row.kind, row.layer) for row in found}
        names = {key: tuple(c.name for c in group) for key, group in groups.items() if key in seen}
        originals = {c.name: c.original_size for c in couplings(module)}
    if plain:
        restore(module)
    seconds = time.perf_counter() - begun
    return Sensitivity(tuple(found), whole, cost.total({}), names, by, seconds, originals, costs)


def _checked_shares(shares: Sequence[float]) -> list[float]:
    found = []
    for share in shares:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            raise TargetError(f"shares has {share!r}, which is out of range; a share that goes is between 0 and 1")
        found.append(float(share))
    if not found:
        raise TargetError("shares is empty; pass those that go, such as (0.1, 0.25, 0.5)")
    return sorted(set(found))


def _groups(model: nn.Module, kinds: Collection[str] | None, by: By) -> dict[tuple[str, str], list[Coupling]]:
    """Return the couplings that shrink together: (kind, layer) -> couplings. The layer is empty for all of a kind."""
    here = [c for c in couplings(model) if c.size > 1 and (kinds is None or c.kind in kinds)]
    missing = [kind for kind in kinds or () if not any(c.kind == kind for c in here)]
    if missing or not here:
        present = ", ".join(sorted({c.kind for c in couplings(model)}))
        what = ", ".join(missing) or "nothing"
        raise TargetError(f"kinds has {what} that this model could lose entries of: its kinds are {present}")
    groups: dict[tuple[str, str], list[Coupling]] = {}
    for coupling in here:
        layer = "" if by == "kind" else layer_of(coupling.name)
        groups.setdefault((coupling.kind, layer), []).append(coupling)
    return groups


def _in_step(model: nn.Module, group: Sequence[Coupling]) -> list[Coupling]:
    """Return couplings with those that the model's own Python lets shrink with them only."""
    named = {c.name: c for c in couplings(model)}
    found = {c.name: c for c in group}
    waiting = list(group)
    while waiting:
        for name in waiting.pop().in_step:
            if name in named and name not in found:
                found[name] = named[name]
                waiting.append(named[name])
    return list(found.values())


def layer_of(name: str) -> str:
    """Return the part of the name of a coupling up to the last position in a list; all of it where there is none.

    >>> layer_of("model.layers.3.mlp.glu")
    'model.layers.3'
    """
    match = re.match(r"(.*(?:^|\.)\d+)\.", name)
    return match[1] if match else name


def _gone(coupling: Coupling, share: float) -> int:
    """Return how many entries go; at least one stays."""
    return min(coupling.size - 1, round(share * coupling.size))


@torch.no_grad()
def _mean(measured: Loss, model: nn.Module, judges: Sequence[Any]) -> float:
    values = [value_of(measured, model, batch, number) for number, batch in enumerate(judges)]
    return math.fsum(values) / len(values)
