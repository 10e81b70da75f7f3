"""Squared Taylor terms per position, against gates that a plain module multiplies its activations with."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import ecospa_fx
from ecospa_fx.score.saliency import Saliency
from ecospa_fx.score.scores import Score


class Gated(nn.Module):
    """Two blocks whose activations meet a gate of their own at every position, before the weights that sum over them.

    One gate per entry of the stream, shared by all that reads it; one per query and key dim, and per value dim.
    """

    def __init__(self, width=6, heads=2, hidden=7, norm=True):
        super().__init__()
        self.heads, self.width, self.hidden = heads, width, hidden
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 11)
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "norm": nn.RMSNorm(width) if norm else nn.Identity(),
                **{name: nn.Linear(width, width) for name in ("q", "k", "v", "out")},
                "up": nn.Linear(width, hidden), "gate": nn.Linear(width, hidden), "down": nn.Linear(hidden, width),
            })
            for _ in range(2)
        )  # fmt: skip

    def gates_of(self, ids):
        return {
            "stream": torch.ones(*ids.shape, self.width, dtype=torch.float64, requires_grad=True),
            **{
                f"{name} {i}": torch.ones(*ids.shape, size, dtype=torch.float64, requires_grad=True)
                for i in range(2)
                for name, size in (("glu", self.hidden), ("vo", self.width), ("q", self.width), ("k", self.width))
            },
        }

    def forward(self, ids, gates=None):
        def gated(value, name):
            return value if gates is None else value * gates[name]

        b, s = ids.shape
        x = self.embed(ids)
        for i, layer in enumerate(self.layers):
            read = gated(layer["norm"](x), "stream")
            q, k, v = layer["q"](read), layer["k"](read), layer["v"](read)
            q, k = gated(q, f"q {i}"), gated(k, f"k {i}")
            q, k, v = (each.view(b, s, self.heads, -1).transpose(1, 2) for each in (q, k, v))
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, -1)
            x = x + layer["out"](gated(y, f"vo {i}"))
            read = gated(layer["norm"](x), "stream")
            hidden = layer["up"](read) * functional.silu(layer["gate"](read))
            x = x + layer["down"](gated(hidden, f"glu {i}"))
        return self.head(gated(x, "stream"))


def loss_of(model, ids, **gates):
    return functional.cross_entropy(model(ids, **gates).flatten(0, 1), ids.roll(-1, 1).flatten())


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (2, 5))
    plain = Gated().double()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(ids,), regions="root")
    return plain, model, ids


def squares_of(plain, batches):
    """Sums over positions and batches of the squared gradients of the gates, by their name."""
    totals = {}
    for ids in batches:
        gates = plain.gates_of(ids)
        loss_of(plain, ids, gates=gates).backward()
        for name, gate in gates.items():
            totals[name] = totals.get(name, 0) + gate.grad.square().flatten(0, 1).sum(0)
    return totals


def expected_of(coupling, squares, totals_by_head):
    layer = "0" if ".0." in coupling.name else "1"
    match coupling.kind:
        case "residual":
            return squares["stream"]
        case "glu" | "ffn":
            return squares[f"glu {layer}"]
        case "vo":
            return squares[f"vo {layer}"]
        case "qk":
            return (squares[f"q {layer}"] + squares[f"k {layer}"]) / 2
        case "heads":
            return totals_by_head[layer]
    raise AssertionError(coupling)


def by_head(plain, batches):
    """The same for heads: the terms of a head's dims add up before they are squared."""
    totals = {"0": 0, "1": 0}
    for ids in batches:
        gates = plain.gates_of(ids)
        loss_of(plain, ids, gates=gates).backward()
        for i in totals:
            terms = gates[f"vo {i}"].grad.unflatten(-1, (plain.heads, -1)).sum(-1)
            totals[i] = totals[i] + terms.square().flatten(0, 1).sum(0)
    return totals


def check(model, estimator, squares, heads, steps=1):
    kinds = set()
    for coupling in ecospa_fx.couplings(model):
        expected = expected_of(coupling, squares, heads) / steps
        found = estimator.entries(coupling, by_context=True)
        torch.testing.assert_close(found.flatten(), expected.double(), rtol=1e-9, atol=1e-18)
        torch.testing.assert_close(estimator.entries(coupling), found.sum(0))
        kinds.add(coupling.kind)
    assert kinds == {"residual", "glu", "vo", "qk", "heads"}


def test_each_entry_is_the_squared_gradient_of_its_gate_at_every_position(compiled):
    plain, model, ids = compiled
    estimator = ecospa_fx.CoupledEstimator(model, "taylor_positions")
    loss_of(model, ids).backward()
    estimator.accumulate()
    estimator.detach()
    check(model, estimator, squares_of(plain, [ids]), by_head(plain, [ids]))


def test_no_weight_need_train(compiled):
    plain, model, ids = compiled
    estimator = Saliency(model)
    estimator.reader.begins = True
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    try:
        loss_of(model, ids).backward()
    finally:
        model.requires_grad_(True)
    estimator.accumulate()
    estimator.detach()
    assert all(p.grad is None for p in model.parameters())
    check(model, estimator, squares_of(plain, [ids]), by_head(plain, [ids]))


def test_micro_batches_scaled_losses_and_steps_that_overflow(compiled):
    plain, model, ids = compiled
    estimator = ecospa_fx.CoupledEstimator(model, "taylor_positions")
    batches = [ids, ids.flip(0), ids.roll(1, 1)]
    for batch in batches:
        (64 * loss_of(model, batch)).backward()
    estimator.accumulate(scale=64.0, found_inf=0.0)
    (math.inf * loss_of(model, ids)).backward()
    estimator.accumulate(found_inf=1.0)
    estimator.detach()
    check(model, estimator, squares_of(plain, batches), by_head(plain, batches))


def test_gradients_that_were_scaled_in_backward_and_are_not_any_more(compiled):
    """As a gradient scaler does it: the loss is multiplied, and gradients of weights are divided before a step."""
    plain, model, ids = compiled
    model.zero_grad()
    estimator = ecospa_fx.CoupledEstimator(model, "taylor_positions")
    for batch in (ids, ids.flip(0)):
        (1024 * loss_of(model, batch)).backward()
    for parameter in model.parameters():
        parameter.grad /= 1024
    estimator.accumulate()
    estimator.detach()
    found = {c: estimator.entries(c, by_context=True).flatten() for c in ecospa_fx.couplings(model)}
    expected, heads = (of(plain, [ids, ids.flip(0)]) for of in (squares_of, by_head))
    for coupling, entries in found.items():
        torch.testing.assert_close(entries, expected_of(coupling, expected, heads).double(), rtol=1e-5, atol=1e-18)


def test_recomputed_blocks_and_saved_sums(compiled):
    plain, _, ids = compiled

    class Recomputed(Gated):
        def forward(self, ids):
            return torch.utils.checkpoint.checkpoint(super().forward, ids, use_reentrant=False)

    model = Recomputed().double()
    model.load_state_dict(plain.state_dict())
    ecospa_fx.compile(model, example_inputs=(ids,), regions="root")
    estimator = ecospa_fx.CoupledEstimator(model, "taylor_positions")
    for _ in range(2):
        loss_of(model, ids).backward()
        estimator.accumulate()
    estimator.detach()
    check(model, estimator, squares_of(plain, [ids]), by_head(plain, [ids]))
    other = ecospa_fx.CoupledEstimator(model, "taylor_positions")
    other.load_state_dict(estimator.state_dict())
    other.detach()
    check(model, other, squares_of(plain, [ids]), by_head(plain, [ids]))


@pytest.mark.parametrize("gathering", [{"window": 1}, {"decay": 0.5}])
def test_old_steps_are_forgotten(compiled, gathering):
    plain, model, ids = compiled
    estimator = ecospa_fx.CoupledEstimator(model, "taylor_positions", **gathering)
    batches = [ids, ids.roll(2, 1)]
    for batch in batches:
        loss_of(model, batch).backward()
        estimator.accumulate()
    estimator.detach()
    first, last = (squares_of(plain, [batch])["glu 0"] for batch in batches)
    expected = last if "window" in gathering else (0.25 * first + 0.5 * last) / 0.75
    glu = next(c for c in ecospa_fx.couplings(model) if c.kind == "glu" and ".0." in c.name)
    torch.testing.assert_close(estimator.entries(glu), expected, rtol=1e-9, atol=0)


def test_pixels_are_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)).double()
    plain, x = copy.deepcopy(model), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    ecospa_fx.compile(model, example_inputs=(x,))
    estimator = ecospa_fx.CoupledEstimator(model, "taylor_positions")
    model(x).square().mean().backward()
    estimator.accumulate()
    hidden = plain[1](plain[0](x))
    gate = torch.ones_like(hidden, requires_grad=True)
    plain[2](hidden.detach() * gate).square().mean().backward()
    (coupling,) = ecospa_fx.couplings(model)
    torch.testing.assert_close(estimator.entries(coupling), gate.grad.square().sum((0, 2, 3)), rtol=1e-9, atol=0)
    # Importances are per weight, as those of other scores.
    weights = model[0].weight.numel() + model[2].weight.numel()
    assert estimator.importance()[coupling] == pytest.approx(float(gate.grad.square().sum()) / weights)


def test_a_value_used_elsewhere_too_has_the_gradient_of_these_ops_only():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x, gate=1.0):
            hidden = self.up(x).tanh()
            return self.down(hidden * gate) + hidden.square().mean(-1, keepdim=True)

    torch.manual_seed(0)
    model = Twice().double()
    plain, x = copy.deepcopy(model), torch.randn(4, 3, dtype=torch.float64)
    ecospa_fx.compile(model, example_inputs=(x,), regions="root")
    estimator = ecospa_fx.CoupledEstimator(model, "taylor_positions")
    model(x).square().sum().backward()
    estimator.accumulate()
    gate = torch.ones(4, 5, dtype=torch.float64, requires_grad=True)
    plain(x, gate).square().sum().backward()
    (coupling,) = ecospa_fx.couplings(model)
    torch.testing.assert_close(estimator.entries(coupling), gate.grad.square().sum(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside others that have one"])
def test_hidden_units_without_such_a_place_are_judged_step_by_step(beside):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)
            if beside:
                self.head = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 2))

        def forward(self, x):
            return self.head(self.cells(x)[0])

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(2, 4, 3, dtype=torch.float64)
    ecospa_fx.compile(model, example_inputs=(x,))
    by_step = ecospa_fx.CoupledEstimator(model, Score("gates", "gates", None, "per step"))
    estimator = ecospa_fx.CoupledEstimator(model, "taylor_positions")
    model(x).square().sum().backward()
    by_step.accumulate()
    estimator.accumulate()
    recurrent = next(c for c in ecospa_fx.couplings(model) if c.kind == "recurrent")
    assert bool((estimator.entries(recurrent) > 0).all())
    torch.testing.assert_close(estimator.entries(recurrent), by_step.entries(recurrent))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_torch_is_not_that_of_sums(default):
    """A script that sets it once, for its model, has it in every step of the trainer."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2)).double(), torch.randn(4, 3).double()
    ecospa_fx.compile(model, example_inputs=(x,))
    (coupling,) = ecospa_fx.couplings(model)
    found = []
    for each in (torch.float32, default):
        estimators = [
            ecospa_fx.CoupledEstimator(model, score)
            for score in ("taylor_positions", Score("gates", "gates", None, "per step"))
        ]
        model.zero_grad()
        try:
            torch.set_default_dtype(each)
            model(x).square().sum().backward()
            for estimator in estimators:
                estimator.accumulate()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append([estimator.entries(coupling) for estimator in estimators])
    for before, after in zip(*found, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("shrunk", [False, True])
def test_a_shrunk_model_is_read_at_its_sizes(compiled, shrunk):
    plain, model, ids = copy.deepcopy(compiled[0]), copy.deepcopy(compiled[1]), compiled[2]
    estimator = ecospa_fx.CoupledEstimator(model, "taylor_positions")
    glu = next(c for c in ecospa_fx.couplings(model) if c.kind == "glu" and ".0." in c.name)
    if shrunk:
        ecospa_fx.shrink(model, {glu: torch.tensor([0, 2, 5])})
    loss_of(model, ids).backward()
    estimator.accumulate()
    gates = plain.gates_of(ids)
    kept = torch.tensor([0, 2, 5]) if shrunk else torch.arange(7)
    mask = torch.zeros(7, dtype=torch.float64).index_fill_(0, kept, 1.0)
    gates["glu 0"] = mask.expand_as(gates["glu 0"]).clone().requires_grad_()
    loss_of(plain, ids, gates=gates).backward()
    glu = next(c for c in ecospa_fx.couplings(model) if c.name == glu.name)
    expected = gates["glu 0"].grad.square().flatten(0, 1).sum(0)[kept]
    torch.testing.assert_close(estimator.entries(glu), expected, rtol=1e-9, atol=0)
