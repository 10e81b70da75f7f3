"""Blocks whose Python reads dtypes that autocast changes: a graph for each autocast, exact beside eager under it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from twin import half, kept_positions, zeroed

import ecospa_fx
from ecospa_fx import errors
from ecospa_fx.model.lookup import regions_of

HEADS, WIDTH = 4, 16


class Block(nn.Module):
    """Attention that masks by the least number of the dtype of its scores, and hands on the eps of another."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, torch.finfo(scores.dtype).min).softmax(-1)
        x = x + self.out((scores @ v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu()) * (1 + 10 * torch.finfo(scores.dtype).eps)


def models(**how):
    torch.manual_seed(0)
    plain = nn.Sequential(Block(), Block())
    return plain, ecospa_fx.compile(copy.deepcopy(plain), **how), torch.randn(2, 5, WIDTH)


def under(model, x, dtype):
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return model(x)


def traced_so(model):
    return [each.captured.under_autocast for region in regions_of(model).values() for each in region.specializations]


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float16, None], ids=str)
def test_the_same_as_eager_under_each(first):
    plain, model, x = models()
    for dtype in (first, torch.bfloat16, None, torch.float16, torch.bfloat16, None):
        expected, got = under(plain, x, dtype), under(model, x, dtype)
        assert torch.equal(got, expected) and got.dtype == expected.dtype
    assert sorted(traced_so(model)) == [False] * 2 + [True] * 4  # two blocks, each with a graph per autocast
    assert {c.kind for c in ecospa_fx.couplings(model)} == {"heads", "qk", "vo", "ffn"}


def test_gradients_and_a_shrink():
    plain, model, x = models()
    under(model, x, torch.bfloat16)
    keeps = {c: half(c.size, i) for i, c in enumerate(ecospa_fx.couplings(model))}
    positions = kept_positions(plain, keeps)
    twin = zeroed(plain, positions)
    ecospa_fx.shrink(model, keeps)
    for dtype in (torch.bfloat16, None):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, expected = under(model, ours, dtype), under(twin, theirs, dtype)
        tolerance = 1e-5 if dtype is None else 2e-2
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        got.square().sum().backward()
        expected.square().sum().backward()
        error = (ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert error < tolerance
    assert True in traced_so(model) and False in traced_so(model)


def test_it_is_restored():
    _, model, x = models(regions="root")
    under(model, x, torch.bfloat16)
    hidden = [c for c in ecospa_fx.couplings(model) if c.kind == "ffn"]
    ecospa_fx.shrink(model, {c: torch.arange(7) for c in hidden})
    expected = under(model, x, torch.bfloat16)
    assert all(traced_so(model))
    assert torch.equal(under(ecospa_fx.restore(model), x, torch.bfloat16), expected)


class Moody(nn.Module):
    """Other numbers without gradients, by less than the rounding of bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x):
        return self.down(self.up(x).relu()) * (1.0 if torch.is_grad_enabled() else 1.001)


def test_what_differs_without_autocast_is_not_tried_under_it():
    x = torch.randn(2, 5, WIDTH)
    for dtype in (None, torch.bfloat16):
        with pytest.raises(errors.CaptureError, match="is another than with them, by"):
            under(ecospa_fx.compile(Moody(), regions="root"), x, dtype)
