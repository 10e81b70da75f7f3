"""CoupledSparsifier: which entries of which couplings go at a sparsification step."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from .api import couplings, state_of
from .coupling import Coupling
from .errors import TargetError
from .estimator import index_scores
from .size import SizeModel


class CoupledSparsifier:
    """The rule of the paper (arXiv 2511.11641): the least important couplings lose their weakest aligned slices.

    At a step the `top_k` share of couplings with the least importance is taken. In each, entries are kept from the
    strongest down until they hold `theta` of the total score; the rest goes. Nothing goes past the target.

    Args:
        model: a compiled model that has been called.
        target: share of the model's original parameters that remains.
        top_k: share of the couplings that shrink at a step.
        theta: share of a coupling's score that is kept.
        min_keep: entries that every coupling keeps.

    Raises:
        TargetError: a setting is out of range, or the target is below what can be reached.
    """

    def __init__(
        self, model: nn.Module, *, target: float = 0.5, top_k: float = 0.3, theta: float = 0.9, min_keep: int = 1
    ) -> None:
        check_settings(target=target, top_k=top_k, theta=theta, min_keep=min_keep)
        self.model, self.top_k, self.theta, self.min_keep = model, top_k, theta, min_keep
        sizes = SizeModel(model, state_of(model))
        self.target_size = math.ceil(target * sizes.original)
        floor = sizes.total({name: min(size, min_keep) for name, size in sizes.sizes.items()})
        if self.target_size < floor:
            raise TargetError(
                f"target={target:g} of {sizes.original:,} parameters is {self.target_size:,}, but the couplings reach "
                f"down to {floor:,} only; the smallest reachable target is "
                f"{math.ceil(1000 * floor / sizes.original) / 1000:g} with min_keep={min_keep}"
            )

    def decide(self, importance: Mapping[Coupling, float], at_most: int | None = None) -> dict[Coupling, Tensor]:
        """What to keep of which couplings.

        Args:
            importance: of every coupling, see `CoupledEstimator`.
            at_most: parameters that may be left after this step, where a schedule must keep up. Where the paper's rule
                leaves more, more couplings take part, then theta gives way. Without it, they do so where the rule
                would remove nothing at all, as it does in small couplings whose entries are about equal.

        Returns:
            Coupling -> sorted LongTensor of the entries to keep, for those that shrink; what `ecospa_fx.shrink` takes.
        """
        sizes = SizeModel(self.model, state_of(self.model))
        order = sorted(couplings(self.model), key=lambda coupling: (importance[coupling], coupling.name))
        scores = {coupling: index_scores(self.model, coupling) for coupling in order}
        # Score held by the strongest entry, by the two strongest, and so on.
        held = {coupling: score.sort(descending=True).values.cumsum(0) for coupling, score in scores.items()}
        count = max(1, math.ceil(self.top_k * len(order)))
        keeps = self._by_theta(order[:count], held, self.theta)
        while count < len(order) and not self._enough(keeps, sizes, at_most):
            keeps |= self._by_theta(order[count : count + 1], held, self.theta)
            count += 1
        if not self._enough(keeps, sizes, at_most):
            keeps = self._by_theta(order, held, self._looser(order, held, sizes, at_most))
        keeps = self._stop_at_target(order, keeps, sizes)
        left = sizes.total(_named(keeps))
        stuck = left == sizes.total({}) if at_most is None else at_most <= self.target_size
        if left > self.target_size and stuck:
            # What is left to remove is less than what these couplings remove at a time: smaller ones may still fit.
            floors = {coupling: min(self.min_keep, coupling.size) for coupling in order}
            keeps = self._stop_at_target(order, floors, sizes, keeps)
        return {
            coupling: scores[coupling].argsort(descending=True, stable=True)[:keep].sort().values
            for coupling, keep in keeps.items()
            if keep < coupling.size
        }

    def reached(self) -> bool:
        """Whether no coupling can lose another entry without passing the target."""
        sizes = SizeModel(self.model, state_of(self.model))
        smallest = (
            sizes.total({coupling.name: coupling.size - 1})
            for coupling in couplings(self.model)
            if coupling.size > self.min_keep
        )
        return sizes.total({}) <= self.target_size or all(total < self.target_size for total in smallest)

    def _enough(self, keeps: Mapping[Coupling, int], sizes: SizeModel, at_most: int | None) -> bool:
        """Whether a step that keeps so much keeps up with the schedule, or at least removes something."""
        now, after = sizes.total({}), sizes.total(_named(keeps))
        return after <= at_most if at_most is not None else after < now

    def _by_theta(self, order: list[Coupling], held: Mapping[Coupling, Tensor], theta: float) -> dict[Coupling, int]:
        return {c: max(_entries_holding(theta, held[c]), min(self.min_keep, c.size)) for c in order}

    def _looser(
        self, order: list[Coupling], held: Mapping[Coupling, Tensor], sizes: SizeModel, at_most: int | None
    ) -> float:
        """The largest theta at which all couplings together remove enough."""
        low, high = 0.0, self.theta
        for _ in range(30):
            middle = (low + high) / 2
            if self._enough(self._by_theta(order, held, middle), sizes, at_most):
                low = middle
            else:
                high = middle
        return low

    def _stop_at_target(
        self,
        order: list[Coupling],
        keeps: Mapping[Coupling, int],
        sizes: SizeModel,
        already: Mapping[Coupling, int] | None = None,
    ) -> dict[Coupling, int]:
        """Apply `keeps` from the least important coupling on, as far as the target allows.

        Where one would pass the target it gives as many entries as still fit, and the next ones try for the rest.
        """
        taken = dict(already or {})
        for coupling in order:
            if coupling not in keeps:
                continue
            low, high = keeps[coupling], taken.get(coupling, coupling.size)  # the fewest wished for; surely allowed
            while low < high:
                middle = (low + high) // 2
                if sizes.total({**_named(taken), coupling.name: middle}) >= self.target_size:
                    high = middle
                else:
                    low = middle + 1
            taken[coupling] = high
        return taken


def _entries_holding(theta: float, held: Tensor) -> int:
    """The size of the smallest set of entries that holds `theta` of the total score, from the running sums `held`."""
    if not float(held[-1]) > 0:
        return len(held)
    return int((held < theta * held[-1] * (1 - 1e-12)).sum()) + 1


def _named(keeps: Mapping[Coupling, int]) -> dict[str, int]:
    return {coupling.name: keep for coupling, keep in keeps.items()}


def check_settings(*, target: float, top_k: float, theta: float, min_keep: int) -> None:
    """Refuse settings out of range.

    Raises:
        TargetError: naming the setting, its value and the range.
    """
    for name, value in (("target", target), ("top_k", top_k), ("theta", theta)):
        if not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise TargetError(f"{name}={value!r} is out of range; it is a share, above 0 and at most 1")
    if not isinstance(min_keep, int) or min_keep < 1:
        raise TargetError(f"min_keep={min_keep!r} is out of range; every coupling keeps at least 1 entry")
