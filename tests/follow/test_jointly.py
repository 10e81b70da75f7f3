"""Couplings that its own Python follows only together: queries, keys and values through one length of heads."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from twin import kept_positions, zeroed

import ecospa_fx
from ecospa_fx import errors

WIDTH, HEADS, DIM = 20, 3, 6


class Attention(nn.Module):
    """One number for the length of queries, keys and values, and a scale that was computed from it once."""

    def __init__(self):
        super().__init__()
        self.heads, self.head_dim, self.kept_scale = HEADS, DIM, DIM**-0.5
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIM) for _ in "qkv")
        self.out = nn.Linear(HEADS * DIM, WIDTH)

    def scale(self):
        return self.kept_scale

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = (f(x).view(b, s, self.heads, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.mT * self.scale()).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(b, s, self.heads * self.head_dim))


class Rescaled(Attention):
    """Computes its scale from the number at every call, so that other numbers give other results."""

    def scale(self):
        return self.head_dim**-0.5


X = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@functools.cache
def original():
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention()).double().eval()
    return copy.deepcopy(model), ecospa_fx.compile(model, example_inputs=(X,), execution="module")


def net():
    plain, model = original()
    return plain, copy.deepcopy(model)


def test_they_shrink_together_and_their_number_follows(tmp_path):
    plain, model = net()
    by_name = {c.name: c for c in ecospa_fx.couplings(model)}
    assert by_name["0.qk"].in_step == ("0.vo",) and by_name["1.vo"].in_step == ("1.qk",)
    assert by_name["0.qk"].changes == ("0.head_dim",) and by_name["0.heads"].in_step == ()
    keeps = {"0.qk": torch.tensor([0, 3]), "0.vo": torch.tensor([1, 5]), "1.heads": torch.tensor([0, 2])}
    positions = kept_positions(plain, {by_name[name]: keep for name, keep in keeps.items()})
    ecospa_fx.shrink(model, keeps)
    assert (model[0].head_dim, model[0].kept_scale, model[1].head_dim, model[1].heads) == (2, DIM**-0.5, DIM, 2)
    masked = zeroed(plain, positions)
    with torch.no_grad():
        torch.testing.assert_close(model(X), masked(X), rtol=1e-9, atol=1e-10)
    ecospa_fx.save(model, tmp_path)
    loaded = ecospa_fx.load(tmp_path, lambda: copy.deepcopy(plain))
    torch.testing.assert_close(loaded(X), model(X))
    assert [c.in_step for c in ecospa_fx.couplings(loaded)] == [c.in_step for c in ecospa_fx.couplings(model)]


def test_alone_they_are_refused_and_nothing_changes():
    plain, model = net()
    for keeps in ({"0.qk": torch.arange(3)}, {"0.qk": torch.arange(3), "0.vo": torch.arange(4)}):
        with pytest.raises(errors.ShrinkError) as caught:
            ecospa_fx.shrink(model, keeps)
        other = 6 if len(keeps) == 1 else 4
        assert str(caught.value) == (
            f"cannot shrink `0.qk` to 3 of 6 beside `0.vo` at {other} of 6: the model's own Python has one number for "
            "both (0.head_dim); keep the same share of both, or use execution='graph'"
        )
    torch.testing.assert_close(model(X), plain(X))


def test_a_trainer_keeps_them_in_step():
    _, model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.4, interval=1, end=3, frozen=["*.heads"])
    trainer.fit([(X, X)] * 4, loss=nn.functional.mse_loss)
    sizes = {c.name: c.size for c in ecospa_fx.couplings(model)}
    assert trainer.done and sizes["0.qk"] == sizes["0.vo"] and sizes["1.qk"] == sizes["1.vo"]
    assert min(sizes["0.qk"], sizes["1.qk"]) < DIM and [a.head_dim for a in model] == [sizes["0.qk"], sizes["1.qk"]]
    frozen = ecospa_fx.Constraints(frozen=["0.vo"])
    _, whole = frozen.units(model, ecospa_fx.couplings(model))
    assert whole["0.qk"] == "its own Python ties it to `0.vo`, which stays whole: frozen by `0.vo`"


def test_a_scale_that_would_change_is_a_reason_to_refuse():
    torch.manual_seed(0)
    model = ecospa_fx.compile(Rescaled().double().eval(), example_inputs=(X,), regions="root", execution="module")
    assert {c.kind for c in ecospa_fx.couplings(model)} == {"heads"}
