"""Layout in memory: a shrunk model asks of no kernel the order of entries that another kernel gave it before."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from twin import assert_equals_twin, kept_positions, selections, zeroed

import ecospa_fx


def joined(how, y, x, value):
    """The heads in `y`, (batch, time, heads, width), side by side as in `x`: ways that ask for an order in memory."""
    b, t, c = x.shape
    match how:
        case "view":
            return y.view(b, t, c)
        case "view_as":
            return y.view_as(x)
        case "flat":
            return y.view(-1, c).view(b, t, c)
        case "complex":
            return torch.view_as_real(torch.view_as_complex(y.view(b, t, c // 2, 2)) * 1j).view(b, t, c)
        case "bits":
            return y.view(torch.int64).view(torch.float64).view_as(x)
        case "strided":
            return y.view_as(x) * y.as_strided((), ())
        case "written":  # through a view, and read by another name
            y.view_as(x).mul_(value)
            return (y + 1.0).reshape(b, t, c)


class Attention(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.scale = nn.Parameter(torch.rand(16))
        self.how = how

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (part(x).view(b, t, 4, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = (F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2.0).transpose(1, 2).contiguous()
        return self.o(joined(self.how, y, x, self.scale))


@pytest.mark.parametrize(
    ("how", "kinds"),
    [
        ("view", {"heads", "qk", "vo"}),
        ("view_as", {"heads", "qk", "vo"}),
        ("flat", {"heads", "qk", "vo"}),
        ("complex", {"heads", "qk"}),
        ("bits", {"qk"}),
        ("strided", {"qk"}),
        ("written", {"qk"}),
    ],
)
def test_after_attention_whose_kernel_changes_with_its_sizes(how, kinds):
    torch.manual_seed(0)
    x, plain = torch.randn(2, 5, 16, dtype=torch.float64), Attention(how).double()
    compiled = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,))
    couplings = ecospa_fx.couplings(compiled)
    assert {c.kind for c in couplings} >= kinds
    for name, keeps in selections(couplings):
        model = copy.deepcopy(compiled)
        ecospa_fx.shrink(model, {c: keeps[c] for c in keeps})
        positions = kept_positions(plain, keeps)
        assert_equals_twin(model, zeroed(plain, positions), positions, (x,), {}, name)


class Rotary(nn.Module):
    """Pairs behind a part that may come out with an odd number of entries."""

    def __init__(self):
        super().__init__()
        self.a, self.gate, self.o = nn.Linear(6, 20), nn.Linear(8, 6), nn.Linear(12, 6)

    def forward(self, x):
        g, q = self.a(x).split([8, 12], -1)
        turned = torch.view_as_complex(q.view(*q.shape[:-1], 6, 2)) * 1j
        return self.o(torch.view_as_real(turned).flatten(-2)) + self.gate(g.relu())


def test_pairs_that_begin_at_an_odd_place():
    torch.manual_seed(0)
    x, plain = torch.randn(3, 4, 6, dtype=torch.float64), Rotary().double()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,))
    (gate,) = [c for c in ecospa_fx.couplings(model) if any(m.parameter == "gate.weight" for m in c.members)]
    keeps = {gate: torch.tensor([0, 2, 3, 5, 7])}
    ecospa_fx.shrink(model, keeps)
    positions = kept_positions(plain, keeps)
    assert_equals_twin(model, zeroed(plain, positions), positions, (x,), {}, "an odd part")


class Filter(nn.Module):
    """A weight of pairs, which torch takes for complex numbers where they lie side by side."""

    def __init__(self, order):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)
        self.pairs = nn.Parameter(torch.randn(5, 8, 2))
        self.order = order
        if order == "dims swapped":
            self.pairs.data = torch.randn(8, 5, 2).transpose(0, 1)
        if order == "a buffer":
            self.register_buffer("scale", torch.randn(8, 2))

    def forward(self, x):
        weight = torch.view_as_complex(self.pairs)
        if self.order == "a view":
            weight = weight * self.pairs.view(-1, 16).view(5, 8, 2).sum(-1)
        if self.order == "a buffer":
            weight = weight * torch.view_as_complex(self.scale)
        return self.b(torch.fft.ifft(torch.fft.fft(self.a(x), dim=1) * weight, dim=1).real)


@pytest.mark.parametrize("order", ["as made", "dims swapped", "a view", "a buffer"])
def test_a_new_call_of_a_model_whose_shrunk_weights_are_viewed(order):
    torch.manual_seed(0)
    x, plain = torch.randn(2, 5, 3, dtype=torch.float64), Filter(order).double()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,))
    keeps = {c: torch.arange(0, c.size, 3) for c in ecospa_fx.couplings(model)}
    assert keeps
    ecospa_fx.shrink(model, keeps)
    positions = kept_positions(plain, keeps)
    twin = zeroed(plain, positions)
    for training in (True, False):  # each captured anew, at original sizes
        model.train(training), twin.train(training)
        assert_equals_twin(model, twin, positions, (x,), {}, f"{order}, training {training}")
