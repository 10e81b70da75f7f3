"""`ecospa_fx.testing`, as the tests of someone else would use it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from zoo import ZOO

import ecospa_fx
from ecospa_fx.errors import NoCouplingError, NoInputsError, VerificationError
from ecospa_fx.passes.rewrite.verify import _gradient_error
from ecospa_fx.passes.rules import OPS, OpInfo
from ecospa_fx.testing import assert_exact


def test_assert_exact_leaves_the_model_as_it_is() -> None:
    model = ZOO["attention"].build().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = assert_exact(model, (torch.randn(2, 5, 10),))
    assert set(result.by_coupling) == {"qk", "vo", "heads", "all of the model"}
    assert type(model) is ZOO["attention"].build and model.training and "_ecospa_model" not in model.__dict__
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_assert_exact_computes_in_another_dtype() -> None:
    model = ZOO["transformer_block"].build()
    result = assert_exact(model, (torch.randn(2, 5, 10),), dtype=torch.float64)
    assert result.worst.tolerance == 1e-10
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_assert_exact_takes_what_the_model_offers_and_a_compiled_model() -> None:
    model: Any = ZOO["mlp"].build()
    with pytest.raises(NoInputsError, match="there are no inputs to capture mlp with"):
        assert_exact(model)
    model.example_input_array = torch.randn(2, 5, 6)
    assert set(assert_exact(model).by_coupling) == {"ffn", "all of the model"}
    ecospa_fx.compile(model, example_inputs=(model.example_input_array,))
    ecospa_fx.shrink(model, {"ffn": torch.tensor([1, 2, 3])})
    assert assert_exact(model).by_coupling["ffn"].ok
    assert model.up.weight.shape == (3, 6)


def test_assert_exact_takes_a_model_that_runs_its_own_python() -> None:
    model: Any = ZOO["mlp"].build()
    x = torch.randn(2, 5, 6)
    ecospa_fx.compile(model, example_inputs=(x,), execution="module")
    assert set(assert_exact(model, (x,)).by_coupling) == {"ffn", "all of the model"}


def test_assert_exact_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    op = torch.ops.aten.scaled_dot_product_attention.default
    monkeypatch.setitem(OPS, op, OpInfo(OPS[op].axes, None))  # the scale now follows the shape
    torch.manual_seed(0)
    with pytest.raises(VerificationError) as error:
        assert_exact(ZOO["attention"].build(), (torch.randn(2, 5, 10),), regions="root")
    first, second = str(error.value).split("; ")
    assert first.startswith("`qk` with 2 entries removed differs from masking: output ")
    assert second.startswith("`all of the model` with ")


def test_assert_exact_passes_nothing_that_it_did_not_check() -> None:
    with pytest.raises(NoCouplingError, match="has no coupling that can shrink"):
        assert_exact(nn.Linear(3, 4), (torch.randn(2, 3),))


def test_assert_exact_misses_no_region() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(2))

        def forward(self, x: torch.Tensor, both: bool = True) -> torch.Tensor:
            return self.b(self.a(x)) if both else self.a(x)

    x = torch.randn(2, 6)
    model = ecospa_fx.compile(Two(), example_inputs=(x,), regions=["a", "b"])
    assert len(assert_exact(model, (x,)).by_coupling) == 4
    with pytest.raises(VerificationError) as error:
        assert_exact(copy.deepcopy(model), (x, False))
    assert str(error.value) == (
        "`b.ffn` was never compared: this call of the model does not run it; pass example_inputs that do"
    )


def test_a_small_gradient_is_noise_only_to_rounding_of_the_largest() -> None:
    small, off = torch.full((3,), 1e-11, dtype=torch.float64), torch.full((3,), 1e-12, dtype=torch.float64)
    assert _gradient_error(small, small + off, scale=1.0, tolerance=1e-10) == pytest.approx(0.1)
    assert _gradient_error(small, small + off / 5, scale=1.0, tolerance=1e-10) < 3e-13
    # Where a norm computes in float32 on the way, its rounding is what there is.
    assert _gradient_error(small, small + off, scale=1.0, tolerance=1e-5) < 1e-11
