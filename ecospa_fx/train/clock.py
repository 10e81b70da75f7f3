"""Clock: training counted in the unit of a schedule, less the time that shrinks have waited for the loss."""

from __future__ import annotations

import math
from typing import Any

from ecospa_fx.arguments import NUMBER
from ecospa_fx.errors import TargetError
from ecospa_fx.logs import logger
from ecospa_fx.ranks.agreement import Ranks

from .loss_spikes import LossSpikes
from .schedule import Schedule

MOST_POSTPONED = 10
"""Sparsification steps in a row that wait for the loss to come down; the next one no longer does."""


class Clock:
    """Tells when a sparsification step is due, and puts it off while the loss is high.

    Args:
        schedule: when steps are due.
        spikes: follows the loss.

    Attributes:
        now: training seen, in the unit of the schedule.
        postponed: a dict per sparsification step that waited for the loss: `step`, `loss` (smoothed), `before`.
        waited: by how much the schedule has been put off.
        in_a_row: sparsification steps that have waited since the last one that was taken.
    """

    def __init__(self, schedule: Schedule, spikes: LossSpikes) -> None:
        self.schedule, self.spikes = schedule, spikes
        self.now: float = 0
        self.postponed: list[dict[str, Any]] = []
        self.waited: float = 0
        self.in_a_row = 0
        self._before: float = 0  # `now` before the last training step

    def amount(self, tokens: int | None, epochs: float | None) -> float:
        """Return a training step in the unit of the schedule.

        Raises:
            TargetError: the amount in that unit is missing.
        """
        unit = self.schedule.unit
        amount = {"steps": 1, "tokens": tokens, "epochs": epochs}[unit]
        if amount is None:
            raise TargetError(f"the schedule counts {unit}: call trainer.step({unit}=...)")
        if not NUMBER.fits(amount) or not 0 <= amount < math.inf:
            raise TargetError(f"{unit}={amount!r} of a step is out of range; it is a number, at least 0")
        return amount

    def advance(self, amount: float, ranks: Ranks) -> float:
        """Count a training step of so much on this rank, and return it as it counts: the tokens of all ranks."""
        if self.schedule.unit != "steps":
            mean = ranks.mean(amount, f"the {self.schedule.unit} of a step")
            assert mean is not None
            amount = round(mean * ranks.count) if self.schedule.unit == "tokens" and ranks else mean
        self._before, self.now = self.now, self.now + amount
        return amount

    @property
    def due(self) -> bool:
        """True if a sparsification step falls on the last training step."""
        return self.schedule.due(self._before - self.waited, self.now - self.waited)

    def due_within(self, amount: float) -> bool:
        """Return whether a sparsification step falls on the training after the last step, up to so much of it."""
        now = self.now - self.waited
        return self.schedule.due(now, now + amount)

    def share(self, ahead: bool) -> float | None:
        """Return the share of all that is to go that should be gone by now; None if the schedule does not say.

        Args:
            ahead: with the next sparsification step, which is taken now.
        """
        return self.schedule.share(self.now - self.waited, ahead)

    def postpone(self, step: int) -> bool:
        """Put the schedule off by one interval if the loss is still above its level before the last shrink.

        Args:
            step: the training step now, for the record.

        Returns:
            Whether it was put off.
        """
        if not self.spikes.spiking or self.in_a_row >= MOST_POSTPONED:
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        self.waited += self.schedule.step
        level, before = self.spikes.level, self.spikes.before
        self.postponed.append({"step": step, "loss": level, "before": before})
        logger("shrink").warning(
            "step %d: loss %s, %s before the last shrink; the next one waits%s", step, _number(level),
            _number(before), "" if self.in_a_row < MOST_POSTPONED else " for the last time",
        )  # fmt: skip
        return True


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
