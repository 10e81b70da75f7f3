"""LossSpikes: whether the loss has recovered from a shrink, so that the next one can wait."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ecospa_fx.arguments import NUMBER, shown
from ecospa_fx.errors import TargetError


def number_of(loss: Tensor | float) -> float:
    """Return the loss of a step as a number.

    Raises:
        TargetError: it is none, or several.
    """
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise TargetError(
            f"the loss is a tensor of shape {tuple(loss.shape)}, and it must be one number: pass its mean, loss.mean()"
        )
    if isinstance(loss, Tensor) and not loss.is_meta and not loss.is_complex():
        return float(loss.detach())
    if isinstance(loss, Tensor) or not NUMBER.fits(loss):
        raise TargetError(
            f"the loss is {shown(loss)}, and it must be one number: pass a float or a tensor of one entry"
        )
    return float(loss)


FADE = 0.9
"""Share of the smoothed loss that stays at a step: it follows the loss over some ten steps."""


class LossSpikes:
    """Follows the loss and compares it with its level before the last shrink.

    Args:
        allowed: how far above that level the loss may be, as a share, when the next shrink is due; 0.1 is 10%.

    Attributes:
        level: the smoothed loss now; None before the first one.
        before: the smoothed loss right before the last shrink; None before the first.
    """

    def __init__(self, allowed: float = 0.1) -> None:
        if not isinstance(allowed, (int, float)) or not allowed > 0:
            raise TargetError(f"spike={allowed!r} is out of range; it is a share above 0: 0.1 allows 10% more loss")
        self.allowed = allowed
        self.level: float | None = None
        self.before: float | None = None

    def update(self, loss: float) -> None:
        """Smooth in the loss of a step."""
        if self.level is None or not math.isfinite(self.level):
            self.level = loss
        else:
            self.level = FADE * self.level + (1 - FADE) * loss

    def mark_shrink(self) -> None:
        """Remember the level right before a shrink."""
        self.before = self.level

    @property
    def spiking(self) -> bool:
        """True if the loss is still further above its level before the last shrink than is allowed."""
        if self.level is None:
            return False
        if not math.isfinite(self.level):
            return True
        return self.before is not None and self.level - self.before > self.allowed * abs(self.before)

    def state_dict(self) -> dict[str, Any]:
        """Return the two levels as plain numbers."""
        return {"level": self.level, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.level, self.before = state["level"], state["before"]
