"""Policies: the rules that decide which entries of which couplings go at a sparsification step.

Paper       scores -> the least important couplings lose their weakest slices       `CoupledSparsifier`
Adaptive    saliency, and how far others take over -> expected rise of the loss     `AdaptiveSparsifier`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.compensate.compensation import Compensation
from ecospa_fx.compensate.forecast import EntryOrder, Forecast, forecast, whole_worth, worth_of
from ecospa_fx.couple.constraints import Constraints
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import TargetError
from ecospa_fx.model.lookup import couplings
from ecospa_fx.ranks.members import ranks_of
from ecospa_fx.score.estimator import CoupledEstimator
from ecospa_fx.score.judging import index_scores
from ecospa_fx.score.saliency import Saliency

from .adaptive import AdaptiveSparsifier
from .measuring import check_kinds
from .settings import DecisionSettings, ScoreSettings
from .sparsifier import CoupledSparsifier, EntryScores


@dataclass(frozen=True)
class Decision:
    """The result of a policy at one sparsification step.

    Attributes:
        keeps: coupling -> entries to keep, for those that shrink.
        importance: coupling name -> its score.
        forecast: the expected rise of the loss, if the decision was made by it.
    """

    keeps: dict[Coupling, Tensor]
    importance: dict[str, float]
    forecast: Forecast | None = None


class Policy(Protocol):
    """A rule that decides which entries go.

    Attributes:
        constraints: which sizes are allowed; they may be set before the sparsifier is made.
    """

    constraints: Constraints

    @property
    def estimators(self) -> list[CoupledEstimator]:
        """The estimators that accumulate over training steps."""

    @property
    def described(self) -> dict[str, str]:
        """The names of its rule and scores, to be written down."""

    def ready(self) -> CoupledSparsifier:
        """Return the sparsifier, made once the couplings are known."""

    def decide(self, at_most: int | None) -> Decision:
        """Decide what to keep.

        Args:
            at_most: the cost that the schedule asks for after this step: no more, and less by an entry at most; None:
                the policy decides.
        """


class Paper:
    """The rule of the paper, with any scores.

    Args:
        model: a compiled model.
        optimizers: those that hold its parameters.
        settings: how far and by which shares.
        constraints: which sizes are allowed.
        scores: how couplings and entries are scored.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        settings: DecisionSettings,
        constraints: Constraints,
        scores: ScoreSettings,
    ) -> None:
        self.model, self.optimizers, self.settings, self.constraints = model, optimizers, settings, constraints
        self.estimator = scores.estimator(model, scores.score, optimizers)
        self.index: CoupledEstimator | None = None
        self.by_kind: dict[str, CoupledEstimator] = {}
        index, score = scores.index_score, scores.score
        if isinstance(index, Mapping):
            check_kinds(list(index))
            self.by_kind = {kind: scores.estimator(model, each, optimizers) for kind, each in index.items()}
            for kind, each in self.by_kind.items():
                if each.reader.kinds is not None and kind not in each.reader.kinds:
                    raise TargetError(
                        f"index_score={{{kind!r}: {each.score.name!r}}}: it judges {', '.join(each.reader.kinds)} only"
                    )
        elif index != "norms":
            same = index is score or (isinstance(index, str) and isinstance(score, str) and index == score)
            self.index = self.estimator if same else scores.estimator(model, index, optimizers)
        self._sparsifier: CoupledSparsifier | None = None

    @property
    def estimators(self) -> list[CoupledEstimator]:
        """The estimator of the score, and those of the index score if they are others."""
        own = [self.estimator] if self.index in (None, self.estimator) else [self.estimator, self.index]
        return [*own, *self.by_kind.values()]

    @property
    def described(self) -> dict[str, str]:
        """The names of its scores."""
        index = "norms" if self.index is None else self.index.score.name
        index += "".join(f", {kind} by {each.score.name}" for kind, each in self.by_kind.items())
        return {"policy": "paper", "score": self.estimator.score.name, "index_score": index}

    def ready(self) -> CoupledSparsifier:
        """Return the sparsifier, made once the couplings are known."""
        if self._sparsifier is None:
            constraints = self.constraints
            for kinds in {each.reader.kinds: None for each in (self.estimator, self.index) if each is not None}:
                if kinds is None:
                    continue
                # The score says nothing about the others.
                others = [c for c in couplings(self.model) if c.kind not in kinds]
                constraints = replace(constraints, frozen=[*constraints.frozen, *others])
            entries: EntryScores | None = None if self.index is None else self.index.entries
            if self.by_kind:
                entries = self._entries_by_kind
            self._sparsifier = CoupledSparsifier.of(self.model, self.settings, constraints, self.optimizers, entries)
        return self._sparsifier

    def decide(self, at_most: int | None) -> Decision:
        """Decide by the rule; where that is too slow or too fast for the schedule, remove as much as is due."""
        importance = self.estimator.importance()
        with ExitStack() as stack:
            for each in (self.index, *self.by_kind.values()):
                if each is not None:
                    stack.enter_context(each.at_once())
            keeps = self.ready().decide(importance, at_most, at_most)
        return Decision(keeps, {coupling.name: value for coupling, value in importance.items()})

    def _entries_by_kind(self, coupling: Coupling, *, by_context: bool = False) -> Tensor:
        if coupling.kind in self.by_kind:
            return self.by_kind[coupling.kind].entries(coupling, by_context=by_context)
        return index_scores(self.model, coupling, by_context=by_context)


class Adaptive:
    """The rule that removes the entries by which the loss is expected to rise least.

    Args:
        model: a compiled model.
        optimizers: those that hold its parameters.
        settings: how far; `top_k` and `theta` are not read.
        constraints: which sizes are allowed.
        compensation: what will be done for the entries that go.
        order: `"elimination"`: those go first that others take over best; `"saliency"`: those that are worth least.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        settings: DecisionSettings,
        constraints: Constraints,
        compensation: Compensation,
        order: EntryOrder = "elimination",
    ) -> None:
        self.model, self.optimizers, self.settings, self.constraints = model, optimizers, settings, constraints
        self.compensation, self.order = compensation, order
        self.saliency = Saliency(model)
        self.saliency.reader.wholes = constraints.min_keep == 0
        self._sparsifier: AdaptiveSparsifier | None = None

    @property
    def estimators(self) -> list[CoupledEstimator]:
        """The saliency of entries."""
        return [self.saliency]

    @property
    def described(self) -> dict[str, str]:
        """Saliency in place of both scores."""
        score = self.saliency.score.name
        return {"policy": "adaptive", "score": score, "index_score": score, "order": self.order}

    def ready(self) -> AdaptiveSparsifier:
        """Return the sparsifier, made once the couplings are known."""
        if self._sparsifier is None:
            self._sparsifier = AdaptiveSparsifier.of(self.model, self.settings, self.constraints, self.optimizers)
        return self._sparsifier

    def decide(self, at_most: int | None) -> Decision:
        """Decide by one price for all couplings."""
        with self.saliency.at_once():
            return self._decide(at_most)

    def _decide(self, at_most: int | None) -> Decision:
        sparsifier = self.ready()
        assert at_most is not None, "a schedule with an end sets a cost"
        judged = [coupling for coupling in couplings(self.model) if self.saliency.judges(coupling)]
        by_context = sparsifier.constraints.head_dims == "per_head"
        worth = {coupling: worth_of(coupling, self.saliency, by_context=by_context) for coupling in judged}
        widths = sparsifier.widths(worth, at_most, whole_worth(judged, self.saliency))
        compensation, ranks = self.compensation, ranks_of(self.model)
        positions = ranks.mean(compensation.positions, "positions per step")
        with compensation.at_once():
            expected = forecast(
                self.model, judged, self.saliency, grams=compensation.grams, optimizers=self.optimizers,
                absorb=compensation.settings.absorb, rotate=compensation.settings.rotate, by_context=by_context,
                widths=widths, positions=None if positions is None else positions * ranks.count, order=self.order,
            )  # fmt: skip
        keeps = {coupling: expected.curves[coupling].keep(width) for coupling, width in widths.items()}
        return Decision(keeps, {c.name: value for c, value in self.saliency.importance().items()}, expected)
