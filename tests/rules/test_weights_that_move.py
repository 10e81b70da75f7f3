"""A weight is a weight however its entries are moved on the way to where it is used."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ecospa_fx

X = torch.randn(5, 6, dtype=torch.float64)

# Ways to get a `[6, 12]` of a `[12, 6]`, or the other way round.
TRANSPOSING = {
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "mH": lambda w: w.mH,
    "adjoint": lambda w: w.adjoint(),
    "transpose": lambda w: w.transpose(0, 1),
    "swapaxes": lambda w: w.swapaxes(0, 1),
    "swapdims": lambda w: w.swapdims(0, 1),
    "movedim": lambda w: w.movedim(0, 1),
    "moveaxis": lambda w: w.moveaxis(0, 1),
    "permute": lambda w: w.permute(1, 0),
}

# Ways that give back a matrix of the same shape.
KEEPING = {
    "view": lambda w: w.view(w.shape),
    "view_as": lambda w: w.view_as(torch.empty(w.shape)),
    "reshape_as": lambda w: w.reshape_as(torch.empty(w.shape)),
    "flatten and unflatten": lambda w: w.flatten().unflatten(0, w.shape),
    "unflatten": lambda w: w.unflatten(0, (1, -1)).squeeze(0),
    "type_as": lambda w: w.type_as(torch.empty((), dtype=w.dtype)),
    "to": lambda w: w.to(torch.float64),
    "expand_as": lambda w: w.expand_as(torch.empty(w.shape)),
    "expand": lambda w: w.expand(w.shape),
    "broadcast_to": lambda w: w.broadcast_to(w.shape),
    "narrow": lambda w: w.narrow(0, 0, w.shape[0]),
    "slice": lambda w: w[:, : w.shape[1]],
    "chunk": lambda w: w.chunk(1)[0],
    "split": lambda w: w.split(w.shape[0])[0],
    "select": lambda w: w[None][0],
    "unbind": lambda w: w[None].unbind()[0],
    "unsqueeze and squeeze": lambda w: w.unsqueeze(1).squeeze(1),
    "squeeze": lambda w: w[None].squeeze(),
    "repeat": lambda w: w.repeat(1, 1),
    "tile": lambda w: w.tile(1),
    "contiguous": lambda w: w.contiguous(),
    "clone": lambda w: w.clone(),
    "positive": lambda w: +w,
    "dropout(0)": lambda w: F.dropout(w, 0.0),
    "dropout in eval": lambda w: F.dropout(w, 0.5, training=False),
    "times 1": lambda w: w * 1.0,
    "times a number": lambda w: 0.5 * w,
    "divided by a number": lambda w: w / 2,
    "negated": lambda w: -w,
    "a number added": lambda w: 1.0 + w,
}


class Two(nn.Module):
    """`relu(x @ how(a)) @ how(b)`."""

    def __init__(self, how, transposing):
        super().__init__()
        self.how = how
        shapes = ((12, 6), (6, 12)) if transposing else ((6, 12), (12, 6))
        self.a, self.b = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes)

    def forward(self, x):
        return torch.relu(x @ self.how(self.a)) @ self.how(self.b)


class Attention(nn.Module):
    """Two heads of three dims; weights are read as `x @ how(w)`."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.randn(6, 6, dtype=torch.float64)) for _ in range(4))

    def forward(self, x):
        q, k, v = ((x @ self.how(w)).unflatten(-1, (2, 3)).transpose(0, 1) for w in (self.q, self.k, self.v))
        out = (q @ k.mT / 3**0.5).softmax(-1) @ v
        return out.transpose(0, 1).flatten(1) @ self.how(self.o)


def kinds(model, x=X):
    ecospa_fx.compile(model, example_inputs=(x,), regions="root")
    found = ecospa_fx.couplings(model)
    assert ecospa_fx.verify(model, example_inputs=(x,)).ok
    return {(c.kind, c.size) for c in found}


@pytest.mark.parametrize("name", list(TRANSPOSING))
def test_two_weights_that_are_transposed_are_an_ffn(name):
    assert kinds(Two(TRANSPOSING[name], True)) == {("ffn", 12)}


@pytest.mark.parametrize("name", list(KEEPING))
def test_two_weights_that_keep_their_shape_are_an_ffn(name):
    assert kinds(Two(KEEPING[name], False)) == {("ffn", 12)}


def test_parts_of_a_weight_that_are_put_together_again_are_couplings_of_their_own():
    assert kinds(Two(lambda w: torch.cat(w.chunk(2)), False)) == {("ffn", 6)}


@pytest.mark.parametrize("how", [lambda w: w.flip(0), lambda w: w.roll(1, 0), lambda w: w.roll((2, 0), (0, 1))])
def test_an_axis_that_must_stay_whole_does_not_hide_the_other(how):
    class Shuffled(Two):
        def forward(self, x):
            return torch.relu(x @ how(self.a)) @ self.b

    assert kinds(Shuffled(None, False)) == {("ffn", 12)}


@pytest.mark.parametrize("name", ["swapaxes", "movedim", "mH", "permute", "adjoint"])
def test_attention_finds_what_it_finds_with_T(name):
    torch.manual_seed(0)
    assert kinds(Attention(TRANSPOSING[name])) == kinds(Attention(TRANSPOSING["T"]))
    assert {kind for kind, _ in kinds(Attention(TRANSPOSING[name]))} >= {"qk", "vo", "heads"}
