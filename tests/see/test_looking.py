"""Functions that look at a model leave all state behind its forward as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ecospa_fx

SEEN = torch.zeros(())


class Counting(nn.Module):
    """Two layers; every call counts, in an attribute, in a list and a view of its entry, in a buffer and a global."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2)
        self.calls, self.held = torch.zeros(()), [torch.zeros(2)]
        self.first = self.held[0][:1]
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(F.gelu(self.up(x)))
        for each in (self.calls, self.held[0], self.first, self.steps, SEEN):
            each.add_(1)
        return self.out(h * (1 + self.held[0][0] * 0.1))

    def counts(self) -> list[Any]:
        return [self.calls.item(), self.held[0].tolist(), self.steps.item(), SEEN.item()]


@pytest.mark.parametrize("execution", ["graph", "module"])
def test_counters_in_any_place_stand_still(execution: Any) -> None:
    torch.manual_seed(0)
    model, x = Counting(), torch.randn(3, 4)
    ecospa_fx.compile(model, execution=execution, regions="root", example_inputs=(x,))
    before = model.counts()
    assert ecospa_fx.verify(model, example_inputs=(x,)).ok
    ecospa_fx.explain(model, example_inputs=(x,))
    ecospa_fx.shrink(model, {ecospa_fx.couplings(model)[0]: torch.arange(2)})
    assert ecospa_fx.verify(model, example_inputs=(x,)).ok
    assert model.counts() == before
    model(x)
    now, entries = model.counts(), before[1]
    assert now == [before[0] + 1, [entries[0] + 2, entries[1] + 1], before[2] + 1, before[3] + 1]
