"""Tensors from outside of which a module takes only some entries: rotary tables, biases of positions."""

from __future__ import annotations

import copy
import functools
import json
import pickle

import pytest
import torch
from torch import nn
from twin import kept_positions, zeroed

import ecospa_fx
from ecospa_fx import errors
from ecospa_fx.model.lookup import state_of
from ecospa_fx.passes.follow.saved import changes_in, changes_listed

WIDTH, HEADS, DIM, LENGTH = 20, 3, 8, 5


def turned(x, sines, cosines):
    a, b = x.chunk(2, -1)
    return x * cosines + torch.cat([-b, a], -1) * sines


class Attention(nn.Module):
    """One number for all heads; the tables and the bias are made outside, and the bias is handed on."""

    def __init__(self):
        super().__init__()
        self.head_dim, self.kept_scale = DIM, DIM**-0.5
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIM) for _ in "qkv")
        self.out = nn.Linear(HEADS * DIM, WIDTH)

    def scale(self):
        return self.kept_scale

    def forward(self, x, tables, bias=None):
        b, s, _ = x.shape
        q, k, v = (f(x).view(b, s, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = turned(q, *tables), turned(k, *tables)
        y = (q @ k.mT * self.scale() + bias).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, s, -1)), bias


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.up, self.down = Attention(), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x, tables, bias):
        y, bias = self.attention(x, tables, bias=bias)
        x = x + y
        return x + self.down(self.up(x).relu()), bias


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.register_buffer("turns", torch.rand(DIM // 2, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("steps", torch.randn(HEADS, 9, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        at = torch.arange(x.shape[1])
        angles = (at[:, None] * self.turns).repeat(1, 2)
        bias = self.steps[:, (at[:, None] - at).clamp(-4, 4) + 4]
        for block in self.blocks:
            x, bias = block(x, (angles.sin(), angles.cos()), bias)
        return x


X = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
KEEPS = {
    "blocks.0.attention.qk": torch.tensor([1, 2]),
    "blocks.0.attention.vo": torch.tensor([0, 3, 4, 7]),
    "blocks.1.attention.heads": torch.tensor([0, 2]),
    "blocks.1.attention.qk": torch.tensor([0, 1, 3]),
    "blocks.1.attention.vo": torch.tensor([0, 1, 2, 3, 4, 6]),
}


@functools.cache
def original(regions):
    torch.manual_seed(0)
    plain = Net().double().eval()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(X,), execution="module", regions=regions)
    return plain, model


@pytest.mark.parametrize("regions", ["blocks", "root"])
def test_each_layer_takes_its_own_entries(regions, tmp_path):
    plain, model = original(regions)
    model = copy.deepcopy(model)
    by_name = {c.name: c for c in ecospa_fx.couplings(model)}
    assert by_name["blocks.1.attention.heads"].changes == ("blocks.1.attention(bias)[0]",)
    assert by_name["blocks.0.attention.vo"].in_step == ("blocks.0.attention.qk",)
    tables = ("blocks.0.attention(tables.0)[1]", "blocks.0.attention(tables.1)[1]")
    assert by_name["blocks.0.attention.qk"].changes == (*tables, "blocks.0.attention.head_dim")
    positions = kept_positions(plain, {by_name[name]: keep for name, keep in KEEPS.items()})
    ecospa_fx.shrink(model, KEEPS)
    masked = zeroed(plain, positions)
    with torch.no_grad():
        torch.testing.assert_close(model(X), masked(X), rtol=1e-9, atol=1e-10)
        longer = torch.randn(1, LENGTH + 2, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(model(longer), masked(longer), rtol=1e-9, atol=1e-10)
    model(X).sum().backward()
    ecospa_fx.save(model, tmp_path)
    loaded = ecospa_fx.load(tmp_path, lambda: copy.deepcopy(plain))
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(X), model(X))
    more = {"blocks.1.attention.qk": torch.tensor([1, 2]), "blocks.1.attention.vo": torch.arange(4)}
    for each in (model, loaded):
        ecospa_fx.shrink(each, more)
    torch.testing.assert_close(loaded(X), model(X))
    assert model.blocks[1].attention.head_dim == 4 and type(model.blocks[1].attention) is not Attention
    with pytest.raises(errors.RestoreError) as caught:
        ecospa_fx.restore(model)
    assert str(caught.value) == (
        "`blocks.0.attention` has shrunk and takes 4 of 8 entries of dim 1 of `tables.0`, which the model around it "
        "makes at full size. Keep the model compiled"
    )


def test_one_that_is_given_something_else_says_so():
    _, model = original("blocks")
    model = copy.deepcopy(model)
    ecospa_fx.shrink(model, {name: keep for name, keep in KEEPS.items() if name.startswith("blocks.0")})
    tables, bias = torch.ones(2, LENGTH, DIM + 2).double().unbind(0), torch.zeros(HEADS, LENGTH, LENGTH).double()
    with pytest.raises(errors.ShrinkError) as caught:
        model.blocks[0].attention(X, tables, bias)
    assert str(caught.value) == (
        "Attention has shrunk and takes 4 of 8 entries of dim 1 of `tables.0`, which is (5, 10): call it as the model "
        "was captured, or use execution='graph'"
    )
    broadcast = torch.ones(LENGTH, 1).double()
    whole = torch.ones(LENGTH, DIM).double()
    args = ((broadcast, broadcast), bias), ((whole, whole), bias)
    torch.testing.assert_close(*(model.blocks[0].attention(X, *given)[0] for given in args))
    assert model.blocks[0].attention(X, (whole, whole), bias)[1] is bias


def test_what_fails_or_is_taken_back_leaves_the_classes():
    plain, model = original("blocks")
    model = copy.deepcopy(model)
    with pytest.raises(errors.ShrinkError):
        ecospa_fx.shrink(model, {"blocks.0.attention.qk": torch.tensor([0])})
    assert [type(m) for m in plain.blocks[0].attention.children()] == [nn.Linear] * 4
    assert type(model.blocks[0].attention) is Attention and "_ecospa_given" not in vars(model.blocks[0].attention)
    torch.testing.assert_close(model(X), plain(X))


@pytest.mark.parametrize("positions", ["[]", "[2,1]", "[0,3]", "[0,true]", "1"])
def test_positions_in_a_save_are_checked(positions):
    _, model = original("blocks")
    model = copy.deepcopy(model)
    ecospa_fx.shrink(model, {"blocks.1.attention.heads": torch.tensor([0, 2])})
    listed = changes_listed(state_of(model).attributes)
    assert changes_in(json.loads(json.dumps(listed)), "it") == state_of(model).attributes
    assert [each[-1] for each in listed if len(each) == 7] == [(0, 2)]
    for each in listed:
        each[-1] = json.loads(positions) if len(each) == 7 else each[-1]
    with pytest.raises(errors.CheckpointError, match=r"^it has an attribute that is none|^it lets `blocks"):
        changes_in(json.loads(json.dumps(listed)), "it")


def test_a_scale_that_follows_the_number_is_refused():
    """Queries and keys follow only with a number from which it computes their scale, at every call."""
    torch.manual_seed(0)
    plain = Net().double().eval()
    for block in plain.blocks:
        block.attention.__class__ = Scaled
    model = ecospa_fx.compile(plain, example_inputs=(X,), execution="module")
    assert {c.kind for c in ecospa_fx.couplings(model)} == {"heads", "ffn"}


class Scaled(Attention):
    def scale(self):
        return self.head_dim**-0.5
