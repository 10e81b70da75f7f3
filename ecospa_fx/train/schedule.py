"""Schedule: the times at which a model shrinks while it trains, and the size it should have then."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ecospa_fx.errors import TargetError

SparsityCurve = Literal["linear", "cubic", "cosine", "one_shot"]
ScheduleUnit = Literal["steps", "tokens", "epochs"]


@dataclass(frozen=True)
class Schedule:
    """The times of the sparsification steps, counted in steps, tokens or epochs of training.

    Attributes:
        interval: from one sparsification step to the next; if there is an end, stretched or squeezed a little so that
            the last one falls on it.
        start: time of the first one; if it is 0, the first comes an interval after it.
        end: time of the last one, by which the target is reached; None: the rule of the paper runs until it is.
        shape: the share of all that is to go that has gone after a share t of the sparsification steps: `"linear"`, t;
            `"cubic"`, 1 - (1 - t)³, much early (Zhu & Gupta 2017, arXiv 1710.01878); `"cosine"`, (1 - cos πt) / 2,
            little at both ends; `"one_shot"`, all of it in one step at `start`.
        shrinks: the number of sparsification steps, evenly from `start` to `end`, in place of `interval`: few where
            each is dear, as with `torch.compile`, which compiles anew after every one.
        unit: `"steps"`, `"tokens"` or `"epochs"`, which `interval`, `start` and `end` count.

    Raises:
        TargetError: a number is out of range, or two of them do not go together.
    """

    interval: float = 100
    start: float = 0
    end: float | None = None
    shape: SparsityCurve = "linear"
    shrinks: int | None = None
    unit: ScheduleUnit = "steps"

    def __post_init__(self) -> None:
        for name, chosen, options in (
            ("shape", self.shape, get_args(SparsityCurve)),
            ("unit", self.unit, get_args(ScheduleUnit)),
        ):
            if not isinstance(chosen, str) or chosen not in options:
                raise TargetError(f"{name}={chosen!r} is none of {', '.join(map(repr, options))}")
        whole = self.unit != "epochs"
        for name, value, least in (("interval", self.interval, 1), ("start", self.start, 0)):
            right = isinstance(value, int) and value >= least if whole else value >= 0 and (value > 0 or least == 0)
            if isinstance(value, bool) or not right:
                what = f"a whole number of {self.unit}" if whole else "a number of epochs"
                bound = f"at least {least}" if whole or not least else "above 0"
                raise TargetError(f"{name}={value!r} is out of range; it is {what}, {bound}")
        if self.end is not None and ((whole and not isinstance(self.end, int)) or self.end <= self.start):
            raise TargetError(f"end={self.end!r} is not after start={self.start}")
        if self.shape in ("cubic", "cosine") and self.end is None:
            raise TargetError(f"shape={self.shape!r} needs an end to be reached; pass end=")
        if self.shrinks is not None:
            if not isinstance(self.shrinks, int) or self.shrinks < 1:
                raise TargetError(f"shrinks={self.shrinks!r} is out of range; it is a whole number, at least 1")
            if self.end is None:
                raise TargetError(f"shrinks={self.shrinks} needs an end by which to have been taken; pass end=")
            if self.shape == "one_shot" and self.shrinks != 1:
                raise TargetError(f'shape="one_shot" is one shrink, and shrinks={self.shrinks}')

    def due(self, before: float, now: float) -> bool:
        """Return whether a sparsification step falls after `before` and not after `now`."""
        if self.end is not None and now >= self.end:
            return True
        return self._taken(now) > self._taken(before)

    def share(self, now: float, ahead: bool = False) -> float | None:
        """Return the share, 0 to 1, of all that is to go that should be gone after a step at `now`; None: any share.

        Args:
            now: the time.
            ahead: count a step more.
        """
        if self.shape == "one_shot":
            return 1.0 if now >= self.start or ahead else 0.0
        if self.end is None:
            return None
        if now >= self.end:
            return 1.0
        t = min(1.0, (self._taken(now) + ahead) / self._taken(self.end))
        if self.shape == "cubic":
            return 1.0 - (1.0 - t) ** 3
        return (1.0 - math.cos(math.pi * t)) / 2 if self.shape == "cosine" else t

    def beyond(self, last: float) -> str | None:
        """Say in words what of it falls after `last`, the end of a run; None if nothing that is known does."""
        first = self.start if self.start > 0 else self.end if self.shrinks == 1 else self.step
        if first is not None and first > last:
            return f"its first sparsification step would be at {first:g}"
        return f"its end is at {self.end:g}" if self.end is not None and self.end > last else None

    def described(self) -> dict[str, Any]:
        """Return plain values, to be written down."""
        return asdict(self)

    @property
    def step(self) -> float:
        """Time from one sparsification step to the next, also if `shrinks` sets their number.

        If there is an end, the last falls on it: one that came a few training steps after the one before would judge by
        these few alone.
        """
        if self.end is None:
            return self.interval
        if self.shrinks is None:
            count = round((self.end - self.start) / self.interval)
        else:
            count = self.shrinks - 1 if self.start > 0 else self.shrinks
        return (self.end - self.start) / max(1, count)

    def _taken(self, now: float) -> int:
        """Count the sparsification steps up to `now`."""
        if now < self.start or now <= 0:
            return 0
        if self.shape == "one_shot":
            return 1
        first = 1 if self.start > 0 else 0  # at 0 nothing has been learned that could be judged
        if self.shrinks == 1:
            return int(self.end is not None and now >= self.end)
        between = (now - self.start) / self.step + 1e-9
        count = first + math.floor(between)
        if self.end is not None and now >= self.end:
            count = first + math.ceil((self.end - self.start) / self.step - 1e-9)
        return count
