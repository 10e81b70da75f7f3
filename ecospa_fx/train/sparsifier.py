"""CoupledSparsifier: the paper's choice of the entries that go at a sparsification step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.arguments import FUNCTION, MAPPING, MODULE, NUMBER, SEVERAL, instance, optional, takes
from ecospa_fx.couple.constraints import Constraints
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.couple.ties import TiedCouplings
from ecospa_fx.errors import TargetError
from ecospa_fx.model.cost import Cost, CostModel
from ecospa_fx.model.lookup import couplings, state_of
from ecospa_fx.model.outside import beyond
from ecospa_fx.model.own_memory import held_together
from ecospa_fx.ranks.members import ranks_of
from ecospa_fx.ranks.wrappers import unwrapped
from ecospa_fx.score.judging import index_scores, squares_of_shards

from .latency import Latency, LatencyModel
from .settings import Among, DecisionSettings
from .targets import AnyCost, EntryCounts, Target, grouped


class EntryScores(Protocol):
    """A function that scores the entries of a coupling."""

    def __call__(self, coupling: Coupling, *, by_context: bool = False) -> Tensor:
        """Score each entry, float64 `[size]`, or `[contexts, size]`."""


class CoupledSparsifier:
    """The rule of the paper (arXiv 2511.11641): the least important couplings lose their weakest aligned slices.

    At a step the `top_k` share of couplings with the least importance is taken. In each, entries are kept from the
    strongest down until they hold `theta` of the total score; the rest goes. Nothing goes past the target. Where heads
    may keep other dims each keeps its own strongest, as many in each head, and `theta` is of the score of all.

    Args:
        model: a compiled model that has been called.
        target: share of the model's original cost that remains; or kinds, or patterns of names of couplings, with the
            share of their entries that remains, see `EcoSpaTrainer`.
        top_k: share of the couplings that shrink at a step.
        theta: share of a coupling's score that is kept.
        constraints: which sizes are allowed, and what must stay whole.
        cost: what `target` is a share of: `"parameters"`, `"flops"` or `"bytes"`, see `CostModel`; or a `Latency`.
        among: `"all"`, or `"prunable"`: the share is of what lies on some coupling; embeddings, say, do not count.
        optimizers: whose state counts in `"bytes"`.
        entries: `entries(coupling, by_context=...)` -> score of each entry, as `index_scores`, which it is by default,
            and `CoupledEstimator.entries` give it.

    Attributes:
        whole: name of each coupling that may not shrink -> the reason.

    Raises:
        TargetError: a setting is out of range, or the target is below what can be reached.
    """

    @takes(
        model=MODULE,
        constraints=optional(instance("an ecospa_fx.Constraints", Constraints)),
        optimizers=SEVERAL,
        entries=optional(FUNCTION),
    )
    def __init__(
        self,
        model: nn.Module,
        *,
        target: Target = 0.5,
        top_k: float = 0.3,
        theta: float = 0.9,
        constraints: Constraints | None = None,
        cost: Cost | Latency = "parameters",
        among: Among = "all",
        optimizers: Sequence[Optimizer] = (),
        entries: EntryScores | None = None,
    ) -> None:
        DecisionSettings(target, cost, among, top_k, theta).check()
        self.model, self.target, self.top_k, self.theta = unwrapped(model), target, top_k, theta
        self.cost, self.among, self.optimizers = cost, among, tuple(optimizers)
        self.constraints = constraints or Constraints()
        self.entries = entries
        self.parts: dict[str, CoupledSparsifier] = {}
        self.only: tuple[str, Collection[str]] | None = None
        self.whole: dict[str, str] = {}
        if isinstance(target, Mapping):
            self._divide(target)
            return
        self.measure()
        self._check_reach()

    def _divide(self, target: Mapping[str, float]) -> None:
        """Make a sparsifier of each key of a target, which decides about its couplings alone."""
        here = couplings(self.model)
        groups = grouped(target, here)
        named = {c.name for group in groups.values() for c in group}
        self.whole = {c.name: "the target does not name it" for c in here if c.name not in named}
        for key, group in groups.items():
            part = self.parts[key] = object.__new__(type(self))
            part.__dict__ |= {**self.__dict__, "parts": {}, "whole": {}, "target": target[key]}
            part.only = key, frozenset(c.name for c in group)
            part._check_reach()
            self.whole |= {name: why for name, why in part.whole.items() if name in part.only[1]}

    def _check_reach(self) -> None:
        """Refuse a target that the constraints do not allow.

        Raises:
            TargetError: with the smallest one that they do.
        """
        cost, among, model, target = self.cost, self.among, self.model, self._share_left
        sizes = self.sizes()
        units = self._units()
        floor = sizes.total(named_sizes(units, {unit: unit.sizes[0] for unit in units}))
        owed = sizes.total(named_sizes(*_owed(units)))
        if owed < self.target_size(sizes) < sizes.total({}):
            first = next(unit for unit in units if unit.due)
            raise TargetError(
                f"target={target:g} is {self.target_size(sizes):,}, and the sizes that the constraints allow begin at "
                f"{owed:,}: `{first.name}` has {first.couplings[0].size} and may have {first.sizes[-1]}; choose "
                "a smaller target, or loosen multiple_of"
            )
        if self.target_size(sizes) < floor:
            base = sizes.original if among == "all" else sizes.prunable
            least = _share(1 - (sizes.original - floor) / base)
            limits = [f"min_keep={self.constraints.min_keep}"]
            limits += [f"round_to={self.constraints.round_to}"] if self.constraints.round_to > 1 else []
            limits += [f"uniform={self.constraints.uniform!r}"] if self.constraints.uniform else []
            limits += [f"multiple_of={dict(self.constraints.multiple_of)!r}"] if self.constraints.multiple_of else []
            limits += [f"{len(self.whole)} couplings that stay whole"] if self.whole else []
            shared = [coupling.parts for coupling in couplings(model) if coupling.parts > 1]
            limits += [f"{len(shared)} couplings that {max(shared)} ranks share out"] if shared else []
            state, together = state_of(model), held_together(model)
            of = f"{sizes.original:,} {'ns' if isinstance(cost, Latency) else cost}"
            of = of if self.only is None else f"{sizes.original:,} entries of {self.only[0]!r}"
            of = of if among == "all" else f"the {base:,} prunable ones of {of}"
            raise TargetError(
                f"target={target:g} of {of} is {self.target_size(sizes):,}, but the couplings reach "
                f"down to {floor:,} only; the smallest reachable target is {least:g} with "
                f"{', '.join(limits)}{beyond(model, state.regions, state.not_captured)}{together and '. '}{together}"
            )

    @classmethod
    def of(
        cls,
        model: nn.Module,
        settings: DecisionSettings,
        constraints: Constraints,
        optimizers: Sequence[Optimizer],
        entries: EntryScores | None = None,
    ) -> Self:
        """Make a sparsifier from the settings of a trainer."""
        return cls(
            model, target=settings.target, top_k=settings.top_k, theta=settings.theta, constraints=constraints,
            cost=settings.cost, among=settings.among, optimizers=optimizers, entries=entries,
        )  # fmt: skip

    def sizes(self) -> AnyCost:
        """Return the cost of the model, now and at other widths; of a target by kinds, the entries that it names."""
        if self.parts or self.only is not None:
            names = self.only[1] if self.only is not None else {n for p in self.parts.values() for n in p.names}
            return EntryCounts([c for c in couplings(self.model) if c.name in names])
        if isinstance(self.cost, Latency):
            return LatencyModel(self._flops(), self.cost, couplings(self.model))
        return CostModel(self.model, state_of(self.model), self.cost, self.optimizers)

    def _flops(self) -> CostModel:
        return CostModel(self.model, state_of(self.model), "flops")

    def measure(self) -> None:
        """Measure the cost of the model as it is now, if it is one that must be measured; the first rank's counts."""
        if isinstance(self.cost, Latency) and not self.parts:
            latency, now, ranks = self.cost, self._flops(), ranks_of(self.model)
            ranks.together("measure the latency", lambda: latency.observe(self.model, now, self.constraints))
            latency.take(ranks.first(latency.readings(), "the latency"))

    @takes(sizes=instance("what sizes() returns", CostModel, LatencyModel, EntryCounts))
    def target_size(self, sizes: AnyCost) -> int:
        """Return the cost that remains at the target."""
        if self.parts:
            return sum(part.target_size(part.sizes()) for part in self.parts.values())
        whole = 0 if self.among == "all" else sizes.original - sizes.prunable
        return whole + math.ceil(self._share_left * (sizes.original - whole))

    def _units(self) -> list[TiedCouplings]:
        units, self.whole = self.constraints.units(self.model, couplings(self.model))
        if isinstance(self.cost, Latency):
            units, slower = self.cost.units(units)
            self.whole |= slower
        if self.only is None:
            return units
        key, names = self.only
        for unit in units:
            inside = [c for c in unit.couplings if c.name in names]
            if inside and len(inside) < len(unit.couplings):
                other = next(c for c in unit.couplings if c.name not in names)
                raise TargetError(
                    f"`{inside[0].name}` and `{other.name}` shrink together, and target[{key!r}] is of the first only: "
                    "name both by one key, a pattern that fits them"
                )
        return [unit for unit in units if unit.couplings[0].name in names]

    @property
    def names(self) -> Collection[str]:
        """Names of the couplings that it decides about, where that is a part of them."""
        return self.only[1] if self.only is not None else ()

    @property
    def _share_left(self) -> float:
        assert not isinstance(self.target, Mapping)
        return self.target

    def _due(self, cost: int | None, part: CoupledSparsifier) -> int | None:
        """Return the cost that a part may have, or should have, when all of it is `cost`: as far on its way."""
        if cost is None:
            return None
        sizes, own = self.sizes(), part.sizes()
        now, way = own.total({}), sizes.total({}) - self.target_size(sizes)
        share = min(1.0, max(0.0, (sizes.total({}) - cost) / way)) if way > 0 else 1.0
        return round(now - share * (now - part.target_size(own)))

    @takes(importance=MAPPING, at_most=optional(NUMBER), at_least=optional(NUMBER))
    def decide(
        self, importance: Mapping[Coupling, float], at_most: int | None = None, at_least: int | None = None
    ) -> dict[Coupling, Tensor]:
        """Decide which entries to keep.

        Args:
            importance: of every coupling, see `CoupledEstimator`; a coupling that is not in it stays as it is.
            at_most: the cost that the model may have after this step, if a schedule sets it. If the paper's rule leaves
                more, more couplings take part, then theta is lowered. None: this happens only if the rule would remove
                nothing at all, as it does in small couplings whose entries are about equal.
            at_least: the cost that the model should have after this step at least. If the paper's rule leaves less, as
                it does where few entries hold most of the score, theta is raised.

        Returns:
            Coupling -> sorted LongTensor of the entries to keep, `[kept]` or `[contexts, kept]`, for those that shrink;
            what `ecospa_fx.shrink` takes.
        """
        if self.parts:
            return {
                coupling: keep
                for part in self.parts.values()
                for coupling, keep in part.decide(
                    importance, self._due(at_most, part), self._due(at_least, part)
                ).items()
            }
        sizes = self.sizes()
        judged = [unit for unit in self._units() if all(c in importance for c in unit.couplings)]
        order = sorted(judged, key=lambda unit: (_mean(importance[c] for c in unit.couplings), unit.name))
        scores = self._scores([c for unit in order for c in unit.couplings])
        # Score of the strongest entry, of the two strongest, and so on, over all contexts.
        running = {c: score.sort(dim=-1, descending=True).values.sum(0).cumsum(0) for c, score in scores.items()}
        count = max(1, math.ceil(self.top_k * len(order)))
        owed = _owed(order)[1]
        keeps = owed | self._by_theta(order[:count], running, self.theta)
        while count < len(order) and not self._enough(keeps, sizes, at_most):
            keeps |= self._by_theta(order[count : count + 1], running, self.theta)
            count += 1
        if not self._enough(keeps, sizes, at_most):
            keeps = self._by_theta(order, running, self._largest_theta(order, running, sizes, at_most, 0.0))
        elif at_least is not None and sizes.total(named_sizes(keeps, keeps)) < at_least:
            first = order[:count]
            keeps = owed | self._by_theta(first, running, self._largest_theta(first, running, sizes, at_least))
        if at_least is not None:
            keeps = self._give_back([unit for unit in order if unit in keeps], keeps, sizes, at_least, owed)
        keeps = self._stop_at_target(order, keeps, sizes, owed)
        left = sizes.total(named_sizes(keeps, keeps))
        stuck = left == sizes.total({}) if at_most is None else at_most <= self.target_size(sizes)
        if left > self.target_size(sizes) and stuck:
            # The rest to be removed is less than one entry of these couplings; smaller ones may still fit.
            keeps = self._stop_at_target(order, {unit: unit.sizes[0] for unit in order}, sizes, keeps)
        return {
            coupling: _strongest(scores[coupling], keep)
            for unit, size in keeps.items()
            for coupling, keep in unit.keeps(size).items()
            if keep < coupling.size
        }

    def reached(self) -> bool:
        """Return whether no coupling can lose another entry without passing the target."""
        if self.parts:
            return all(part.reached() for part in self.parts.values())
        sizes, shrinkable = self.sizes(), self.shrinkable()
        if any(unit.due for unit in shrinkable):
            return False
        below = [(unit, unit.below) for unit in shrinkable]
        smallest = (sizes.total(named_sizes([u], {u: size})) for u, size in below if size is not None)
        return sizes.total({}) <= self.target_size(sizes) or all(total < self.target_size(sizes) for total in smallest)

    def shrinkable(self) -> list[TiedCouplings]:
        """Return the couplings that can lose another entry, target aside, those that shrink together as one."""
        if self.parts:
            return [unit for part in self.parts.values() for unit in part.shrinkable()]
        return [unit for unit in self._units() if unit.below is not None]

    def _scores(self, judged: Sequence[Coupling]) -> dict[Coupling, Tensor]:
        """Score the entries of couplings, `[contexts, size]`; one row where all contexts keep the same."""
        entries = self.entries
        if entries is None:  # sharded weights of all couplings are summed up over ranks at once
            squares = squares_of_shards(self.model, judged)
            entries = partial(index_scores, self.model, squares_known=squares)
        found = {}
        for coupling in judged:
            by_context = coupling.context is not None and self.constraints.head_dims == "per_head"
            scores = entries(coupling, by_context=by_context)
            found[coupling] = scores if by_context else scores[None]
        return found

    def _enough(self, keeps: Mapping[TiedCouplings, int], sizes: AnyCost, at_most: int | None) -> bool:
        """Return whether a step keeps up with the schedule, or, without one, removes something."""
        now, after = sizes.total({}), sizes.total(named_sizes(keeps, keeps))
        return after <= at_most if at_most is not None else after < now

    def _by_theta(
        self, order: list[TiedCouplings], running: Mapping[Coupling, Tensor], theta: float
    ) -> dict[TiedCouplings, int]:
        """Return the least allowed size of each unit at which its couplings keep `theta` of their score, on average."""
        return {unit: unit.sizes[_first_with(theta, unit, running)] for unit in order}

    def _largest_theta(
        self,
        order: list[TiedCouplings],
        running: Mapping[Coupling, Tensor],
        sizes: AnyCost,
        at_most: int | None,
        enough: float | None = None,
    ) -> float:
        """Find the largest theta at which these couplings together remove enough.

        Args:
            order: the couplings.
            running: scores of the strongest entries, added up.
            sizes: the cost.
            at_most: see `decide`.
            enough: a theta that is low enough; by default that of the rule, and then the result is above it.
        """
        low, high = (self.theta, 1.0) if enough is None else (enough, self.theta)
        for _ in range(30):
            middle = (low + high) / 2
            if self._enough(self._by_theta(order, running, middle), sizes, at_most):
                low = middle
            else:
                high = middle
        return low

    def _give_back(
        self,
        order: list[TiedCouplings],
        keeps: Mapping[TiedCouplings, int],
        sizes: AnyCost,
        enough: int,
        owed: Mapping[TiedCouplings, int],
    ) -> dict[TiedCouplings, int]:
        """Give entries back to the most important units first, as long as the cost does not rise above `enough`."""
        taken = dict(keeps)
        for unit in reversed(order):
            low, high = unit.sizes.index(taken[unit]), unit.sizes.index(owed.get(unit, unit.sizes[-1]))
            while low < high:
                middle = (low + high + 1) // 2
                trial = {**taken, unit: unit.sizes[middle]}
                if sizes.total(named_sizes(trial, trial)) <= enough:
                    low = middle
                else:
                    high = middle - 1
            taken[unit] = unit.sizes[low]
        return taken

    def _stop_at_target(
        self,
        order: list[TiedCouplings],
        keeps: Mapping[TiedCouplings, int],
        sizes: AnyCost,
        already: Mapping[TiedCouplings, int] | None = None,
    ) -> dict[TiedCouplings, int]:
        """Take units to the sizes in `keeps`, the least important first, as far as the target allows.

        One that would pass the target gives as many entries as still fit, and the next ones give the rest.
        """
        taken = dict(already or {})
        for unit in order:
            if unit not in keeps:
                continue
            # Positions among the allowed sizes: the size asked for, and one that is allowed for sure.
            low, high = unit.sizes.index(keeps[unit]), unit.sizes.index(taken.get(unit, unit.sizes[-1]))
            while low < high:
                middle = (low + high) // 2
                trial = {**taken, unit: unit.sizes[middle]}
                if sizes.total(named_sizes(trial, trial)) >= self.target_size(sizes):
                    high = middle
                else:
                    low = middle + 1
            taken[unit] = unit.sizes[high]
        return taken


def _strongest(scores: Tensor, keep: int) -> Tensor:
    """Return the sorted positions of the strongest entries of each row; of a single row without the row dim."""
    positions = scores.argsort(dim=-1, descending=True, stable=True)[:, :keep].sort(dim=-1).values
    return positions[0] if len(positions) == 1 else positions


def _first_with(theta: float, unit: TiedCouplings, running: Mapping[Coupling, Tensor]) -> int:
    """Return the position of the least allowed size with `theta` of the score, from running sums; else of the last."""

    def share(size: int) -> float:
        return _mean(
            float(running[c][keep - 1] / running[c][-1]) if keep and float(running[c][-1]) > 0 else 0.0
            for c, keep in unit.keeps(size).items()
        )

    low, high = 0, len(unit.sizes) - 1
    while low < high:
        middle = (low + high) // 2
        if share(unit.sizes[middle]) >= theta * (1 - 1e-12):
            high = middle
        else:
            low = middle + 1
    return high


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def reachable(
    model: nn.Module, settings: DecisionSettings, constraints: Constraints, optimizers: Sequence[Optimizer]
) -> float:
    """Return the smallest target that constraints allow."""
    open_ended = CoupledSparsifier.of(model, replace(settings, target=1.0), constraints, optimizers)
    sizes, units = open_ended.sizes(), open_ended.shrinkable()
    base = sizes.original if settings.among == "all" else sizes.prunable
    floor = sizes.total(named_sizes(units, {unit: unit.sizes[0] for unit in units}))
    return _share(1 - (sizes.original - floor) / base)


def _share(exact: float) -> float:
    """Round a target up, so that it can be reached."""
    return math.ceil(1000 * exact) / 1000


def named_sizes(units: Iterable[TiedCouplings], sizes: Mapping[TiedCouplings, int]) -> dict[str, int]:
    """Return entries by coupling name, as `CostModel.total` takes them."""
    return {c.name: keep for unit in units for c, keep in unit.keeps(sizes[unit]).items()}


def _owed(units: Sequence[TiedCouplings]) -> tuple[list[TiedCouplings], dict[TiedCouplings, int]]:
    """Return the units whose sizes of now are not allowed, and the sizes that they must go down to at least."""
    due = [unit for unit in units if unit.due]
    return due, {unit: unit.sizes[-1] for unit in due}
