"""Compensation: the part of a trainer that keeps what the model computes through a shrink, as far as it can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.model.journal import Journal
from ecospa_fx.model.lookup import regions_of
from ecospa_fx.model.observers import check_observable, still_watching

from .grams import Grams
from .rotation import rotate_within

GATHERING = 16
"""Training steps before a shrink during which input statistics are collected."""


@dataclass(frozen=True)
class CompensationSettings:
    """Settings of the compensation for entries that go.

    Attributes:
        absorb: the entries that stay take over, see `ecospa_fx.Grams`.
        rotate: couplings between linear maps, and streams with norms on them, that are about to shrink are rotated
            first, see `ecospa_fx.rotate`.
    """

    absorb: bool = False
    rotate: bool = False


class Compensation:
    """Collects input statistics shortly before each shrink, rotates, and lets the entries that stay take over.

    Args:
        model: a compiled model.
        settings: which of these it does.
    """

    def __init__(self, model: nn.Module, settings: CompensationSettings) -> None:
        self.model, self.settings = model, settings
        self.steps = 0  # during which statistics were collected
        self.grams: Grams | None = None
        if settings.absorb or settings.rotate:
            check_observable(model)
        self.observe()

    def observe(self) -> None:
        """Watch the regions once they are known: those of a loaded model before its first call, not to miss it."""
        needed = self.settings.absorb or self.settings.rotate
        self.grams = still_watching(self.grams, self.model)
        if needed and self.grams is None and regions_of(self.model):
            self.grams = Grams(self.model, training=True)

    def gather(self, soon: bool) -> None:
        """Collect statistics in the next step, or not.

        Args:
            soon: whether a shrink comes soon.
        """
        if self.grams is not None:
            if soon and not self.grams.active:
                self.reset()
            self.grams.active = soon
            self.steps += soon

    def rotated(
        self, keeps: dict[Coupling, Tensor], optimizers: Sequence[Optimizer], also: Sequence[Any], journal: Journal
    ) -> dict[Coupling, Tensor]:
        """Rotate where the basis is free, and return what to keep then.

        Args:
            keeps: coupling -> entries to keep.
            optimizers: those that hold the parameters.
            also: copies of the model that follow.
            journal: that of the shrink, of which this is a part.

        Returns:
            As many entries of each coupling as in `keeps`: of those that were rotated the first ones, which carry most.
        """
        if not self.settings.rotate:
            return keeps
        free = {c.name: keep.shape[-1] for c, keep in keeps.items() if c.linear or c.kind == "residual"}
        done = rotate_within(journal, self.model, free, keep=free, grams=self.grams, optimizer=optimizers, also=also)
        return {
            coupling: torch.arange(keep.shape[-1]) if coupling.name in done.energy else keep
            for coupling, keep in keeps.items()
        }

    def at_once(self) -> AbstractContextManager[None]:
        """Return a context in which statistics are read several times, and added up over ranks once."""
        return nullcontext() if self.grams is None else self.grams.at_once()

    @property
    def absorb(self) -> Grams | None:
        """The statistics for `shrink(absorb=)`, if entries that stay take over."""
        return self.grams if self.settings.absorb else None

    def reset(self) -> None:
        """Forget the statistics."""
        if self.grams is not None:
            self.grams.reset()
            self.steps = 0

    @property
    def positions(self) -> float | None:
        """Positions (tokens, pixels) of a training step; None if no step was seen."""
        if self.grams is None or self.grams.empty or not self.steps:
            return None
        return self.grams.positions / self.steps

    def detach(self) -> None:
        """Stop watching the regions."""
        if self.grams is not None:
            self.grams.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics: `active`, `steps`, and tensors by name; empty if nothing is collected."""
        if self.grams is None:
            return {}
        return {"active": self.grams.active, "steps": self.steps, "tensors": self.grams.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.observe()
        if self.grams is not None and state:
            self.grams.load_state_dict(state["tensors"])
            self.grams.active, self.steps = state["active"], state.get("steps", 0)
