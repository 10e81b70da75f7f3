"""Forecast: the expected rise of the loss with each entry that goes, coupling by coupling.

saliency of each entry alone                                     in the unit of the loss, see `score/saliency.py`
  x squares lost if other entries take over / squares lost alone of outputs, see `transform/eliminate.py`
                                                                 of a product of activations: `transform/rotate.py`
-> a Curve per coupling: the order in which entries go, and the cost of each
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.model.compiled import CompiledModel
from ecospa_fx.model.lookup import state_of
from ecospa_fx.passes.transform.eliminate import eliminate
from ecospa_fx.score.estimator import CoupledEstimator
from ecospa_fx.score.saliency import Saliency
from ecospa_fx.text import plain

from .grams import Grams
from .rotation import free_basis

LIMITS = (0.001, 0.01, 0.1)
"""Expected rises of the loss for which the table shows how many entries can go."""

Way = Literal["rotated", "absorbed", "removed"]
EntryOrder = Literal["elimination", "saliency"]


@dataclass(frozen=True, eq=False)
class Curve:
    """The cost of a coupling's entries in the order in which they go.

    Attributes:
        way: how they go: as the last entries of another basis, `"rotated"`; with others that take over, `"absorbed"`;
            or neither, `"removed"`.
        order: LongTensor `[contexts, size]`, the entry that goes first, then the next; one row if all contexts lose the
            same. In the new basis if rotated.
        cost: float64 `[size]`, the expected rise of the loss with each of them, over all contexts.
    """

    way: Way
    order: Tensor
    cost: Tensor

    def keep(self, count: int) -> Tensor:
        """Return the `count` entries that stay, sorted: `[count]`, or `[contexts, count]`."""
        kept = self.order[:, self.order.shape[1] - count :].sort(-1).values
        return kept[0] if len(kept) == 1 else kept

    @property
    def rises(self) -> Tensor:
        """The expected rise of the loss by number of entries gone: float64 `[size + 1]`."""
        return _running(self.cost)


@dataclass(frozen=True, eq=False)
class Forecast:
    """The expected rise of the loss as entries go.

    Attributes:
        curves: coupling -> its curve.
        positions: factor that brings the costs of a curve to the unit of the loss; None if it is unknown: then they can
            only be compared.
    """

    curves: dict[Coupling, Curve]
    positions: float | None

    def rises(self, removed: Mapping[str, int]) -> dict[str, float]:
        """Return the expected rise of the loss with so many entries gone, by coupling name."""
        unit = 1.0 if self.positions is None else self.positions
        named = {coupling.name: curve for coupling, curve in self.curves.items()}
        return {name: unit * float(named[name].rises[count]) for name, count in removed.items()}

    def by_kind(self) -> dict[str, Tensor]:
        """Return for each kind the expected rise of the loss by number of entries gone, the cheapest first."""
        costs: dict[str, list[Tensor]] = {}
        for coupling, curve in self.curves.items():
            costs.setdefault(coupling.kind, []).append(curve.cost)
        unit = 1.0 if self.positions is None else self.positions
        merged = {kind: torch.cat(each).sort().values for kind, each in costs.items()}
        return {kind: unit * _running(cost) for kind, cost in merged.items()}

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, show_edge=False)
        for name in ("kind", "couplings", "entries", "way"):
            table.add_column(name, justify="left" if name in ("kind", "way") else "right")
        rises = self.by_kind()
        for limit in LIMITS:
            table.add_column(f"can go at {limit:g}", justify="right")
        for kind, rise in rises.items():
            ways_of = [curve.way for coupling, curve in self.curves.items() if coupling.kind == kind]
            ways = ", ".join(dict.fromkeys(ways_of))
            entries = len(rise) - 1
            # Limits of the loss if the costs are in its unit, else shares of the total cost of this kind.
            unit = 1.0 if self.positions is not None else float(rise[-1])
            gone = [int((rise <= limit * unit).sum()) - 1 for limit in LIMITS]
            table.add_row(kind, str(len(ways_of)), str(entries), ways, *(f"{count / entries:.0%}" for count in gone))
        return table

    def __str__(self) -> str:
        return plain(self.__rich__())


def forecast(
    model: nn.Module,
    couplings: Iterable[Coupling],
    saliency: Saliency,
    *,
    grams: Grams | None = None,
    optimizers: Sequence[Optimizer] = (),
    absorb: bool = False,
    rotate: bool = False,
    by_context: bool = True,
    widths: Mapping[Coupling, int] | None = None,
    positions: float | None = None,
    order: EntryOrder = "elimination",
) -> Forecast:
    """Compute a curve for each coupling.

    Args:
        model: a compiled model.
        couplings: the couplings.
        saliency: the worth of each entry alone.
        grams: moments of the inputs of weights; without them nothing takes over.
        optimizers: optimizers whose state must follow a change of basis.
        absorb: entries that stay will take over.
        rotate: another basis will be taken if it is free.
        by_context: entries of each context on their own.
        widths: number of entries that will stay; down to it the order is exact, beyond it the cost is underestimated.
            One by default.
        positions: positions over which the loss of a training step is a mean.
        order: of entries that others take over: by what is lost then, or by what each is worth alone. The latter takes
            no time, and its costs are an upper bound.
    """
    curves: dict[Coupling, Curve] = {}
    state: CompiledModel | None = None  # read once: that takes a while
    for coupling in couplings:
        alone, curve = _alone(coupling, saliency, by_context), None
        if widths is not None and widths.get(coupling) == 0:  # nothing is left that could take over
            curves[coupling] = _removed(alone)
            continue
        if rotate and coupling.linear:
            state = state or state_of(model)
            curve = _rotated(model, state, coupling, grams, optimizers, alone)
        if curve is None and absorb and grams is not None:
            least = 1 if widths is None else widths.get(coupling, coupling.size)
            curve = _absorbed(coupling, grams, alone, least, order)
        curves[coupling] = curve or _removed(alone)
    return Forecast(curves, positions)


def worth_of(coupling: Coupling, saliency: Saliency, *, by_context: bool = True) -> Tensor:
    """Return the rise of the loss by the cheapest entry, by the next, and so on, without compensation: `[size]`."""
    return _removed(_alone(coupling, saliency, by_context)).cost


def whole_worth(couplings: Iterable[Coupling], saliency: Saliency) -> dict[Coupling, float]:
    """Return the rise of the loss without any entry of a coupling, in the unit of `worth_of`, where it is known."""
    found = {coupling: saliency.whole(coupling) for coupling in couplings if coupling.last_stays is None}
    return {coupling: worth / 2 for coupling, worth in found.items() if worth is not None}


def removed_by(
    coupling: Coupling, saliency: Saliency, scores: CoupledEstimator, *, by_context: bool = True
) -> Curve | None:
    """Return the curve of entries that go in the order of other scores, at the costs by saliency; None without scores.

    Args:
        coupling: the coupling.
        saliency: the worth of each entry alone.
        scores: which entries go first.
        by_context: entries of each context on their own.
    """
    if scores.reader.importance(coupling) is None:
        return None
    alone = _alone(coupling, saliency, by_context)
    order = scores.entries(coupling, by_context=len(alone) > 1).view(alone.shape).argsort(dim=-1, stable=True)
    return Curve("removed", order, alone.gather(-1, order).sum(0) / 2)


def _running(cost: Tensor) -> Tensor:
    return torch.cat([cost.new_zeros(1), cost.cumsum(0)])


def _alone(coupling: Coupling, saliency: Saliency, by_context: bool) -> Tensor:
    """Return the saliency of the entries, `[contexts, size]`, in one row if all contexts lose the same."""
    alone = saliency.entries(coupling, by_context=by_context and coupling.context is not None)
    return alone if alone.ndim == 2 else alone[None]


def _removed(alone: Tensor) -> Curve:
    cost, order = alone.sort(dim=-1, stable=True)
    return Curve("removed", order, cost.sum(0) / 2)


def _rotated(
    model: nn.Module,
    state: CompiledModel,
    coupling: Coupling,
    grams: Grams | None,
    optimizers: Sequence[Optimizer],
    alone: Tensor,
) -> Curve | None:
    basis = free_basis(model, state, coupling, grams, optimizers)
    if isinstance(basis, str):
        return None
    carried = basis.change.energy.square().cpu().flip(-1)
    scale = float(alone.sum()) / max(float(basis.alone.sum()), 1e-300)
    order = torch.arange(coupling.size).flip(0)[None]
    return Curve("rotated", order, scale * carried.sum(0) / 2)


def _absorbed(coupling: Coupling, grams: Grams, alone: Tensor, at_least: int, order: EntryOrder) -> Curve | None:
    summing = grams.summing(coupling)
    if summing is None:
        return None
    if order == "saliency":
        return replace(_removed(alone), way="absorbed")
    if len(alone) == 1 and coupling.context is not None and coupling.contexts > 1:
        return None
    elimination = eliminate(
        summing, len(alone), coupling.size, ridge=1.0 if grams.ridge is None else grams.ridge, at_least=at_least
    )
    if elimination is None:
        return None
    scale = float(alone.sum()) / max(float(elimination.alone.sum()), 1e-300)
    return Curve("absorbed", elimination.order, scale * elimination.cost.sum(0) / 2)
