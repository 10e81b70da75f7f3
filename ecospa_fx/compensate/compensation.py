"""Compensation: what a trainer does so that the model computes after a shrink what it did before, as far as it can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.model.lookup import regions_of

from .grams import Grams
from .rotation import rotate

GATHERING = 16
"""Training steps before a shrink in which it is looked at what weights meet."""


class Compensation:
    """Looks at what weights meet shortly before each shrink, rotates, and lets what stays take over.

    Args:
        model: a compiled model.
        absorb: let what stays take over, see `ecospa_fx.Grams`.
        rotate: rotate what is about to shrink, see `ecospa_fx.rotate`.
    """

    def __init__(self, model: nn.Module, absorb: bool, rotate: bool) -> None:
        self.model, self.absorbs, self.rotates = model, absorb, rotate
        self.steps = 0  # that were looked at
        self.grams: Grams | None = None
        self.look()

    def look(self) -> None:
        """Look as soon as the regions are known: those of a loaded model before its first call, not to miss it."""
        if (self.absorbs or self.rotates) and self.grams is None and regions_of(self.model):
            self.grams = Grams(self.model, training=True)

    def gather(self, soon: bool) -> None:
        """Go on looking, or not: whether a shrink comes soon."""
        if self.grams is not None:
            if soon and not self.grams.active:
                self.reset()
            self.grams.active = soon
            self.steps += soon

    def prepared(
        self, keeps: dict[Coupling, Tensor], optimizers: Sequence[Optimizer], also: Sequence[Any]
    ) -> dict[Coupling, Tensor]:
        """What to keep after a rotation: as many entries, the first ones, which carry most, where the basis is free."""
        if not self.rotates:
            return keeps
        linear = {coupling.name: keep.shape[-1] for coupling, keep in keeps.items() if coupling.linear}
        done = rotate(self.model, linear, keep=linear, grams=self.grams, optimizer=optimizers, also=also)
        return {
            coupling: torch.arange(keep.shape[-1]) if coupling.name in done.energy else keep
            for coupling, keep in keeps.items()
        }

    @property
    def absorb(self) -> Grams | None:
        """What `shrink` is to absorb with."""
        return self.grams if self.absorbs else None

    def reset(self) -> None:
        """Forget what was seen."""
        if self.grams is not None:
            self.grams.reset()
            self.steps = 0

    @property
    def positions(self) -> float | None:
        """Positions (tokens, pixels) of a training step; None where nothing was seen."""
        if self.grams is None or self.grams.empty or not self.steps:
            return None
        return self.grams.positions / self.steps

    def detach(self) -> None:
        """Look no more."""
        if self.grams is not None:
            self.grams.detach()

    def state_dict(self) -> dict[str, Any]:
        """What was seen: `active`, `steps`, and tensors by name."""
        held = self.grams
        return {} if held is None else {"active": held.active, "steps": self.steps, "tensors": held.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.look()
        if self.grams is not None and state:
            self.grams.load_state_dict(state["tensors"])
            self.grams.active, self.steps = state["active"], state.get("steps", 0)
