"""State beside the weights: a compiled model assigns, reads and draws what the plain one does, or is refused."""

import copy
import random
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ecospa_fx
from ecospa_fx.errors import CaptureError, NoCouplingError
from ecospa_fx.model.lookup import regions_of

X = torch.linspace(-1, 1, 20).reshape(5, 4)
SCALE = 1.0


class Net(nn.Module):
    """Two linear layers; what a case does in between is `between(self, hidden)`."""

    gain = 1.0

    def __init__(self, between=lambda self, h: h) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(4, 8), nn.Linear(8, 3), between
        self.register_buffer("mean", torch.zeros(8))
        self.plain, self.config = torch.ones(8), types.SimpleNamespace(tau=1.0, inner=types.SimpleNamespace(b=1.0))
        self.bag, self.table, self.act, self.count, self.aux = [torch.ones(8), 1.0], {"g": 1.0}, F.relu, 0, None
        self.log, self.cache, self.array = [], {}, np.ones(8)

    def forward(self, x):
        return self.down(self.between(self, F.relu(self.up(x))))


def pair(between, **given):
    torch.manual_seed(0)
    plain = Net(between)
    compiled = copy.deepcopy(plain)
    return plain, ecospa_fx.compile(compiled, **({"example_inputs": (X,)} | given))


def _average(self, h):
    self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
    return h - self.mean


def _auxiliary(self, h):
    self.aux = h.pow(2).sum()
    return h


@pytest.mark.parametrize("between", [_average, _auxiliary])
def test_tensors_that_a_forward_assigns_are_those_of_the_plain_model(between):
    plain, model = pair(between)
    for step in range(3):
        for each in (plain, model):
            loss = each(X + step).pow(2).mean() + (0 if each.aux is None else each.aux.mean())
            each.zero_grad()
            loss.backward()
        assert torch.equal(plain.mean, model.mean)
        assert (plain.aux is None and model.aux is None) or torch.allclose(plain.aux, model.aux)
        assert torch.allclose(plain.up.weight.grad, model.up.weight.grad, atol=1e-7)


def _keeps(self, h):
    self.aux = h * 2
    return self.aux + h


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("watched", [True, False])
def test_a_forward_that_runs_again_for_backward_assigns_again(reentrant, watched):
    """Activation checkpointing breaks it off as soon as backward has what it needs, after the assignment."""
    plain, model = pair(_average)
    if watched:
        score = ecospa_fx.CoupledEstimator(model, "activation")
    for step in range(3):
        for each in (plain, model):
            x = (X + step).requires_grad_()
            checkpoint(each, x, use_reentrant=reentrant).pow(2).mean().backward()
        assert torch.equal(plain.mean, model.mean), step
    assert not watched or score.importance()


def test_an_axis_that_a_forward_keeps_in_an_attribute_stays_whole():
    with pytest.raises(NoCouplingError, match="it is kept as `aux`, whose other uses are unknown"):
        pair(_keeps)


def test_a_buffer_that_is_assigned_shrinks_along():
    plain, model = pair(_average)
    (coupling,) = ecospa_fx.couplings(model)
    keep = torch.tensor([0, 2, 5])
    ecospa_fx.shrink(model, {coupling: keep})
    small = Net(_average)
    small.up, small.down, small.mean = nn.Linear(4, 3), nn.Linear(3, 3), torch.zeros(3)
    with torch.no_grad():
        small.up.weight.copy_(plain.up.weight[keep]), small.up.bias.copy_(plain.up.bias[keep])
        small.down.weight.copy_(plain.down.weight[:, keep]), small.down.bias.copy_(plain.down.bias)
    for step in range(3):
        assert torch.allclose(model(X + step), small(X + step), atol=1e-6)
        assert torch.allclose(model.mean, small.mean)


def _counts(self, h):
    self.count += 1
    return h


def _remembers_a_size(self, h):
    self.count = h.shape[0]
    return h


def _logs(self, h):
    self.log.append(1)
    return h


def _carries(self, h):
    self.plain = 0.5 * self.plain + h.detach().mean(0)
    return h * self.plain


def _counts_in_class(self, h):
    type(self).total = getattr(type(self), "total", 0) + 1
    return h


@pytest.mark.parametrize(
    ("between", "says"),
    [
        (_counts, r"changes `count` at test_state.py:\d+ at every call"),
        (_remembers_a_size, r"changes `count` at test_state.py:\d+ at every call"),
        (_logs, r"changes `log` at test_state.py:\d+ at every call"),
        (_carries, r"reads and replaces the tensor `plain` at every call"),
    ],
)
def test_other_state_is_refused_with_the_line_that_changes_it(between, says):
    plain = Net(between)
    before = copy.deepcopy(plain)
    with pytest.raises(CaptureError, match=says):
        ecospa_fx.compile(plain, example_inputs=(X,), regions="root")
    with pytest.raises(CaptureError, match=says):
        ecospa_fx.explain(plain, example_inputs=(X,), regions="root")
    assert (plain.count, plain.log) == (before.count, before.log) and torch.equal(plain.plain, before.plain)
    plain(X)
    assert (plain.count, plain.log, torch.equal(plain.plain, before.plain)) != (0, [], True)


class Blocks(nn.Module):
    """Counts its calls outside of its blocks, which have couplings of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.calls = nn.ModuleList(Net() for _ in range(2)), 0

    def forward(self, x):
        self.calls += 1
        return sum(block(x) for block in self.blocks)


def test_smaller_regions_live_on():
    model = ecospa_fx.compile(Blocks())
    for _ in range(3):
        model(X)
    assert model.calls == 3 and list(regions_of(model)) == ["blocks.0", "blocks.1"]


def _reads_all(self, h):
    h = self.act(h * self.config.tau * self.config.inner.b) * self.plain * self.bag[0] * self.bag[1]
    return h * self.table["g"] * SCALE * self.gain * type(self).gain * torch.from_numpy(self.array).float()


def _set(path, value):
    def change(model):
        *way, last = path.split(".")
        owner = model
        for step in way:
            owner = (
                owner[int(step)] if step.isdigit() else owner[step] if isinstance(owner, dict) else getattr(owner, step)
            )
        if isinstance(owner, (dict, list)):
            owner[int(last) if last.isdigit() else last] = value
        else:
            setattr(owner, last, value)

    return change


CHANGES = {
    "an attribute of an object": _set("config.tau", 2.0),
    "an object in it": _set("config.inner", types.SimpleNamespace(b=3.0)),
    "an attribute of that": _set("config.inner.b", 3.0),
    "the object": _set("config", types.SimpleNamespace(tau=3.0, inner=types.SimpleNamespace(b=0.5))),
    "a function": _set("act", F.gelu),
    "a tensor": _set("plain", torch.full((8,), 2.0)),
    "a tensor in place": lambda model: model.plain.fill_(3.0),
    "a tensor in a list": _set("bag.0", torch.full((8,), 2.0)),
    "a number in a list": _set("bag.1", 4.0),
    "an entry of a dict": _set("table.g", 2.0),
    "a class attribute": lambda _: setattr(Net, "gain", 2.0),
    "an attribute over one of the class": _set("gain", 4.0),
    "a global": lambda _: globals().__setitem__("SCALE", 2.0),
    "an array": _set("array", np.full(8, 2.0)),
    "an array in place": lambda model: model.array.__setitem__(..., 2.0),
    "a submodule": lambda model: setattr(model, "up", copy.deepcopy(model.up)),
}


@pytest.fixture(scope="module")
def reading():
    return pair(_reads_all)


@pytest.mark.parametrize("change", CHANGES)
def test_values_that_a_loop_changes_between_calls_are_followed(reading, change, monkeypatch):
    monkeypatch.setattr(Net, "gain", 1.0)
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    plain, model = copy.deepcopy(reading)
    assert torch.allclose(model(X), plain(X))
    before = plain(X)
    for each in (plain, model):
        CHANGES[change](each)
    assert change == "a submodule" or not torch.allclose(before, plain(X))
    assert torch.allclose(model(X), plain(X))


def _fills(self, h):
    if h.shape[-1] not in self.cache:
        self.cache[h.shape[-1]] = torch.arange(1.0, h.shape[-1] + 1)
    return h * self.cache[h.shape[-1]]


@pytest.mark.parametrize("given", [{}, {"example_inputs": None}])
def test_a_cache_that_the_first_call_fills_is_filled(given):
    plain, model = pair(_fills, **given)
    for _ in range(3):
        assert torch.allclose(model(X), plain(X))
        assert model.cache.keys() == plain.cache.keys() and torch.equal(model.cache[8], plain.cache[8])
    (coupling,) = ecospa_fx.couplings(model)
    ecospa_fx.shrink(model, {coupling: torch.tensor([1, 4])})
    with torch.no_grad():
        plain.down.weight[:, [0, 2, 3, 5, 6, 7]] = 0
    assert torch.allclose(model(X), plain(X), atol=1e-6)


def _draws(self, h):
    return h * 2 if self.training and random.random() < 0.5 else h


def _draws_by_numpy(self, h):
    return h * float(np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize(("between", "of"), [(_draws, "Python"), (_draws_by_numpy, "numpy")])
def test_a_draw_in_python_is_refused_and_leaves_every_generator(between, of):
    model = Net(between)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    with pytest.raises(CaptureError, match=rf"draws from the random generator of {of} at test_state.py:\d+, and"):
        ecospa_fx.compile(model, example_inputs=(X,), regions="root")
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert torch.equal(states[2], torch.get_rng_state())


class Dropping(nn.Module):
    """Leaves blocks out at random, by Python's generator or by torch's."""

    def __init__(self, python: bool) -> None:
        super().__init__()
        self.blocks, self.python = nn.ModuleList(Wide() for _ in range(5)), python

    def forward(self, x):
        for block in self.blocks:
            if (random.random() if self.python else float(torch.rand(()))) >= 0.6:
                x = x + block(x)
        return x


class Wide(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


@pytest.mark.parametrize("python", [True, False])
def test_blocks_that_are_left_out_at_random_are_regions_and_go_on_being_left_out(python):
    torch.manual_seed(0)
    random.seed(0)
    model = ecospa_fx.compile(Dropping(python))
    left_out = 0
    for _ in range(60):
        model.zero_grad()
        model(X.clone().requires_grad_()).sum().backward()
        left_out += sum(block[0].weight.grad is None for block in model.blocks)
    assert len(regions_of(model)) == 5
    assert 140 < left_out < 220  # of 300, at 0.6


class Momentum(nn.Module):
    """Updates a copy of its weights itself, as a momentum encoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Net() for _ in range(2))
        self.key = nn.Linear(3, 3).requires_grad_(False)
        self.query = nn.Linear(3, 3)

    def forward(self, x):
        with torch.no_grad():
            for mine, theirs in zip(self.key.parameters(), self.query.parameters(), strict=True):
                mine.data = mine.data * 0.9 + theirs.data * 0.1
                mine.mul_(0.5)
        x = sum(block(x) for block in self.blocks)
        return self.query(x) * self.key(x)


@pytest.mark.parametrize("execution", ["graph", "module"])
def test_parameters_that_a_forward_updates_move_once_per_call(execution):
    torch.manual_seed(0)
    plain = Momentum()
    model = copy.deepcopy(plain)
    ecospa_fx.explain(model, example_inputs=(X,))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    ecospa_fx.compile(model, execution=execution)
    for _ in range(2):
        assert torch.allclose(model(X), plain(X))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]


class Statistics(nn.Module):
    """A batch norm written by hand: training updates its buffers in place, evaluation reads one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("var", torch.ones(8))
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x):
        h = self.up(x)
        var = self.var
        if self.training:
            var = h.var(0, unbiased=False)
            with torch.no_grad():
                self.var.mul_(0.9).add_(0.1 * var)
                self.seen.add_(h.abs().sum(0))
        return self.down(F.relu(h * torch.rsqrt(var + 1e-5)))


@pytest.mark.parametrize("first", ["train", "eval"])
@pytest.mark.parametrize("both_met", [True, False])
def test_buffers_that_training_updates_follow_into_evaluation(first, both_met):
    torch.manual_seed(0)
    plain = Statistics()
    model = ecospa_fx.compile(copy.deepcopy(plain).train(first == "train"), example_inputs=(X,))
    if both_met:
        for training in (first != "train", first == "train"):
            model.train(training)(X), plain.train(training)(X)
    (coupling,) = ecospa_fx.couplings(model)
    keep = torch.tensor([0, 3, 6])
    ecospa_fx.shrink(model, {coupling: keep})
    gone = torch.tensor([1, 2, 4, 5, 7])
    with torch.no_grad():
        plain.down.weight[:, gone] = 0
    for training in (True, False, True, False):
        assert torch.allclose(model.train(training)(X), plain.train(training)(X), atol=1e-5)
        assert torch.allclose(model.var, plain.var[keep]) and torch.allclose(model.seen, plain.seen[keep])


def _scheduled(self, h):
    h = F.dropout(h, self.table["p"], self.training) / self.config.tau
    return h + 1 if self.config.tau > 0.5 else h


def test_a_number_that_changes_every_step_becomes_an_input_of_the_graph_before_and_after_a_shrink():
    torch.manual_seed(0)
    plain = Net(_scheduled)
    plain.table["p"] = 0.3
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(X,))
    for step in range(24):
        if step == 6:
            (coupling,) = ecospa_fx.couplings(model)
            ecospa_fx.shrink(model, {coupling: torch.arange(8)[::2]})
            with torch.no_grad():
                plain.down.weight[:, 1::2] = 0
            plain.table["p"] = model.table["p"] = 0.0  # draws have the sizes of what is left
        for each in (plain, model):
            each.config.tau = 1.0 - 0.03 * step
            if step < 6:
                each.table["p"] = 0.3 - 0.01 * step
        torch.manual_seed(step)
        expected = plain(X)
        torch.manual_seed(step)
        assert torch.allclose(model(X), expected, atol=1e-6), step
    assert len(regions_of(model)[""].specializations) <= 4


def _function_of_a_number(self, h):
    return h * (1 + self.config.tau) ** 2


def test_a_region_that_has_not_shrunk_falls_back_to_its_own_python():
    plain, model = pair(_function_of_a_number)
    for step in range(20):
        plain.config.tau = model.config.tau = 1.0 + step
        assert torch.allclose(model(X), plain(X))
    (coupling,) = ecospa_fx.couplings(model)
    ecospa_fx.shrink(model, {coupling: torch.arange(4)})
    plain.config.tau = model.config.tau = 50.0
    with pytest.raises(ecospa_fx.errors.EcoSpaError, match=r"16 different ways.*`config.tau` is 50.0 and was"):
        model(X)
