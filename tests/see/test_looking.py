"""Functions that look at a model leave all state behind its forward as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.errors import NoInputsError, VerificationError

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


class Twice(nn.Module):
    """Two blocks, of which a call may run none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(2))

    def forward(self, x: Tensor, run: bool = True) -> Tensor:
        for block in self.blocks:
            x = block(x) if run else x
        return x


class Alone(Twice):
    """The same, without arguments."""

    def forward(self) -> Tensor:
        return super().forward(torch.ones(3, 4))


def test_without_inputs_a_model_is_verified_with_its_own_or_asks_for_some() -> None:
    x = torch.randn(3, 4)
    for regions in ("root", "blocks"):
        model: Any = ecospa_fx.compile(Twice(), example_inputs=(x,), regions=regions)
        with pytest.raises(NoInputsError) as missing:
            ecospa_fx.verify(model)
        assert str(missing.value) == (
            "there are no inputs to capture Twice with: pass the arguments of one call as example_inputs=(x,) or "
            "example_kwargs={...}"
        )
        model.example_input_array = x
        assert ecospa_fx.verify(model).ok
    assert ecospa_fx.verify(ecospa_fx.compile(Alone(), example_inputs=(), regions="blocks")).ok


def test_a_call_that_runs_no_region_verifies_nothing() -> None:
    model = ecospa_fx.compile(Twice(), example_inputs=(torch.randn(3, 4),), regions="blocks")
    with pytest.raises(VerificationError) as nothing:
        ecospa_fx.verify(model, example_inputs=(torch.randn(3, 4), False))
    assert str(nothing.value) == (
        "this call of Twice runs none of its 2 regions, so nothing was compared; pass the example_inputs of a call "
        "that does"
    )


@pytest.mark.parametrize("regions", ["root", "blocks"])
def test_a_wrong_call_raises_the_error_of_the_model_and_ends_no_coupling(regions: str) -> None:
    model = ecospa_fx.compile(Twice(), example_inputs=(torch.randn(3, 4),), regions=regions)
    before = [c.name for c in ecospa_fx.couplings(model)]
    for call in ((), (torch.randn(3, 5),), (None,), (torch.randn(3, 4).long(),), (torch.randn(3, 4, device="meta"),)):
        for mode in (model.train(), model.eval()):
            with pytest.raises((TypeError, RuntimeError)) as error:
                mode(*call)
            with pytest.raises(type(error.value)) as plain:
                Twice()(*call)
            assert str(plain.value).splitlines()[0] == str(error.value).splitlines()[0]
    assert before and [c.name for c in ecospa_fx.couplings(model)] == before
