"""Scores: the worth of a weight, as one function each.

A score computes the worth of each entry of a weight from the weight and its gradient, elementwise. `CoupledEstimator`
sums it over rows and columns, over steps and over the matrices of a coupling.

    ecospa_fx.EcoSpaTrainer(model, optimizer, score="taylor")
    ecospa_fx.EcoSpaTrainer(model, optimizer, score=lambda weight, gradient: (weight * gradient).abs())
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from ecospa_fx.errors import TargetError

ScoreFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
ScoreInput = Literal[
    "gradients", "weights", "optimizer", "activations", "attention", "gates", "positions", "experts", "nothing"
]


@dataclass(frozen=True, eq=False)
class Score:
    """The worth of a weight.

    Attributes:
        name: its name.
        reads: its input, see `readers.py`. `"gradients"` (with the weights), `"gates"` and `"positions"` are
            accumulated over steps, `"activations"`, `"attention"` and `"experts"` over forwards; the others are read
            when a decision is due.
        of: `of(weight, gradient)` -> worth of each entry, not negative, in the weight's shape. For a score that reads
            the optimizer, `gradient` is the root of Adam's second moment.
        meaning: its meaning in a line.
    """

    name: str
    reads: ScoreInput
    of: ScoreFunction | None
    meaning: str


SCORES = {
    score.name: score
    for score in (
        Score("fisher", "gradients", lambda w, g: g.square(), "squared gradient, the diagonal of the empirical Fisher"),
        Score("gradient", "gradients", lambda w, g: g.abs(), "absolute gradient"),
        Score("taylor", "gradients", lambda w, g: (w * g).abs(), "what the loss changes by without it, to first order"),
        Score("taylor_squared", "gradients", lambda w, g: (w * g).square(), "that, squared (Molchanov et al. 2019)"),
        Score("taylor_positions", "positions", None, "that of an entry's activation at a position, squared there"),
        Score("magnitude", "weights", lambda w, g: w.square(), "squared weight"),
        Score("adam", "optimizer", lambda w, g: g.square(), "Adam's second moment, as the optimizer holds it"),
        Score("activation", "activations", None, "norm of the products it takes part in (as Wanda, Sun et al. 2023)"),
        Score("attention_entropy", "attention", None, "how far a head's attention is from looking everywhere alike"),
        Score("reap", "experts", None, "mean norm of what an expert adds to its tokens (REAP, Lasby et al. 2025)"),
        Score("frequency", "experts", None, "the share of all choices of a router that fall on an expert"),
        Score("random", "nothing", None, "nothing: a control"),
    )
}
"""Every score that has a name."""


def score_named(score: str | ScoreFunction | Score, option: str = "score") -> Score:
    """Return the score that a name or a function stands for.

    Raises:
        TargetError: no score has the name.
    """
    if isinstance(score, Score):
        return score
    if callable(score):
        return Score(getattr(score, "__name__", type(score).__name__), "gradients", score, "your own")
    if not isinstance(score, str) or score not in SCORES:
        raise TargetError(
            f"{option}={score!r} is none of {', '.join(map(repr, SCORES))}, nor a function of a weight and its gradient"
        )
    return SCORES[score]
