"""GateTotals: sums over training steps of what each gate of a coupling is worth, by one of the rules of `sums.py`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .reader import GradientStep
from .slices import SliceKey
from .sums import StepCount, Total, labelled, unlabelled


class GateTotals:
    """Sums by coupling; those of other sizes than the model has now are dropped once new ones come.

    Args:
        rule: how steps are added up.

    Attributes:
        sums: (coupling name, 0) -> sums over steps, one per gate.
    """

    def __init__(self, rule: Total) -> None:
        self.rule = rule
        self.sums: dict[SliceKey, Tensor] = {}

    def add(self, added: Mapping[str, Tensor], step: GradientStep) -> None:
        """Add the sums of a step, unless it was left out."""
        for name, total in added.items():
            if step.found_inf is not None:
                total = torch.where(step.found_inf.to(total.device) > 0, torch.zeros_like(total), total)
            key, before = (name, 0), self.sums.get((name, 0))
            if before is None or before.shape != total.shape:
                self.sums[key] = total * self.rule.gain
                for each in self.rule.steps:
                    each.pop(key, None)
            elif self.rule.decay:
                before.mul_(self.rule.decay).add_(total.to(before.device), alpha=self.rule.gain)
            else:
                before.copy_(total)
        self.rule.record(self.sums, added, step.new_step, step.found_inf)

    def mean(self, name: str, count: StepCount) -> Tensor | None:
        """Return the mean over steps of each gate, float64 on the CPU; None where there is none."""
        key = name, 0
        if key not in self.sums:
            return None
        self.rule.restore({key: self.sums[key]})
        return self.sums[key].double().cpu() / self.rule.divisor(count)

    def reset(self) -> None:
        """Drop the sums."""
        self.sums.clear()
        self.rule.steps.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name."""
        return labelled(self.sums, self.rule)

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Go on with what `tensors` returned."""
        self.sums = unlabelled(named, self.rule)
