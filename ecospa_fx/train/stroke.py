"""Stroke: one shrink of `compress`, with statistics of its own, in room for those of a few layers.

batches -> gradients at every position -> the width of each coupling
        -> couplings in groups, those of the last layers first, as many as there is room for
        -> group by group: batches again -> moments of the inputs of its weights -> it shrinks

A layer that shrinks changes what later layers see, and no earlier one: so every group sees the activations of the whole
model, as if all shrank at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.compensate.absorbers import rooms
from ecospa_fx.compensate.forecast import forecast, removed_by, whole_worth, worth_of
from ecospa_fx.compensate.grams import Grams
from ecospa_fx.compensate.rotation import rotate
from ecospa_fx.couple.constraints import Constraints
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.model.lookup import couplings, regions_of
from ecospa_fx.model.observers import ignore, observe
from ecospa_fx.model.shrinking import shrink
from ecospa_fx.passes.graph.isolate import isolated
from ecospa_fx.passes.graph.tensors import parameters_of
from ecospa_fx.ranks.members import ranks_of
from ecospa_fx.score.estimator import CoupledEstimator
from ecospa_fx.score.saliency import Saliency

from .adaptive import AdaptiveSparsifier
from .measuring import backward_of, let_train, value_of, without_gradients
from .objective import Loss
from .settings import DecisionSettings

ROWS_WANTED = 8
"""Rows per column of the widest weight from which a regression on them is to be trusted."""

SHARE = 1 / 6
"""The moments that are held at once take no more than this share of the room of parameters, ..."""
LEAST = 1 << 26
"""... or so many bytes, if that is more: below that, time is worth more than room."""


class Stroke:
    """One shrink.

    Args:
        model: a compiled model.
        constraints: which sizes are allowed.
        settings: how far.
        scores: kind -> the score that its entries go by.

    Attributes:
        rises: coupling name -> expected rise of the loss.
        left: name of a weight that took over -> the share that nothing took over.
        notes: what was done otherwise, and why.
    """

    def __init__(
        self, model: nn.Module, constraints: Constraints, settings: DecisionSettings, scores: Mapping[str, str]
    ) -> None:
        self.model, self.constraints, self.settings, self.scores = model, constraints, settings, scores
        self.rises: dict[str, float] = {}
        self.left: dict[str, float] = {}
        self.notes: list[str] = []
        self._short: tuple[float, int] | None = None  # rows per column where there are fewest, and positions

    def run(self, calls: Sequence[Any], held: Collection[int], objective: Loss) -> None:
        """Shrink the model.

        Args:
            calls: batches.
            held: numbers of those that do not say what entries are worth.
            objective: the loss.
        """
        sparsifier = AdaptiveSparsifier.of(self.model, self.settings, self.constraints, ())
        saliency, order = Saliency(self.model), CallOrder(self.model)
        saliency.reader.begins, saliency.reader.wholes = True, self.constraints.min_keep == 0
        saliency.reader.computes_again = True
        others = {score: CoupledEstimator(self.model, score) for score in dict.fromkeys(self.scores.values())}
        summed = self._summed(others)
        try:
            with without_gradients(self.model), order.attached():
                for parameter in summed:
                    parameter.requires_grad_(True)
                for number, batch in enumerate(calls):
                    if number not in held:
                        self._read(saliency, others, order, batch, number, objective, summed)
                for parameter, gradient in summed.items():
                    parameter.grad = gradient
                for each in others.values():
                    if each.score.reads == "gradients":
                        each.accumulate()
                summed.clear()
                self.model.zero_grad(set_to_none=True)
        finally:
            for each in (saliency, *others.values()):
                each.detach()
        widths, wholes = self._widths(saliency, sparsifier)
        # Processes run each forward to its end: they may wait for each other in it.
        early = not ranks_of(self.model)
        for group, last in groups(self.model, widths, order.spans):
            with torch.no_grad(), Grams(self.model, couplings=group) as grams, order.attached():
                for number, batch in enumerate(calls):
                    until = last if early and number not in held else None
                    # A forward that is broken off may leave the model's own state half changed.
                    undone = nullcontext() if until is None else isolated(self.model)
                    with undone, order.counting(until):
                        value_of(objective, self.model, batch, number)
            self._shrink({name: widths[name] for name in group}, saliency, wholes, grams, others)
        if self._short is not None and self._short[0] < ROWS_WANTED:
            short, positions = self._short
            self.notes.append(
                f"{positions:,} positions are {short:.1f} per column of the widest weight, so weights were changed "
                f"little; {math.ceil(positions * ROWS_WANTED / short):,} would do"
            )

    def _summed(self, others: Mapping[str, CoupledEstimator]) -> dict[nn.Parameter, Tensor | None]:
        """Return the weights of whose gradients, added up over all batches, the scores of some kinds are made."""
        kinds = {kind for kind, name in self.scores.items() if others[name].score.reads == "gradients"}
        parameters = dict(parameters_of(self.model, remove_duplicate=False))
        of = (c for c in couplings(self.model) if c.kind in kinds and c not in self.constraints.frozen)
        return {parameters[m.parameter]: None for c in of for m in c.members if m.parameter in parameters}

    def _read(
        self, saliency: Saliency, others: Mapping[str, CoupledEstimator], order: CallOrder, batch: Any, number: int,
        objective: Loss, summed: dict[nn.Parameter, Tensor | None],
    ) -> None:  # fmt: skip
        """Read the gradients of a batch."""
        with order.counting():
            backward_of(objective, self.model, batch, number)
        saliency.accumulate()
        for parameter, before in summed.items():
            if parameter.grad is not None:
                summed[parameter] = parameter.grad if before is None else before.add_(parameter.grad)
        self.model.zero_grad(set_to_none=True)
        if not number and let_train(self.model, saliency, self.constraints.frozen):
            # What has no place in a graph is judged by gradients of weights: from the first batch on.
            for each in (saliency, *others.values()):
                each.reset()
            backward_of(objective, self.model, batch, number)
            saliency.accumulate()
            self.model.zero_grad(set_to_none=True)

    @property
    def _by_context(self) -> bool:
        return self.constraints.head_dims == "per_head"

    def _widths(self, saliency: Saliency, sparsifier: AdaptiveSparsifier) -> tuple[dict[str, int], dict[str, float]]:
        """Decide how many entries stay of each coupling; return also what all of one are worth, where that is known."""
        judged = [coupling for coupling in couplings(self.model) if saliency.judges(coupling)]
        names = [
            c.name for c in couplings(self.model) if c.size and c not in judged and c not in self.constraints.frozen
        ]
        if names:
            more = f" and {len(names) - 1} more stay" if names[1:] else " stays"
            self.notes.append(f"`{names[0]}`{more} whole: gradients say nothing of the loss without its entries")
        worth = {coupling: worth_of(coupling, saliency, by_context=self._by_context) for coupling in judged}
        wholes = whole_worth(judged, saliency)
        widths = sparsifier.widths(worth, sparsifier.target_size(sparsifier.sizes()), wholes)
        return {c.name: width for c, width in widths.items()}, {c.name: worth for c, worth in wholes.items()}

    def _shrink(
        self, names: Mapping[str, int], saliency: Saliency, wholes: Mapping[str, float], grams: Grams,
        others: Mapping[str, CoupledEstimator],
    ) -> None:  # fmt: skip
        """Shrink some couplings, by name, to a number of entries each."""
        widths = {c: names[c.name] for c in couplings(self.model) if c.name in names}
        curves = forecast(
            self.model, list(widths), saliency, grams=grams, absorb=True, rotate=True, by_context=self._by_context,
            widths=widths, order="saliency",
        ).curves  # fmt: skip
        for coupling in widths:
            score = self.scores.get(coupling.kind)
            if score is None:
                continue
            with others[score].at_once():
                curve = removed_by(coupling, saliency, others[score], by_context=self._by_context)
            if curve is None:
                self.notes.append(f"`{coupling.name}` goes by saliency: {score!r} says nothing of its entries")
            else:
                curves[coupling] = curve
        keeps = {coupling.name: curves[coupling].keep(width) for coupling, width in widths.items()}
        for c, width in widths.items():
            whole = not width and c.name in wholes
            self.rises[c.name] = wholes[c.name] if whole else float(curves[c].rises[c.size - width])
        linear = {c.name: width for c, width in widths.items() if curves[c].way == "rotated" and width}
        if linear:
            rotate(self.model, list(linear), keep=linear, grams=grams)
        shrink(
            self.model, keeps, absorb=grams, constraints=None if self.constraints.min_keep else Constraints(min_keep=0)
        )
        self.left |= {name: share for (name, _), share in grams.left.items()}
        short = grams.rows_per_column
        if short is not None and (self._short is None or short < self._short[0]):
            self._short = short, grams.positions


class Enough(BaseException):
    """The forward that is under way has shown all that was to be seen. No `except Exception` of a model's stops it."""


class CallOrder:
    """Notes in which order regions are called, and breaks a forward off where nothing more of it is needed.

    Args:
        model: a compiled model.

    Attributes:
        spans: region -> the numbers of its first and its last call, counted in each batch from 0; of those called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.spans: dict[str, tuple[int, int]] = {}
        self._count: int | None = None
        self._last: int | None = None
        self._observers = [(region, _CallsOf(name, self)) for name, region in regions_of(model).items()]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Observe the regions inside, after all who do so already."""
        for region, observer in self._observers:
            observe(region, observer)
        try:
            yield
        finally:
            for region, observer in self._observers:
                ignore(region, observer)

    @contextmanager
    def counting(self, until: int | None = None) -> Iterator[None]:
        """Count the calls inside.

        Args:
            until: number of the call after which the block is left; None: none.
        """
        self._count, self._last = 0, until
        try:
            yield
        except Enough:
            pass
        finally:
            self._count = self._last = None

    def note(self, name: str) -> bool:
        """Note a call of a region; return whether it is the last one that is needed."""
        if self._count is None:
            return False
        number, self._count = self._count, self._count + 1
        first, last = self.spans.get(name, (number, number))
        self.spans[name] = min(first, number), max(last, number)
        return number == self._last


class _CallsOf:
    """The observer of one region, which reads no values."""

    def __init__(self, name: str, order: CallOrder) -> None:
        self.name, self.order = name, order

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def wants(self, module: nn.Module) -> bool:
        return self.order.note(self.name)

    def nodes_of(self, *_: Any) -> tuple[list[Any], None]:
        return [], None

    def receive(self, *_: Any) -> None:
        raise Enough


def groups(
    model: nn.Module, names: Collection[str], spans: Mapping[str, tuple[int, int]]
) -> list[tuple[list[str], int | None]]:
    """Part couplings so that groups may shrink one after another, each by what the whole model does.

    Args:
        model: a compiled model.
        names: names of the couplings that shrink.
        spans: region -> the numbers of its first and its last call.

    Returns:
        Names by group, and the number of the last call that shows something of it; None: unknown. No region of a group
        is called before one of a later group; and the moments of a group take no more room than there is, unless
        couplings cannot be parted.
    """
    shrinking = [c for c in couplings(model) if c.name in names]
    alike: dict[int, list[str]] = {}  # a tied weight has several names
    for name, parameter in parameters_of(model, remove_duplicate=False):
        alike.setdefault(id(parameter), []).append(name)
    all_names = {name: each for each in alike.values() for name in each}
    regions = {c: _regions_of(c, spans, all_names) for c in shrinking}
    if any(each is None for each in regions.values()):
        return [([c.name for c in shrinking], None)] if shrinking else []
    calls = {c: [spans[name] for name in each] for c, each in regions.items() if each is not None}
    first = {c: min(begin for begin, _ in each) for c, each in calls.items()}
    last = {c: max(end for _, end in each) for c, each in calls.items()}
    needs = rooms(model)
    room = max(LEAST, SHARE * sum(p.numel() * p.element_size() for p in model.parameters()))
    parts: list[list[Coupling]] = []
    begin = 0  # the first call of the last part
    for c in sorted(shrinking, key=lambda c: last[c], reverse=True):
        if parts and last[c] >= begin:
            parts[-1].append(c)
            begin = min(begin, first[c])
        else:
            parts.append([c])
            begin = first[c]
    found: list[list[Coupling]] = []
    taken = 0.0
    for part in parts:
        needed = sum(needs[c.name] for c in part)
        if not found or taken + needed > room:
            found.append([])
            taken = 0.0
        found[-1] += part
        taken += needed
    return [([c.name for c in group], max(last[c] for c in group)) for group in found]


def _regions_of(
    coupling: Coupling, spans: Mapping[str, tuple[int, int]], names: Mapping[str, Sequence[str]]
) -> set[str] | None:
    """Return the regions that use a coupling's weights; None where one was not called."""
    found = set()
    for member in coupling.members:
        for name in names.get(member.parameter, (member.parameter,)):
            inside = [region for region in spans if not region or name.startswith(f"{region}.")]
            if not inside:
                return None
            found.add(max(inside, key=len))
    return found
