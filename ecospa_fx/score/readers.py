"""Readers: one class per kind of input that a score can be made from, and the table that a score's `reads` points into.

A score of a new kind is a class here with its row in `READERS`, and its row in `scores.SCORES`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import TargetError
from ecospa_fx.model.lookup import couplings, regions_of
from ecospa_fx.model.observers import check_observable, still_watching
from ecospa_fx.model.optimizer_state import is_partitioned, second_moments
from ecospa_fx.passes.graph.tensors import as_real, parameters_of
from ecospa_fx.ranks.agreement import Ranks
from ecospa_fx.ranks.fsdp2 import reshard
from ecospa_fx.ranks.members import ranks_of

from .activations import ActivationScores
from .contributions import ContributionReader
from .gates import GateReader
from .judging import coupling_entries, coupling_importance
from .positions import PositionReader
from .reader import NO_GRADIENT, ZERO_GRADIENT, Averaged, GradientStep, Reader, ReaderOptions
from .scores import Score, ScoreInput
from .slices import SliceKey
from .sums import Latest, SliceTotals, Total, key_of, label_of

NO_ACTIVATION = (
    "no parameter of a coupling has an activation that could be seen: call trainer.step() after backward() and before "
    "zero_grad(), and train with model.train()"
)


class SliceReader(Averaged[SliceKey]):
    """Base of the readers of tensors in the shapes of the weights, which judge by sums per row and column.

    Args:
        options: of all readers.
        rule: how readings are added up.
    """

    learns = False
    kinds: tuple[str, ...] | None = None
    unjudged = 1.0

    def __init__(self, options: ReaderOptions, rule: Total) -> None:
        self.model, self.score, self.count = options.model, options.score, options.count
        self.totals = SliceTotals(options.model, rule, weighted=self.score.name == "taylor_squared")

    @property
    def sums(self) -> Mapping[SliceKey, Tensor]:
        """Sums of each slice by (parameter, dim)."""
        return self.totals.sums

    @property
    def empty(self) -> bool:
        """False: a decision can be made at any time."""
        return False

    def lacking(self) -> str | None:
        """Return None: a decision can be made at any time."""
        return None

    def observe(self) -> None:
        """Do nothing: it reads the model's parameters."""

    def add(self, step: GradientStep) -> None:
        """Do nothing: it reads when a decision is due."""

    def refresh(self) -> None:
        """Read the input, if that is done when a decision is due."""

    def importance(self, coupling: Coupling) -> float:
        """Return the mean score of the coupling's matrices; 0 for one of which nothing was read."""
        return coupling_importance(coupling, self.means_now())

    def entries(self, coupling: Coupling, *, by_context: bool) -> Tensor | None:
        """Return the mean over the coupling's matrices of the score of each entry's slices."""
        return coupling_entries(coupling, self.means_now(), by_context=by_context)

    def means(self) -> dict[SliceKey, Tensor]:
        """Return for each slice the mean of its entries' scores per step, float64 on the CPU, added up over ranks."""
        reshard(self.model)
        self.refresh()
        return self.totals.means(self.count)

    def reset(self) -> None:
        """Drop the sums."""
        self.totals.reset()

    def detach(self) -> None:
        """Do nothing: there is nothing to take off."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name."""
        return self.totals.tensors()

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Go on with what `tensors` returned."""
        self.totals.load_tensors(named)


class GradientReader(SliceReader):
    """Gradients with the weights: a score of each weight, added up over training steps."""

    learns = True

    def __init__(self, options: ReaderOptions) -> None:
        super().__init__(options, options.rule)
        # The kernel sums squares; of any other score it is given the roots.
        self._in_kernel = self.score.name in ("fisher", "taylor_squared")

    @property
    def empty(self) -> bool:
        """True if no gradient has been read since the last reset."""
        return not self.totals.sums

    def lacking(self) -> str | None:
        """Return the message where there was no gradient, or none but zeros."""
        if self.empty:
            return NO_GRADIENT
        return None if any(bool((mean != 0).any()) for mean in self.means_now().values()) else ZERO_GRADIENT

    def add(self, step: GradientStep) -> None:
        """Add the scores of one step."""
        self.count.note(step.found_inf, step.new_step)
        (parameters, gradients), scale = step.tensors, step.scale
        if not self._in_kernel:
            scored = self.totals.current().dims
            gradients = {
                name: score_roots(self.score, name, parameters[name], gradient, scale)
                for name, gradient in gradients.items()
                if name in scored
            }
            scale = None
        self.totals.add(gradients, parameters, scale=scale, found_inf=step.found_inf, new_step=step.new_step)


class WeightReader(SliceReader):
    """Weights as they are when a decision is due."""

    def __init__(self, options: ReaderOptions) -> None:
        super().__init__(options, Latest())

    def refresh(self) -> None:
        """Read the weights."""
        parameters = dict(parameters_of(self.model))
        self.totals.replace({name: as_real(p) for name, p in parameters.items()}, parameters)


class OptimizerReader(SliceReader):
    """Second moments that the optimizers hold when a decision is due."""

    learns = True

    def __init__(self, options: ReaderOptions) -> None:
        super().__init__(options, Latest())
        if options.optimizers is None:
            raise TargetError(f"score={self.score.name!r} reads the optimizer's state; pass optimizer=")
        self.optimizers = options.optimizers

    def refresh(self) -> None:
        """Read the second moments."""
        scored = {member.parameter for c in couplings(self.model) for member in c.members if member.matrix}
        moments = second_moments(self.model, self.optimizers, scored)
        parameters = dict(parameters_of(self.model))
        parameters = dict(parameters_of(self.model))
        self.totals.replace({name: as_real(moment) for name, moment in moments.items()}, parameters)

    def means(self) -> dict[SliceKey, Tensor]:
        """Return the means, also of parameters whose state another rank holds."""
        ranks = ranks_of(self.model) if any(map(is_partitioned, self.optimizers)) else Ranks()
        if not ranks:
            return super().means()
        mine = {label_of(key): mean for key, mean in super().means().items()}
        held = {f"ranks {label}": mean.new_ones(1) for label, mean in mine.items()}
        sums = ranks.totals(mine | held, "the second moments of optimizers")
        return {key_of(label): sums[label] / sums[f"ranks {label}"] for label in sums if f"ranks {label}" in sums}


class ActivationReader:
    """Activations, or attention, seen in forwards that train.

    Args:
        options: of all readers.
        attention: score heads by their attention rather than entries by their activations.
    """

    learns = False
    unjudged = 1.0

    def __init__(self, options: ReaderOptions, *, attention: bool = False) -> None:
        check_observable(options.model)
        self.model, self.attention = options.model, attention
        self.kinds = ("heads", "groups") if attention else None
        self.sums: dict[SliceKey, Tensor] = {}
        self._scores: ActivationScores | None = None

    @property
    def empty(self) -> bool:
        """True if no activation has been seen since the last reset."""
        return self._scores is None or not self._scores.sums

    def lacking(self) -> str | None:
        """Return the message where no activation has been seen."""
        return NO_ACTIVATION if self.empty else None

    def observe(self) -> None:
        """Watch the regions: those of a loaded model before its first call, which must not be missed."""
        self._scores = still_watching(self._scores, self.model)
        if self._scores is None and regions_of(self.model):
            self._scores = ActivationScores(self.model, attention=self.attention)

    def add(self, step: GradientStep) -> None:
        """Watch the regions, if they were not known before; gradients are not read."""
        self.observe()

    def importance(self, coupling: Coupling) -> float | None:
        """Return the mean score of the coupling's entries; None where none was seen."""
        entries = self.entries(coupling, by_context=False)
        return None if entries is None else float(entries.mean())

    def entries(self, coupling: Coupling, *, by_context: bool) -> Tensor | None:
        """Score each entry; None if nothing was seen of the coupling."""
        return None if self._scores is None else self._scores.entries(coupling, by_context=by_context)

    def at_once(self) -> AbstractContextManager[None]:
        """Read the sums once, and add them up over ranks."""
        return nullcontext() if self._scores is None else self._scores.at_once()

    def reset(self) -> None:
        """Drop the sums."""
        if self._scores is not None:
            self._scores.reset()

    def detach(self) -> None:
        """Stop watching."""
        if self._scores is not None:
            self._scores.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name."""
        return {} if self._scores is None else self._scores.state_dict()

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Go on with what `tensors` returned."""
        self.observe()
        if named and self._scores is not None:
            self._scores.load_state_dict(dict(named))


class RandomReader:
    """Nothing: random numbers, the same for the same seed, step and coupling on every rank and after a resume."""

    empty = False
    learns = False
    kinds: tuple[str, ...] | None = None
    unjudged = 1.0

    def __init__(self, options: ReaderOptions) -> None:
        self.seed, self.count = options.seed, options.count
        self.sums: dict[SliceKey, Tensor] = {}

    def lacking(self) -> str | None:
        """Return None: it lacks nothing."""
        return None

    def observe(self) -> None:
        """Do nothing."""

    def add(self, step: GradientStep) -> None:
        """Do nothing: the number of the step is counted elsewhere."""

    def importance(self, coupling: Coupling) -> float:
        """Draw a number."""
        return float(self._draw(coupling, ()).item())

    def entries(self, coupling: Coupling, *, by_context: bool) -> Tensor:
        """Draw a number for each entry."""
        return self._draw(coupling, (coupling.contexts, coupling.size) if by_context else (coupling.size,))

    def at_once(self) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def reset(self) -> None:
        """Do nothing."""

    def detach(self) -> None:
        """Do nothing."""

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Do nothing."""

    def _draw(self, coupling: Coupling, shape: tuple[int, ...]) -> Tensor:
        label = f"{self.seed} {self.count.seen} {coupling.name} {'entries' if shape else ''}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(label).digest()[:7]))
        return torch.rand(shape, generator=generator, dtype=torch.float64)


READERS: dict[ScoreInput, Callable[[ReaderOptions], Reader]] = {
    "gradients": GradientReader,
    "weights": WeightReader,
    "optimizer": OptimizerReader,
    "activations": ActivationReader,
    "attention": partial(ActivationReader, attention=True),
    "gates": GateReader,
    "positions": PositionReader,
    "experts": ContributionReader,
    "nothing": RandomReader,
}
"""Each kind of input -> its reader."""


def score_roots(score: Score, name: str, weight: Tensor, gradient: Tensor, scale: Tensor | None) -> Tensor:
    """Compute the roots of a function's scores of a weight.

    Raises:
        TargetError: the function does not return a tensor of the weight's shape.
    """
    assert score.of is not None
    gradient = gradient.detach() if scale is None else gradient.detach() / scale.to(gradient.device)
    scores = score.of(weight.detach(), gradient)
    if not isinstance(scores, Tensor) or scores.shape != weight.shape:
        given = f"a {type(scores).__name__}" if not isinstance(scores, Tensor) else f"{tuple(scores.shape)}"
        raise TargetError(
            f"score={score.name} returned {given} for `{name}` of shape {tuple(weight.shape)}; it returns "
            "what each entry of the weight is worth, in the weight's shape"
        )
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).sqrt()
