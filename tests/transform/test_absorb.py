"""Absorption: entries that go are taken over, exactly where that is possible, and never to the worse."""

import copy
import logging
import re
from pathlib import Path

import pytest
import torch
from failing_assignments import fail_at
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import ZOO

import ecospa_fx
from ecospa_fx.errors import TargetError
from ecospa_fx.passes.transform.absorb import Moments, absorb

WITHOUT = {  # nothing can be absorbed in these: no coupling, or none that a matrix alone sums over
    "sorted_features", "softmax_features", "grouped_experts", "picked_experts", "dense_experts", "summed_sigmoids",
    "tied_linears",
}  # fmt: skip
UNEQUAL = {("folded_attention", "heads"), ("attention_folded_heads_first", "heads")}  # a bias of its own for each head
QUICK = (
    "attention", "cross_attention", "fused_per_head", "grouped_sdpa", "einsum_attention", "multi_query", "glu",
    "conv_norm_conv", "upsampling", "applied_twice", "residual_stream", "recurrent", "tied_head",
)  # fmt: skip


def built(name):
    torch.manual_seed(0)
    specimen = ZOO[name]
    model = specimen.build().double().eval()
    x = tuple(t.double() if t.is_floating_point() else t for t in specimen.inputs(4, 5))
    ecospa_fx.compile(model, example_inputs=x)
    return model, x


def gathered(model, *calls, **options):
    with ecospa_fx.Grams(model, **options) as grams, torch.no_grad():
        for x in calls:
            model(*x)
    return grams


def same(coupling, model):
    return next(c for c in ecospa_fx.couplings(model) if c.name == coupling.name)


@torch.no_grad()
def make_equal(model, summing, coupling, a, b):
    """Let entry `b` be computed as entry `a` is, by equal rows of the weights and biases that make them."""
    parameters = dict(model.named_parameters())
    for member in coupling.members:
        if (member.parameter, member.dim) not in summing:
            weight = parameters[member.parameter]
            rows = [(member.index == entry).nonzero().flatten() for entry in (a, b)]
            weight.index_copy_(member.dim, rows[1], weight.index_select(member.dim, rows[0]))


def absorbing(model, grams):
    """Yield the couplings of at least two entries that every weight summing over them can absorb."""
    for coupling in ecospa_fx.couplings(model):
        keys = {(m.parameter, m.dim) for m in coupling.members if m.matrix}
        if keys & set(grams.absorbing) and not keys & grams.refused.keys() and coupling.size > 1:
            yield coupling


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.sweep) for n in sorted(ZOO.keys() - WITHOUT)]
)
def test_what_another_entry_repeats_goes_without_a_trace(name):
    """Two entries that are made by equal rows are equal wherever a weight meets them, so one of them is enough."""
    model, x = built(name)
    grams = gathered(model, x)
    couplings = [c for c in absorbing(model, grams) if (name, c.kind) not in UNEQUAL]
    assert couplings
    for number, coupling in enumerate(couplings):
        whole = copy.deepcopy(model)
        pair = 0, coupling.size - 1
        make_equal(whole, {*grams.absorbing, *grams.refused}, coupling, *pair)
        expected = whole(*x)
        keep = torch.tensor([i for i in range(coupling.size) if i != pair[number % 2]])
        ecospa_fx.shrink(whole, {same(coupling, whole): keep}, absorb=gathered(whole, x, ridge=1e-13))
        torch.testing.assert_close(whole(*x), expected, rtol=1e-9, atol=1e-9, msg=f"{coupling} has left a trace")


class Mlp(nn.Module):
    def __init__(self, width=6, hidden=12, bias=True):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        return self.down(torch.nn.functional.gelu(self.up(x)))


def mlp(**sizes):
    torch.manual_seed(0)
    model, x = Mlp(**sizes).double(), torch.randn(40, 6, dtype=torch.float64)
    ecospa_fx.compile(model, example_inputs=(x,))
    return model, x


@settings(max_examples=25, deadline=None)
@given(
    keep=st.lists(st.integers(0, 11), min_size=1, max_size=11, unique=True),
    rows=st.integers(1, 40),
    ridge=st.sampled_from([0.0, 1e-6, 1e-2, 10.0]),
    bias=st.booleans(),
)
def test_what_a_weight_computes_changes_no_more_than_without(keep, rows, ridge, bias):
    """On the gathered positions, output by output: the regression may choose to take over nothing."""
    whole, x = mlp(bias=bias)
    x, keep = x[:rows], torch.tensor(sorted(keep))
    plain, taking = copy.deepcopy(whole), copy.deepcopy(whole)
    grams = gathered(taking, (x,), ridge=ridge)
    ecospa_fx.shrink(plain, {"ffn": keep})
    ecospa_fx.shrink(taking, {"ffn": keep}, absorb=grams)
    with torch.no_grad():
        errors = [(model(x) - whole(x)).square().sum(0) for model in (taking, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-9) + 1e-12).all()
    assert taking.up.weight.equal(plain.up.weight) and 0 <= grams.left["down.weight", 1] <= 1


def test_it_is_least_squares():
    """Against lstsq on the activations themselves, with a column of ones for the bias."""
    model, x = mlp()
    hidden, keep = torch.nn.functional.gelu(model.up(x)).detach(), torch.tensor([0, 2, 3, 7, 8])
    gone = torch.tensor([i for i in range(12) if i not in keep])
    weight, bias = model.down.weight.detach().clone(), model.down.bias.detach().clone()
    grams = gathered(model, (x[:15],), (x[15:],), ridge=0.0)
    ecospa_fx.shrink(model, {"ffn": keep}, absorb=grams)
    with_ones = torch.cat([hidden[:, keep], torch.ones(40, 1, dtype=torch.float64)], 1)
    share = torch.linalg.lstsq(with_ones, hidden[:, gone]).solution.T
    torch.testing.assert_close(model.down.weight.detach(), weight[:, keep] + weight[:, gone] @ share[:, :-1])
    torch.testing.assert_close(model.down.bias.detach(), bias + weight[:, gone] @ share[:, -1])


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2}], ids=str)
@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d])
def test_a_convolution_sums_over_its_kernel_too(conv, options):
    torch.manual_seed(0)
    model = nn.Sequential(conv(2, 6, 1), nn.Tanh(), conv(6, 3, 3, **options)).double()
    x = torch.randn(8, 2, *(9,) * (1 if conv is nn.Conv1d else 2), dtype=torch.float64)
    ecospa_fx.compile(model, example_inputs=(x,))
    with torch.no_grad():  # channel 5 is half of channel 0: bent by so little that it counts for nothing
        model[0].weight.mul_(1e-5)
        model[0].bias.zero_()
        model[0].weight[5] = model[0].weight[0] / 2
    expected = model(x)
    ecospa_fx.shrink(model, {"conv": torch.arange(5)}, absorb=gathered(model, (x,), ridge=1e-13))
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-12)


def test_gradients_of_what_takes_over_are_those_that_were():
    """Where nothing is lost, the gradient of a column that stays is what it was, so moments follow as they are."""
    model, x = mlp()
    make_equal(model, {("down.weight", 1)}, ecospa_fx.couplings(model)[0], 3, 9)
    model(x).square().sum().backward()
    before, bias = model.down.weight.grad.clone(), model.down.bias.grad.clone()
    keep = torch.tensor([i for i in range(12) if i != 9])
    ecospa_fx.shrink(model, {"ffn": keep}, absorb=gathered(model, (x,), ridge=1e-13))
    torch.testing.assert_close(model.down.weight.grad, before[:, keep])  # those of before follow by slicing
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(model.down.weight.grad, before[:, keep], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(model.down.bias.grad, bias, rtol=1e-6, atol=1e-8)


def test_averages_of_weights_take_over_alike():
    """In copies of the model and in optimizers: the map is linear in the weights, so it is that of any average."""
    model, x = mlp()
    module, tensors = copy.deepcopy(model), {n: t.detach().clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.0)
    model(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        for name, p in model.named_parameters():
            module.get_parameter(name).copy_(3 * p)
            optimizer.state[p]["ax"].copy_(2 * p)
    ecospa_fx.shrink(
        model,
        {"ffn": torch.arange(0, 12, 2)},
        optimizer=optimizer,
        also=[module, tensors],
        absorb=gathered(model, (x,)),
    )
    for name, p in model.named_parameters():
        torch.testing.assert_close(module.get_parameter(name), 3 * p)
        torch.testing.assert_close(optimizer.state[p]["ax"], 2 * p.detach())
        torch.testing.assert_close(tensors[name], p.detach())


def test_heads_that_keep_different_dims_take_over_together():
    model, x = built("attention")
    vo = next(c for c in ecospa_fx.couplings(model) if c.kind == "vo")
    keep = torch.tensor([[0, 1], [2, 3], [0, 3]])
    plain, whole = copy.deepcopy(model), copy.deepcopy(model)
    ecospa_fx.shrink(plain, {same(vo, plain): keep})
    ecospa_fx.shrink(model, {vo: keep}, absorb=gathered(model, x))
    with torch.no_grad():
        errors = [(each(*x) - whole(*x)).square().sum() for each in (model, plain)]
    assert errors[0] < 0.5 * errors[1]
    assert model.v.weight.equal(plain.v.weight) and model.o.weight.shape == plain.o.weight.shape


def test_what_was_gathered_before_a_shrink_serves_the_next_one():
    """Moments of the columns that stay are as good as before."""
    model, x = mlp()
    twin = copy.deepcopy(model)
    grams = gathered(model, (x,), ridge=1e-9)
    ecospa_fx.shrink(model, {"ffn": torch.arange(1, 11)}, absorb=grams)
    ecospa_fx.shrink(model, {"ffn": torch.arange(5)}, absorb=grams)
    ecospa_fx.shrink(twin, {"ffn": torch.arange(1, 11)}, absorb=gathered(twin, (x,), ridge=1e-9))
    ecospa_fx.shrink(twin, {"ffn": torch.arange(5)}, absorb=gathered(twin, (x,), ridge=1e-9))
    torch.testing.assert_close(model.down.weight, twin.down.weight)


def test_few_rows_are_spread_over_the_call_and_others_at_the_next():
    model, x = mlp()
    grams = gathered(model, (x,), (x,), rows=20)
    whole = gathered(model, (x,))
    for name in ("squares down.weight[1]", "sums down.weight[1]"):
        torch.testing.assert_close(grams.state_dict()[name], whole.state_dict()[name])
    assert grams.state_dict()["counts down.weight[1]"][0] == 40


def test_state_goes_on_where_it_was_taken():
    model, x = mlp()
    half, whole = gathered(model, (x[:20],)), gathered(model, (x[:20],), (x[20:],))
    with ecospa_fx.Grams(model) as rest:
        rest.load_state_dict(half.state_dict())
        model(x[20:])
    assert rest.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(rest.state_dict()[name], value) for name, value in whole.state_dict().items())


def test_it_says_why_nothing_takes_over(caplog):
    model, x = built("tied_head")
    grams = gathered(model, x)
    assert list(grams.refused) == [("embed.weight", 1)]
    assert grams.refused["embed.weight", 1].startswith("aten.embedding (embed, ")
    stream = next(c for c in ecospa_fx.couplings(model) if any(m.parameter == "embed.weight" for m in c.members))
    with caplog.at_level(logging.INFO, logger="ecospa_fx.shrink"):
        ecospa_fx.shrink(model, {stream: torch.arange(stream.size - 1)}, absorb=grams)
    assert "nothing takes over in embed.weight[1]: aten.embedding (embed, sparse.py:" in caplog.text


def test_what_is_neither_seen_nor_finite_is_removed_as_ever(caplog):
    model, x = mlp()
    x[3] = float("nan")
    for grams in (gathered(model), gathered(model, (x,))):
        twin, other = copy.deepcopy(model), copy.deepcopy(model)
        with caplog.at_level(logging.INFO, logger="ecospa_fx.shrink"):
            ecospa_fx.shrink(model, {"ffn": torch.arange(ecospa_fx.couplings(model)[0].size - 1)}, absorb=grams)
        ecospa_fx.shrink(twin, {"ffn": torch.arange(ecospa_fx.couplings(other)[0].size - 1)})
        assert model.down.weight.equal(twin.down.weight)
    reason = "no finite moments of its inputs were gathered"
    assert f"nothing takes over in down.weight[1]: {reason}" in caplog.text


@pytest.mark.parametrize(("options", "message"), [
    ({"rows": 0}, "rows=0 is out of range; it is a whole number of positions, at least 1"),
    ({"ridge": -1.0}, "ridge=-1.0 is out of range; it is a share of each entry's second moment, at least 0, or None"),
])  # fmt: skip
def test_settings_out_of_range(options, message):
    model, _ = mlp()
    with pytest.raises(TargetError) as error:
        ecospa_fx.Grams(model, **options)
    assert str(error.value) == message


def test_all_of_it_or_nothing(monkeypatch):
    model, x = mlp()
    grams = gathered(model, (x,))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fail_at(monkeypatch, 2, RuntimeError("no more"))
    with pytest.raises(RuntimeError, match="no more"):
        ecospa_fx.shrink(model, {"ffn": torch.arange(4)}, absorb=grams)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_singular_moments_are_no_obstacle():
    x = torch.ones(5, 4, dtype=torch.float64)
    found = absorb(Moments(x.T @ x, x.sum(0), 5), torch.tensor([0, 1]), constant=False, ridge=0.0)
    torch.testing.assert_close(found.share.sum(1), torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=0)
    dead = absorb(Moments(0 * x.T @ x, 0 * x.sum(0), 5), torch.tensor([0, 1]), constant=True, ridge=0.0)
    assert not dead.share.any() and not dead.constant.any() and dead.left == 0


def train(model, optimizer, trainer, x, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        trainer.step()
    return float(loss.detach())


def test_a_trainer_absorbs_with_what_its_own_batches_show():
    losses = {}
    for absorb_it in (False, True):
        model, x = mlp(hidden=24)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        trainer = ecospa_fx.EcoSpaTrainer(
            model, optimizer, target=0.5, interval=50, start=100, end=101, shape="one_shot", absorb=absorb_it
        )
        train(model, optimizer, trainer, x, 99)
        with torch.no_grad():
            model(1e6 * x)  # validation is not looked at
        train(model, optimizer, trainer, x, 2)
        assert trainer.done
        with torch.no_grad():
            losses[absorb_it] = float((model(x) - x.flip(-1)).square().mean())
        assert trainer._compensation.grams is None or trainer._compensation.grams.empty
    assert losses[True] < 0.5 * losses[False]


def test_a_trainer_looks_only_shortly_before_a_shrink():
    model, x = mlp(hidden=24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.2, interval=40, start=40, top_k=0.1, absorb=True)
    seen = []
    for _ in range(90):
        train(model, optimizer, trainer, x, 1)
        seen.append(trainer._compensation.grams.active)
    assert [i + 1 for i, active in enumerate(seen) if active] == [*range(24, 40), *range(64, 80)]
    resumed = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.2, interval=40, start=40, top_k=0.1, absorb=True)
    resumed.load_state_dict(trainer.state_dict())
    assert resumed._compensation.grams.active is False


def test_activations_may_be_scored_at_the_same_time():
    model, x = mlp(hidden=24)
    alone, _ = mlp(hidden=24)
    scores = []
    for each, absorb_it in ((model, True), (alone, False)):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        trainer = ecospa_fx.EcoSpaTrainer(each, optimizer, score="activation", interval=100, absorb=absorb_it)
        train(each, optimizer, trainer, x, 3)
        scores.append(trainer.policy.estimators[0].importance())
    assert list(scores[0].values()) == list(scores[1].values())
    assert not trainer.policy.estimators[0].empty


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    """It is saved while the trainer gathers moments; heads rotate, a hidden layer absorbs."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp = ZOO["attention"].build(), Mlp(width=10)

        def forward(self, x):
            return self.mlp(self.attention(x))

    def made(saved=None):
        torch.manual_seed(0)
        model = ecospa_fx.compile(Small()) if saved is None else ecospa_fx.load(saved, Small)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        options = {"target": 0.4, "interval": 8, "start": 8, "top_k": 0.6, "absorb": True, "rotate": True}
        return model, optimizer, ecospa_fx.EcoSpaTrainer(model, optimizer, **options)

    batches = torch.randn(26, 4, 5, 10, generator=torch.Generator().manual_seed(1))
    model, optimizer, trainer = made()
    for number, x in enumerate(batches):
        if number == 13:
            assert trainer.history and not trainer._compensation.grams.empty
            ecospa_fx.save(model, tmp_path / "run", optimizer=optimizer, trainer=trainer)
        train(model, optimizer, trainer, x, 1)
    assert len(trainer.history) > 2
    twin, twin_optimizer, twin_trainer = made(tmp_path / "run")
    ecospa_fx.resume(tmp_path / "run", twin, optimizer=twin_optimizer, trainer=twin_trainer)
    for x in batches[13:]:
        train(twin, twin_optimizer, twin_trainer, x, 1)
    assert [h["removed"] for h in twin_trainer.history] == [h["removed"] for h in trainer.history]
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
        for entry, value in optimizer.state[p].items():
            assert torch.equal(value, twin_optimizer.state[q][entry]), (name, entry)


def test_the_code_in_the_documentation_runs():
    text = (Path(__file__).parents[2] / "docs" / "absorption.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    model, (x,) = built("transformer_block")
    optimizer = torch.optim.AdamW(model.parameters())
    coupling = next(c for c in ecospa_fx.couplings(model) if c.kind == "vo")
    names = {"ecospa_fx": ecospa_fx, "torch": torch, "model": model, "optimizer": optimizer, "batches": [x]}
    exec(first, names)
    exec(second, names | {"coupling": coupling, "keep": torch.arange(2)})
    assert same(coupling, model).size == 2


def test_low_precision_is_added_up_in_float32():
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(512, 6)
    ecospa_fx.compile(model, example_inputs=(x,))
    with torch.autocast("cpu", torch.bfloat16):
        grams = gathered(model, (x,), (x,))
        hidden = torch.nn.functional.gelu(model.up(x)).float().detach()
    squares = grams.state_dict()["squares down.weight[1]"]
    assert squares.dtype == torch.float32
    torch.testing.assert_close(squares, 2 * hidden.T @ hidden, rtol=1e-5, atol=1e-3)
    model.bfloat16()
    ecospa_fx.shrink(model, {"ffn": torch.arange(6)}, absorb=grams)
    assert model.down.weight.dtype == torch.bfloat16 and grams.left
