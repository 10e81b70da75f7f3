"""A function of a parameter that keeps its entries apart is a weight, and so is one that normalises what is left.

The judges are the same module in plain Python, with hidden entries multiplied by zeros and ones, or with fewer of them.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import ecospa_fx

X = torch.randn(5, 4, dtype=torch.float64)
KEEP = torch.tensor([0, 2, 3, 6, 7])


class Two(nn.Module):
    """`f(w1)` makes eight hidden entries and `f(w2)` sums over them; `present` says which of them there are."""

    def __init__(self, first, second, act=F.relu):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.act, self.present = first, second, act, None

        def of(*shape):
            return torch.rand(shape, dtype=torch.float64) + 0.2

        for i, (rows, columns) in ((1, (8, 4)), (2, (3, 8))):
            for name, shape in (
                ("w", (rows, columns)), ("v", (rows, columns)), ("up", (rows, 2)), ("down", (2, columns)),
                ("row", (rows, 1)), ("column", (1, columns)),
            ):  # fmt: skip
                setattr(self, f"{name}{i}", nn.Parameter(of(*shape)))
            self.register_buffer(f"mask{i}", (of(rows, columns) > 0.5).double())
            self.register_buffer(f"left{i}", of(rows))
            self.register_buffer(f"right{i}", of(columns))
        self.bias, self.scale = nn.Parameter(of(8)), nn.Parameter(of())

    def forward(self, x):
        hidden = self.act(F.linear(x, self.first(self, self.w1, "1"), self.bias))
        if self.present is not None:
            hidden = hidden * self.present
        return F.linear(hidden, self.second(self, self.w2, "2"))


def plain(module, w, i):
    return w


def part(name):
    return lambda module, i: getattr(module, f"{name}{i}")


v, up, down, row, column, mask, left, right = map(part, ("v", "up", "down", "row", "column", "mask", "left", "right"))


def rounded(module, w, i):
    return w + ((w / module.scale).round() * module.scale - w).detach()


KEEPING = {  # along both dims
    "a mask": lambda m, w, i: w * mask(m, i),
    "a mask of booleans": lambda m, w, i: torch.where(mask(m, i) > 0.5, w, 0.0),
    "a learned scale": lambda m, w, i: w * m.scale,
    "a number added": lambda m, w, i: w + 0.1,
    "rounding, straight through": rounded,
    "tanh": lambda m, w, i: torch.tanh(w),
    "exp, which has no zero": lambda m, w, i: w.exp(),
    "a cast": lambda m, w, i: w.float().double(),
    "two weights": lambda m, w, i: w * torch.sigmoid(v(m, i)) + v(m, i),
    "two weights, stacked": lambda m, w, i: torch.stack([w, v(m, i)]).mean(0),
    "an update of low rank": lambda m, w, i: w + 0.5 * up(m, i) @ down(m, i),
    "a gate per row and column": lambda m, w, i: w * row(m, i) * column(m, i),
    "gates by einsum": lambda m, w, i: torch.einsum("oi,o,i->oi", w, left(m, i), right(m, i)),
    "dropout": lambda m, w, i: F.dropout(w, 0.5, m.training),
    "transposed there and back": lambda m, w, i: (w.t() * 2).contiguous().t(),
}
OVER_INPUTS = {  # statistics of each row
    "centred rows": lambda m, w, i: w - w.mean(1, keepdim=True),
    "rows of length 1": lambda m, w, i: F.normalize(w, dim=1),
    "shares of a row": lambda m, w, i: w.softmax(1),
    "a sum of each row": lambda m, w, i: w / w.sum(1, keepdim=True),
    "standardised rows": lambda m, w, i: F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True).reshape_as(
        w
    ),
    "a scale per row": lambda m, w, i: w.sign() * w.abs().mean(1, keepdim=True),
}
OVER_ALL = {
    "the largest entry": lambda m, w, i: w / w.abs().max(),
    "one mean": lambda m, w, i: w - w.mean(),
    "a singular value": lambda m, w, i: w / torch.dot(left(m, i), w @ right(m, i)),
}


AXES = {  # the dim of each tensor along which there are eight entries
    **dict.fromkeys(("bias", "w1", "v1", "up1", "row1", "mask1", "left1"), 0),
    **dict.fromkeys(("w2", "v2", "down2", "column2", "mask2"), 1), "right2": 0,
}  # fmt: skip


def smaller(model):
    """The same module, made of the entries that stay."""
    twin = copy.deepcopy(model)
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        if name in AXES:
            tensor.data = tensor.data.index_select(AXES[name], KEEP)
    return twin


def present(model):
    """The same module with all entries, those that go multiplied by zero."""
    twin = copy.deepcopy(model)
    twin.present = torch.zeros(8, dtype=torch.float64).index_fill(0, KEEP, 1.0)
    return twin


def judged(model, judge=present):
    """Shrink the eight entries and compare with the plain module without these; the couplings there were."""
    twin = judge(model)
    ecospa_fx.compile(model, example_inputs=(X,), regions="root")
    found = ecospa_fx.couplings(model)
    (coupling,) = (c for c in found if c.size == 8)
    ecospa_fx.shrink(model, {coupling: KEEP})
    expected, got = twin(X), model(X)
    torch.testing.assert_close(got, expected)
    expected.square().sum().backward()
    got.square().sum().backward()
    bias, w2 = (twin.bias.grad, twin.w2.grad) if judge is smaller else (twin.bias.grad[KEEP], twin.w2.grad[:, KEEP])
    torch.testing.assert_close(model.bias.grad, bias)
    torch.testing.assert_close(model.w2.grad, w2)
    return found


@pytest.mark.parametrize("name", KEEPING)
def test_what_keeps_entries_apart_is_a_weight(name):
    model = Two(KEEPING[name], KEEPING[name]).eval()
    assert [c.size for c in judged(model)] == [8]  # and no axis of inputs or results


@pytest.mark.parametrize("name", OVER_INPUTS)
def test_a_statistic_over_inputs_is_over_those_that_are_left(name):
    assert [c.size for c in judged(Two(OVER_INPUTS[name], plain))] == [8]
    assert [c.size for c in judged(Two(plain, OVER_INPUTS[name]), smaller)] == [8]


@pytest.mark.parametrize("name", OVER_ALL)
def test_a_statistic_over_all_entries_is_over_those_that_are_left(name):
    for functions in ((OVER_ALL[name], plain), (plain, OVER_ALL[name])):
        assert [c.size for c in judged(Two(*functions), smaller)] == [8]


def test_weights_end_to_end_are_weights():
    def joined(module, w, i):
        return torch.cat([w[:5], v(module, i)[:3] * 2])

    found = ecospa_fx.explain(Two(joined, plain), example_inputs=(X,)).couplings
    assert sorted(c.size for c in found) == [3, 5]
    assert {m.parameter for c in found for m in c.members} == {"w1", "v1", "w2", "bias"}


def test_a_weight_that_drops_entries_is_one_while_training():
    drop = KEEPING["dropout"]
    assert [c.size for c in ecospa_fx.explain(Two(drop, drop), example_inputs=(X,)).couplings] == [8]


def test_a_weight_made_of_an_input_is_an_activation():
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.make, self.out = nn.Linear(4, 32), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(F.relu(x @ self.make(x.mean(0)).view(4, 8)))

    (coupling,) = ecospa_fx.explain(Hyper(), example_inputs=(torch.randn(5, 4),)).couplings
    assert coupling.size == 8 and "make.weight" in {m.parameter for m in coupling.members}


def test_learned_queries_are_no_weights():
    """They are made of parameters alone, but a product with keys is one of two activations."""

    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.randn(2, 6))
            self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x):
            q = self.query @ self.q.weight.T + self.q.bias
            return self.o((q @ self.k(x).mT).softmax(-1) @ self.v(x))

    found = ecospa_fx.explain(Pooling(), example_inputs=(torch.randn(3, 5, 6),)).couplings
    assert {(c.kind, c.size) for c in found} == {("qk", 6), ("vo", 6)}


def hooked(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    for layer in (model[0], model[2]):
        if kind == "hook":
            prune.random_unstructured(layer, "weight", 0.4)
        else:
            parametrize.register_parametrization(layer, "weight", Masked(layer.weight.shape))
    return model


class Masked(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.register_buffer("mask", (torch.rand(shape) > 0.4).double())

    def forward(self, weight):
        return weight * self.mask


@pytest.mark.filterwarnings("ignore:forward hooks on:UserWarning")
@pytest.mark.parametrize("kind", ["hook", "parametrization"])
def test_masks_of_pruning_are_followed_while_training(kind):
    """The hook puts a tensor beside the parameter, which a graph must not hold as it was at its capture."""
    twin, model = hooked(kind), hooked(kind)
    ecospa_fx.compile(model, example_inputs=(X,))
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (twin, model)]

    def step(run, optimizer):
        optimizer.zero_grad()
        loss = run(X).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(3):
        torch.testing.assert_close(step(model, optimizers[1]), step(twin, optimizers[0]))
    (coupling,) = ecospa_fx.couplings(model)
    assert coupling.size == 8
    ecospa_fx.shrink(model, {coupling: KEEP}, optimizer=optimizers[1])
    present = torch.zeros(8, dtype=torch.float64).index_fill(0, KEEP, 1.0)

    def masked(x):
        return twin[2](twin[1](twin[0](x)) * present)

    for _ in range(2):
        torch.testing.assert_close(step(model, optimizers[1]), step(masked, optimizers[0]))


@pytest.mark.filterwarnings("ignore:forward hooks on:UserWarning")
@pytest.mark.parametrize("kind", ["hook", "parametrization"])
def test_masks_of_pruning_shrink_with_their_weights(kind):
    """So the model's own Python can run at the sizes left, and the mask can be made permanent."""
    twin, model = hooked(kind), hooked(kind)
    ecospa_fx.compile(model, example_inputs=(X,), execution="module")
    (coupling,) = ecospa_fx.couplings(model)
    ecospa_fx.shrink(model, {coupling: KEEP})
    hidden = twin[1](twin[0](X)) * torch.zeros(8, dtype=torch.float64).index_fill(0, KEEP, 1.0)
    torch.testing.assert_close(model(X), twin[2](hidden))
    assert {t.shape for name, t in model.named_buffers() if "mask" in name} == {(5, 4), (3, 5)}
    if kind == "hook":
        prune.remove(model[0], "weight")
        assert model[0].weight.shape == (5, 4)


@pytest.mark.parametrize(
    "masking",
    [
        lambda w, mask: w * mask,
        lambda w, mask: w.masked_fill(~mask, 0.0),
        lambda w, mask: torch.where(mask.to(torch.uint8) > 0, w, 0.0),
    ],
)
def test_masks_of_booleans_shrink_with_their_weights(masking):
    class Layer(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes, dtype=torch.float64)
            self.register_buffer("mask", torch.rand(self.weight.shape) > 0.4)

        def forward(self, x):
            return F.linear(x, masking(self.weight, self.mask), self.bias)

    model = nn.Sequential(Layer(4, 8), nn.ReLU(), Layer(8, 3))
    twin = copy.deepcopy(model)
    ecospa_fx.compile(model, example_inputs=(X,))
    (coupling,) = ecospa_fx.couplings(model)
    ecospa_fx.shrink(model, {coupling: KEEP})
    hidden = twin[1](twin[0](X)) * torch.zeros(8, dtype=torch.float64).index_fill(0, KEEP, 1.0)
    torch.testing.assert_close(model(X), twin[2](hidden))
    assert model[0].mask.shape == (5, 4) and model[2].mask.shape == (3, 5)


def test_a_weight_that_is_a_function_takes_over_nothing_and_keeps_its_basis():
    def identity(x):
        return x + 0

    model = Two(KEEPING["a mask"], KEEPING["a mask"], identity).eval()
    ecospa_fx.compile(model, example_inputs=(X,))
    with ecospa_fx.Grams(model) as grams, torch.no_grad():
        model(X)
    assert not grams.absorbing
    assert "aten.mul (test_derived_weights.py:" in grams.refused["w2", 1]
    assert "makes another weight of it" in grams.refused["w2", 1]
    before = model(X)
    ecospa_fx.rotate(model, grams=grams)
    torch.testing.assert_close(model(X), before)
