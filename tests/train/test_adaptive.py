"""The adaptive policy: what entries are worth, in which order they go, and where how much of what goes."""

import copy

import pytest
import torch
from test_absorb import built
from torch import nn
from zoo import ZOO

import ecospa_fx
from ecospa_fx.compensate.forecast import forecast, worth_of
from ecospa_fx.errors import TargetError
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.passes.transform.absorb import Moments, absorb
from ecospa_fx.passes.transform.eliminate import Summing, eliminate
from ecospa_fx.score.saliency import Saliency
from ecospa_fx.score.scores import Score
from ecospa_fx.see.report.training import figures_of, training_of
from ecospa_fx.train.adaptive import AdaptiveSparsifier, _slopes

QUICK = ("attention", "grouped_sdpa", "rotary_attention", "glu", "conv_norm_conv", "residual_stream", "recurrent")


def loss_of(model, x):
    out = model(*x)
    out = out if isinstance(out, torch.Tensor) else out[0]
    return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).square().sum()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.sweep) for n in sorted(ZOO) if ZOO[n].couplings]
)
def test_saliency_is_the_squared_derivative_along_the_gate(name):
    """Scaling the slices of an entry on one side of the sum is scaling the entry where it is summed over."""
    model, x = built(name)
    saliency = ecospa_fx.CoupledEstimator(model, Score("by step", "gates", None, "of all positions together"))
    loss_of(model, x).backward()
    saliency.accumulate()
    tensors, tried = named_tensors(model), 0
    for coupling in ecospa_fx.couplings(model):
        found = saliency.entries(coupling, by_context=True).flatten()
        _, sides = saliency.reader.gates()[coupling.name]
        for unit in (0, len(found) - 1):
            slopes = []
            for side in sides:
                losses = []
                for step in (1e-4, -1e-4):
                    smaller = copy.deepcopy(model)
                    held = named_tensors(smaller)
                    with torch.no_grad():
                        for gate in side:
                            rows = gate.owned[gate.place == unit]
                            held[gate.parameter].index_copy_(
                                gate.dim, rows, held[gate.parameter].index_select(gate.dim, rows) * (1 + step)
                            )
                        losses.append(float(loss_of(smaller, x)))
                slopes.append((losses[0] - losses[1]) / 2e-4)
            expected = sum(slope**2 for slope in slopes) / max(1, len(slopes))
            scale = float(sum(p.grad.square().sum() for p in tensors.values() if p.grad is not None))
            assert float(found[unit]) == pytest.approx(expected, rel=1e-3, abs=1e-6 * scale), coupling
            tried += 1
    assert tried


def test_the_cheapest_go_first_and_cost_what_regression_leaves():
    """One at a time, each is the best to go next, and the sum is what the regression of all of them leaves."""
    torch.manual_seed(0)
    x = torch.randn(200, 9, dtype=torch.float64) @ torch.randn(9, 9, dtype=torch.float64)
    weight = torch.randn(4, 9, dtype=torch.float64)
    moments = Moments(x.T @ x, x.sum(0), len(x))

    def lost(gone):
        kept = torch.tensor([i for i in range(9) if i not in gone])
        absorption = absorb(moments, kept, constant=False, ridge=0)
        made = absorption.columns(weight)
        return float((x @ weight.T - x[:, kept] @ made[:, kept].T).square().sum()) / len(x)

    found = eliminate([Summing(weight, moments, torch.arange(9), False)], 1, 9, ridge=0, at_least=1, share=1 / 99)
    order = found.order[0].tolist()
    for count in range(1, 8):
        gone = order[:count]
        assert lost(gone) == pytest.approx(min(lost([*gone[:-1], i]) for i in range(9) if i not in gone[:-1]), rel=1e-6)
        assert float(found.cost[0, :count].sum()) >= lost(gone) * (1 - 1e-6)  # it never falls
    assert lost(order[:2]) == pytest.approx(float(found.cost[0, :2].sum()), rel=1e-6)


def test_of_two_that_repeat_each_other_one_is_free():
    torch.manual_seed(0)
    x = torch.randn(300, 6, dtype=torch.float64)
    x[:, 4] = 2 * x[:, 1]
    weight = torch.randn(3, 6, dtype=torch.float64)
    weight[:, 0] = 0.5  # the smallest of the others
    for share in (1 / 99, 1 / 3):
        moments = Moments(x.T @ x, x.sum(0), len(x))
        found = eliminate([Summing(weight, moments, torch.arange(6), False)], 1, 6, ridge=1e-9, at_least=1, share=share)
        cost = found.cost[0]
        assert int(found.order[0, 0]) in (1, 4) and float(cost[0]) < 1e-6 * float(cost[-1])
        assert float(cost[1]) > 1e-3 * float(cost[-1])


def test_contexts_lose_equally_many_and_wide_entries_go_whole():
    torch.manual_seed(0)
    x = torch.randn(300, 12, dtype=torch.float64)
    weight = torch.randn(5, 12, dtype=torch.float64)
    moments = Moments(x.T @ x, x.sum(0), len(x))
    two = eliminate([Summing(weight, moments, torch.arange(12), True)], 2, 6, ridge=1e-3, at_least=1)
    assert two.order.sort(-1).values.tolist() == [list(range(6))] * 2
    heads = torch.arange(12) // 4
    wide = eliminate([Summing(weight, moments, heads, False)], 1, 3, ridge=0, at_least=3)
    squares = torch.linalg.inv(moments.squares / len(x))
    for place, head in enumerate(wide.order[0].tolist()):
        mine = (heads == head).nonzero().flatten()
        left = torch.linalg.inv(squares[mine][:, mine])
        alone = float((weight[:, mine].T @ weight[:, mine] * left).sum())
        assert float(wide.cost[0, place]) >= alone * (1 - 1e-9)
    wide = eliminate([Summing(weight, moments, torch.arange(12) // 3, False)], 1, 4, ridge=0, at_least=1, share=0.5)
    for count in (1, 2, 3):
        kept = torch.isin(torch.arange(12) // 3, wide.order[0, count:]).nonzero().flatten()
        made = absorb(moments, kept, constant=False, ridge=0).columns(weight)
        left = float((x @ weight.T - x[:, kept] @ made[:, kept].T).square().sum()) / len(x)
        assert float(wide.cost[0, :count].sum()) == pytest.approx(left, rel=1e-6)
    assert eliminate([Summing(weight, Moments(x.T @ x * torch.nan, x.sum(0), 9), heads, False)], 1, 3, ridge=0, at_least=1) is None  # fmt: skip # noqa: E501


@pytest.mark.parametrize(
    ("points", "slopes"),
    [
        ([(0, 0), (1, 1), (2, 3)], [1, 2]),
        ([(0, 0), (1, 4), (2, 5)], [2.5, 2.5]),  # the cheap one comes only with the dear one
        ([(0, 0), (2, 1), (4, 2)], [0.5, 0.5]),
        ([(0, 0)], []),
    ],
)
def test_prices_never_fall(points, slopes):
    assert _slopes([(float(x), float(y)) for x, y in points]) == slopes


class Two(nn.Module):
    """Two hidden layers; half of the second does nothing."""

    def __init__(self, width=8, hidden=24):
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in "ab")
        with torch.no_grad():
            self.b[2].weight[:, ::2] = 0

    def forward(self, x):
        x = x + self.a(x)
        return x + self.b(x)


def two(seed=0):
    torch.manual_seed(seed)
    x = torch.randn(32, 8)
    return ecospa_fx.compile(Two(), example_inputs=(x,)), x


def train(model, optimizer, trainer, x, steps):
    for _ in range(steps):
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()


def test_what_does_nothing_goes_first():
    model, x = two()
    saliency = Saliency(model)
    (model(x) - x.flip(-1)).square().mean().backward()
    saliency.accumulate()
    sparsifier = AdaptiveSparsifier(model, target=0.5)
    for size in (0.9, 0.8):
        whole = sparsifier.sizes().total({})
        worth = {coupling: worth_of(coupling, saliency) for coupling in ecospa_fx.couplings(model)}
        widths = sparsifier.widths(worth, round(size * whole))
        (coupling,) = widths
        assert coupling.name.startswith("b.")
        left = sparsifier.sizes().total({coupling.name: widths[coupling]})
        assert size * whole - 17 <= left <= size * whole
        curve = forecast(model, [coupling], saliency, widths=widths).curves[coupling]
        gone = sorted(set(range(24)) - set(curve.keep(widths[coupling]).tolist()))
        assert all(entry % 2 == 0 for entry in gone)


@pytest.mark.parametrize("target", [0.9, 0.61, 0.34])
def test_it_reaches_the_target_and_never_passes_it(target):
    model, x = two()
    whole = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, policy="adaptive", target=target, interval=5, end=20)
    sizes = []
    for _ in range(25):
        train(model, optimizer, trainer, x, 1)
        sizes.append(trainer.size)
        assert trainer.size >= target * whole
    assert trainer.done and trainer.size - 17 < target * whole
    assert sizes[4] > sizes[9] > sizes[19] == sizes[-1] and len(trainer.history) <= 4
    due = [whole * (1 - (1 - target) * step / 4) for step in (1, 2, 3, 4)]
    assert all(size <= most + 17 for size, most in zip((sizes[i] for i in (4, 9, 14, 19)), due, strict=True))


def test_history_tells_what_was_expected():
    model, x = two()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, policy="adaptive", target=0.6, interval=5, end=10)
    train(model, optimizer, trainer, x, 10)
    for entry in trainer.history:
        assert entry["expected"].keys() == entry["removed"].keys() <= entry["importance"].keys()
        assert all(rise >= 0 for rise in entry["expected"].values())
    assert trainer.forecast.positions == 32


def test_what_learns_nothing_stays_whole():
    model, x = two()
    for parameter in model.a.parameters():
        parameter.requires_grad = False
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, policy="adaptive", target=0.8, interval=5, end=10)
    train(model, optimizer, trainer, x, 10)
    assert {c.name.split(".")[0]: c.size for c in ecospa_fx.couplings(model)}["a"] == 24
    assert trainer.done


def test_what_has_no_finite_gradient_stays_whole():
    model, x = two()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, policy="adaptive", target=0.8, interval=2, end=4)
    (spoilt,) = (c for c in ecospa_fx.couplings(model) if c.name.startswith("a"))
    for _ in range(4):
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        trainer.policy.saliency.reader._pending.squares[spoilt.name][0] = torch.nan  # as an overflow in backward does
        trainer.step()
        optimizer.zero_grad()
    assert {c.name.split(".")[0]: c.size < 24 for c in ecospa_fx.couplings(model)} == {"a": False, "b": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "mine"}, "policy='mine' is none of 'paper', 'adaptive'"),
        ({"policy": "adaptive"}, 'policy="adaptive" needs an end to be reached; pass end='),
        ({"policy": "adaptive", "end": 10, "score": "taylor"}, "policy=\"adaptive\" .* leave score='taylor' out"),
        ({"policy": "adaptive", "end": 10, "theta": 0.5}, 'policy="adaptive" .* leave theta=0.5 out'),
    ],
)
def test_settings_that_do_not_go_together(options, message):
    model, _ = two()
    with pytest.raises(TargetError, match=message):
        ecospa_fx.EcoSpaTrainer(model, torch.optim.AdamW(model.parameters()), **options)


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    batches = torch.randn(30, 16, 8, generator=torch.Generator().manual_seed(1))
    settings = {"policy": "adaptive", "target": 0.5, "interval": 8, "start": 8, "end": 24}

    def run(model, optimizer, trainer, steps):
        for number in steps:
            train(model, optimizer, trainer, batches[number], 1)

    model, _ = two()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, **settings)
    run(model, optimizer, trainer, range(13))
    ecospa_fx.save(model, tmp_path / "saved", optimizer=optimizer, trainer=trainer)
    run(model, optimizer, trainer, range(13, 30))

    other = ecospa_fx.load(tmp_path / "saved", Two)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    again = ecospa_fx.EcoSpaTrainer(other, optimizer, **settings)
    ecospa_fx.resume(tmp_path / "saved", other, optimizer=optimizer, trainer=again)
    run(other, optimizer, again, range(13, 30))
    assert again.history[-1] == trainer.history[-1] and again.done
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_it_says_how_far_each_kind_can_go():
    model, x = two()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, policy="adaptive", target=0.6, interval=10, end=20)
    train(model, optimizer, trainer, x, 20)
    rises = trainer.forecast.by_kind()["ffn"]
    entries = sum(coupling.size for coupling in trainer.forecast.curves)
    assert len(rises) == entries + 1 and bool((rises.diff() >= 0).all()) and float(rises[0]) == 0
    line = str(trainer.forecast).splitlines()[-1].split()
    assert line[:3] == ["ffn", "2", str(entries)] and "absorbed" in line
    assert line[-1] == f"{(int((rises <= 0.1).sum()) - 1) / entries:.0%}"
    title, traces = (lambda f: (f["title"], f["traces"]))(figures_of(training_of(trainer, [1.0] * 20))[-1])
    assert title.startswith("How far each kind can go") and [trace["name"] for trace in traces] == ["ffn"]
    assert traces[0]["x"][-1] == 1 and traces[0]["y"][-1] == pytest.approx(float(rises[-1]))
