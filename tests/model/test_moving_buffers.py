"""Buffers that only training computes, met after a shrink: they lose the entries that the shrink has taken."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.errors import PinnedAxisError

X = torch.linspace(-1, 1, 20).reshape(5, 4)


class Norm(nn.Module):
    """A batch norm by hand between two layers, and what a case reads of its mean."""

    def __init__(self, hidden: int = 6, reading: str = "mean") -> None:
        super().__init__()
        self.up, self.down, self.reading = nn.Linear(4, hidden), nn.Linear(hidden, 4), reading
        self.register_buffer("mean", torch.zeros(hidden))
        self.register_buffer("var", torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x))
        if self.training:
            mean, var = h.detach().mean(0), h.detach().var(0)
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * mean)
                self.var.mul_(0.9).add_(0.1 * var)
        else:
            mean, var = self.mean, self.var
            if self.reading == "order":
                mean = mean.cumsum(0)
        return self.down((h - mean) * torch.rsqrt(var + 1e-2))


KEEP = torch.tensor([0, 2, 5])


def smaller(model: nn.Module) -> nn.Module:
    """Build the same class at the size that is left."""
    small = Norm(len(KEEP)).train(model.training)
    state = {"up.weight": (0,), "up.bias": (0,), "down.weight": (1,), "mean": (0,), "var": (0,)}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            for dim in state.get(name, ()):
                tensor = tensor.index_select(dim, KEEP)
            small.state_dict()[name].copy_(tensor)
    return small


def equal_steps(model: nn.Module, small: nn.Module, modes: list[bool]) -> None:
    """Compare results, gradients and buffers, call by call."""
    for number, training in enumerate(modes):
        results = [each.train(training)(X + number) for each in (model, small)]
        torch.testing.assert_close(*results)
        grads = [torch.autograd.grad(out.square().sum(), list(each.parameters()))
                 for out, each in zip(results, (model, small), strict=True)]  # fmt: skip
        torch.testing.assert_close(*grads)
    if True in modes:
        torch.testing.assert_close(dict(model.named_buffers()), dict(small.named_buffers()))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_mode_that_is_met_after_a_shrink(first: bool, loaded: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: nn.Module = Norm().train(first)
    model.var.uniform_(0.5, 2.0)
    small = smaller(model)
    ecospa_fx.compile(model, example_inputs=(X,))
    ecospa_fx.shrink(model, {"ffn": KEEP})
    if loaded:
        ecospa_fx.save(model, tmp_path / "save")
        model = ecospa_fx.load(tmp_path / "save", Norm)
    equal_steps(model, small, [not first, first, not first, first])
    assert model.mean.shape == model.var.shape == (3,)
    ecospa_fx.shrink(model, {"ffn": torch.tensor([1])})  # and on
    assert model.mean.shape == (1,) and model.train()(X).shape == model.eval()(X).shape == (5, 4)


def test_its_own_python_meets_the_other_mode_after_a_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: nn.Module = Norm()
    small = smaller(model)
    ecospa_fx.compile(model, example_inputs=(X,), execution="module")
    ecospa_fx.shrink(model, {"ffn": KEEP})
    ecospa_fx.save(model, tmp_path / "save")
    equal_steps(ecospa_fx.load(tmp_path / "save", Norm), small, [False, True, False])


def test_a_mode_that_cannot_follow_is_refused_and_nothing_has_changed() -> None:
    model = Norm(reading="order").eval()
    ecospa_fx.compile(model, example_inputs=(X,))
    assert [c.name for c in ecospa_fx.couplings(model)] == ["ffn"]  # a table, to a graph of eval mode
    ecospa_fx.shrink(model, {"ffn": KEEP})
    before, plan, expected = copy.deepcopy(model.state_dict()), ecospa_fx.plan(model), model(X)
    with pytest.raises(PinnedAxisError):
        model.train()(X)
    now: Any = model.state_dict()
    assert all(torch.equal(before[name], now[name]) for name in before) and ecospa_fx.plan(model) == plan
    assert torch.equal(model.eval()(X), expected)
