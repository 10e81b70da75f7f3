"""Weights of norms take over the factor by which their statistics change: by least squares, or as if nothing went."""

import copy
import math

import pytest
import torch
from test_absorb import gathered
from torch import nn
from torch.optim import AdamW

import ecospa_fx

WIDTH, LEFT = 12, 8


class ByHand(nn.Module):
    """A root mean square norm as models write it, with a weight that may be counted from 1."""

    def __init__(self, width, offset=0.0):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.rand(width) + 0.5 - offset), offset

    def forward(self, x):
        h = x.float() if x.dtype == torch.float16 else x
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-12)
        return (self.offset + self.weight) * h.to(x.dtype)


class CentredByHand(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.var(-1, keepdim=True, unbiased=False) + 1e-12).sqrt() * self.scale + self.shift


def layer_norm(width):
    norm = nn.LayerNorm(width, eps=1e-12)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


def rms_norm(width):
    norm = nn.RMSNorm(width, eps=1e-12)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


NORMS = {
    "rms_norm": rms_norm, "by_hand": ByHand, "counted_from_one": lambda width: ByHand(width, 1.0),
    "layer_norm": layer_norm, "centred_by_hand": CentredByHand,
}  # fmt: skip


class Between(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, WIDTH), norm, nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


class Block(nn.Module):
    def __init__(self, norm, width=WIDTH):
        super().__init__()
        self.norm, self.up, self.down = norm, nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Stream(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(Block(NORMS[kind](WIDTH)) for _ in range(2))
        self.norm, self.head = NORMS[kind](WIDTH), nn.Linear(WIDTH, 20)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def built(kind):
    torch.manual_seed(0)
    model, x = Between(NORMS[kind](WIDTH)).double(), torch.randn(200, 5, dtype=torch.float64)
    return model, x


@torch.no_grad()
def silence(linear, entries):
    linear.weight[entries], linear.bias[entries] = 0.0, 0.0


@pytest.mark.parametrize("kind", ["rms_norm", "by_hand", "counted_from_one"])
@pytest.mark.parametrize("seen", [False, True], ids=["without_data", "with_data"])
def test_where_entries_carry_nothing_the_factor_is_the_root_of_the_counts(kind, seen):
    """The mean of squares is over fewer entries, and so it is larger, by `n / n_left`."""
    model, x = built(kind)
    silence(model.a, slice(LEFT, WIDTH))
    expected, before = model(x), dict(copy.deepcopy(model).named_parameters())
    ecospa_fx.compile(model, example_inputs=(x,))
    (coupling,) = ecospa_fx.couplings(model)
    grams = gathered(model, *((x,),) * seen)
    ecospa_fx.shrink(model, {coupling: torch.arange(LEFT)}, absorb=grams)
    offset = getattr(model.norm, "offset", 0.0)
    factor = (model.norm.weight + offset) / (before["norm.weight"][:LEFT] + offset)
    tolerance = 1e-2 if seen else 1e-6  # with data it leans to what was, by one position in all
    torch.testing.assert_close(factor, torch.full_like(factor, math.sqrt(WIDTH / LEFT)), rtol=tolerance, atol=0)
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", sorted(NORMS))
def test_the_vectors_are_those_of_least_squares(kind):
    """Beside numpy's least squares, channel by channel, on what the plain norm returns for what was seen."""
    model, x = built(kind)
    with torch.no_grad():
        model.a.weight[1::2] *= 2  # those that go
    wide = copy.deepcopy(model)
    ecospa_fx.compile(model, example_inputs=(x,))
    (coupling,) = ecospa_fx.couplings(model)
    keep = torch.arange(WIDTH)[::2]
    ecospa_fx.shrink(model, {coupling: keep}, absorb=gathered(model, (x,), rows=500))
    with torch.no_grad():
        hidden = wide.a(x)
        target = wide.norm(hidden)[:, keep]
        mean = 0.0 if kind in ("rms_norm", "by_hand", "counted_from_one") else hidden[:, keep].mean(1, keepdim=True)
        shaped = hidden[:, keep] - mean
        shaped = shaped / shaped.square().mean(1, keepdim=True).sqrt()
    names = [n for n, _ in model.norm.named_parameters()]
    before = {name: parameter.detach().clone() for name, parameter in wide.norm.named_parameters()}
    before[names[0]] += getattr(model.norm, "offset", 0.0)
    totals = [0.0, 0.0, 0.0]
    for channel in range(len(keep)):
        columns = [shaped[:, channel]] + [torch.ones(len(x), dtype=torch.float64)] * (len(names) - 1)
        offset = getattr(model.norm, "offset", 0.0)
        columns = torch.stack(columns, 1)
        best = torch.linalg.lstsq(columns, target[:, channel, None]).solution[:, 0]
        found = torch.stack([getattr(model.norm, name)[channel] for name in names]).detach()
        found[0] += offset
        old = torch.stack([before[name][keep[channel]] for name in names])
        errors = [float((columns @ v - target[:, channel]).square().sum()) for v in (best, found, old)]
        assert errors[1] <= 1.02 * errors[0]
        totals = [a + b for a, b in zip(totals, errors)]
    assert totals[1] < 0.7 * totals[2]


def test_channels_in_groups_and_positions_of_an_image():
    """A group loses as many channels as another; the statistics are over channels and positions."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 8, eps=1e-12)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 2, 1)).double()
    with torch.no_grad():
        model[0].weight[[3, 7]] *= 0.01
        model[0].bias.zero_()
        norm.bias[[3, 7]] = 0.0
    x = torch.randn(16, 3, 6, 6, dtype=torch.float64)
    expected, plain = model(x).detach(), copy.deepcopy(model)
    keep = torch.tensor([0, 1, 2, 4, 5, 6])
    errors = []
    for each, absorbing in ((plain, False), (model, True)):
        ecospa_fx.compile(each, example_inputs=(x,))
        (coupling,) = [c for c in ecospa_fx.couplings(each) if c.size in (4, 8)]
        grams = gathered(each, (x,)) if absorbing else None
        grams_alone = None if grams is None else grams._norms
        ecospa_fx.shrink(each, {coupling: keep if coupling.size == 8 else torch.arange(3)}, absorb=grams_alone)
        errors.append(float((each(x).detach() - expected).norm() / expected.norm()))
    assert errors[1] < 0.4 * errors[0]


@pytest.mark.parametrize("kind", ["by_hand", "layer_norm"])
@pytest.mark.parametrize("regions", ["root", "joined"])
def test_a_stream_with_a_few_weak_entries_computes_nearly_what_it_did(kind, regions):
    """On tokens that were not seen, and by blocks as by the root."""
    torch.manual_seed(0)
    model = Stream(kind).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down" in name:
                parameter[LEFT:] *= 0.05
            elif "embed" in name:
                parameter[:, LEFT:] *= 0.05
    seen, unseen = torch.randint(0, 20, (2, 8, 30))
    expected, errors = model(unseen).detach(), []
    for how in ("plain", "norms", "all"):
        shrunk = copy.deepcopy(model)
        ecospa_fx.compile(shrunk, example_inputs=(seen,), regions=regions)
        (coupling,) = [c for c in ecospa_fx.couplings(shrunk) if c.kind == "residual"]
        grams = gathered(shrunk, (seen,))
        absorb = {"plain": None, "norms": grams._norms, "all": grams}[how]
        ecospa_fx.shrink(shrunk, {coupling: torch.arange(LEFT)}, absorb=absorb)
        errors.append(float((shrunk(unseen).detach() - expected).norm() / expected.norm()))
    # Behind a mean, weak entries are as large as the mean: a factor is not all that changes.
    assert errors[1] < (0.5 if kind == "by_hand" else 0.99) * errors[0] and errors[2] < 0.5 * errors[0], errors


def test_copies_and_averages_follow_and_momentum_is_sliced():
    model, x = built("rms_norm")
    ecospa_fx.compile(model, example_inputs=(x,))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    model(x).square().mean().backward()
    optimizer.step()
    average = copy.deepcopy(model)
    with torch.no_grad():
        average.norm.weight *= 3
    momentum = optimizer.state[model.norm.weight]["exp_avg"].clone()
    before = model.norm.weight.detach().clone()
    grams = gathered(model, (x,))
    (coupling,) = ecospa_fx.couplings(model)
    keep = torch.arange(LEFT)
    ecospa_fx.shrink(model, {coupling: keep}, absorb=grams, optimizer=optimizer, also=average)
    assert torch.equal(optimizer.state[model.norm.weight]["exp_avg"], momentum[keep])
    assert not torch.equal(model.norm.weight, before[keep])
    torch.testing.assert_close(average.norm.weight, 3 * model.norm.weight)  # with the same ridge, the same factor


def test_what_was_read_goes_into_the_state_of_grams():
    model, x = built("rms_norm")
    ecospa_fx.compile(model, example_inputs=(x,))
    twin = copy.deepcopy(model)
    grams = gathered(model, (x,))
    again = ecospa_fx.Grams(twin)
    again.load_state_dict(grams.state_dict())
    for each, moments in ((model, grams), (twin, again)):
        (coupling,) = ecospa_fx.couplings(each)
        ecospa_fx.shrink(each, {coupling: torch.arange(LEFT)}, absorb=moments)
    assert torch.equal(model.norm.weight, twin.norm.weight)
    again.detach()


def test_a_weight_that_something_else_uses_stays_as_it_is():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(5, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 4)

        def forward(self, x):
            h = self.a(x)
            return self.b(self.norm(h) + h * self.norm.weight)

    torch.manual_seed(0)
    model, x = Shared().double(), torch.randn(40, 5, dtype=torch.float64)
    ecospa_fx.compile(model, example_inputs=(x,))
    (coupling,) = ecospa_fx.couplings(model)
    ecospa_fx.shrink(model, {coupling: torch.arange(LEFT)}, absorb=gathered(model, (x,)))
    assert torch.equal(model.norm.weight, torch.ones(LEFT, dtype=torch.float64))
