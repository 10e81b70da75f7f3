"""Estimator, sparsifier and trainer: each against a slow obvious twin, and the trainer to its target."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ecospa_fx
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.cost import CostModel
from ecospa_fx.score.judging import index_scores


class Attention(nn.Module):
    """Fused qkv with a bias, and an MLP: segments, heads and several couplings on one weight."""

    def __init__(self, width=12, heads=3, hidden=20):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        b, s, d = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(d, dim=-1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, d))
        return x + self.down(nn.functional.gelu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, layers=2, **sizes):
        super().__init__()
        self.layers = nn.ModuleList(Attention(**sizes) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def setting(dtype=torch.float64, optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = Stack().to(dtype)
    x = torch.randn(4, 5, 12, dtype=dtype)
    ecospa_fx.compile(model, example_inputs=(x,))
    return model, optimizer(model.parameters(), **{"lr": 1e-2, **options}), x


def one_step(model, optimizer, x, trainer=None):
    loss = (model(x) - x.flip(-1)).square().mean()
    loss.backward()
    optimizer.step()
    if trainer is not None:
        trainer.step()
    optimizer.zero_grad()
    return loss  # held by the caller, as people do: its graph is alive while the next shrink happens


def rows_of_qkv():
    """The rows of the qkv matrices of a layer, by hand: matrix -> entry -> row numbers."""
    return {part: {e: [part * 12 + h * 4 + e for h in range(3)] for e in range(4)} for part in range(3)}


def test_importance_is_the_mean_of_squared_gradients_per_matrix():
    model, optimizer, x = setting()
    estimator = ecospa_fx.CoupledEstimator(model)
    grads = []
    for _ in range(3):
        (model(x) - x).square().mean().backward()
        estimator.accumulate()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    importance = {coupling.name: value for coupling, value in estimator.importance().items()}
    for layer in ("layers.0", "layers.1"):

        def mean(name, rows=slice(None), layer=layer):
            return sum(float(g[f"{layer}.{name}.weight"][rows].square().mean()) for g in grads) / len(grads)

        expected = {
            "ffn": (mean("up") + mean("down")) / 2,
            "qk": (mean("qkv", slice(0, 12)) + mean("qkv", slice(12, 24))) / 2,
            "vo": (mean("qkv", slice(24, 36)) + mean("out")) / 2,
            "heads": sum(mean("qkv", slice(i, i + 12)) for i in (0, 12, 24)) / 4 + mean("out") / 4,
        }
        for kind, value in expected.items():
            assert importance[f"{layer}.{kind}"] == pytest.approx(value, rel=1e-12), kind


def test_index_score_is_the_product_of_slice_norms_with_biases_in_their_rows():
    model, _, _ = setting()
    layer = model.layers[1]
    weight, bias = layer.qkv.weight.detach(), layer.qkv.bias.detach()
    scores = {c.name: index_scores(model, c) for c in ecospa_fx.couplings(model)}
    norm = lambda rows: math.sqrt(float(weight[rows].square().sum() + bias[rows].square().sum()))  # noqa: E731
    rows = rows_of_qkv()
    for entry in range(4):
        out = layer.out.weight.detach()[:, [h * 4 + entry for h in range(3)]]
        assert scores["layers.1.qk"][entry] == pytest.approx(norm(rows[0][entry]) * norm(rows[1][entry]), rel=1e-12)
        expected = norm(rows[2][entry]) * float(out.norm())
        assert scores["layers.1.vo"][entry] == pytest.approx(expected, rel=1e-12)
    for entry in range(20):
        up, bias, down = layer.up.weight.detach(), layer.up.bias.detach(), layer.down.weight.detach()
        row = math.sqrt(float(up[entry].square().sum() + bias[entry].square()))
        assert scores["layers.1.ffn"][entry] == pytest.approx(row * float(down[:, entry].norm()), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(theta=st.floats(0.05, 1.0), top_k=st.floats(0.05, 1.0), seed=st.integers(0, 100))
def test_the_rule_of_the_paper(theta, top_k, seed):
    """The top-k least important couplings keep the smallest set of entries that holds theta of the score; no others."""
    model, _, _ = RULE_MODEL
    generator = torch.Generator().manual_seed(seed)
    found = ecospa_fx.couplings(model)
    importance = {c: float(torch.rand((), generator=generator)) for c in found}
    sizes = CostModel(model, model.__dict__[MODEL])
    reachable = sizes.total(dict.fromkeys(sizes.sizes, 1)) / sizes.original  # so that the target never stops the rule
    sparsifier = ecospa_fx.CoupledSparsifier(model, target=reachable, top_k=top_k, theta=theta)
    keeps = sparsifier.decide(importance, at_most=10**9)  # in no hurry
    least = sorted(found, key=importance.__getitem__)[: max(1, math.ceil(top_k * len(found)))]
    assert set(keeps) <= set(least)
    for coupling in least:
        # One row per head where heads may differ: each keeps its own strongest, as many, and theta is of all together.
        scores = index_scores(model, coupling, by_context=True)
        assert len(scores) == coupling.contexts
        keep = keeps.get(coupling, torch.arange(coupling.size)).expand(coupling.contexts, -1)
        kept = scores.gather(1, keep)
        held = float(kept.sum() / scores.sum())
        assert held >= theta - 1e-9
        for row, positions in zip(scores, keep, strict=True):
            gone = [float(row[i]) for i in range(len(row)) if i not in positions.tolist()]
            assert not gone or max(gone) <= float(row[positions].min())
        # One less in each would not hold it.
        assert keep.shape[1] == 1 or held - float(kept.min(1).values.sum() / scores.sum()) < theta


RULE_MODEL = setting()


def test_never_past_the_target_and_within_one_entry_of_it():
    model, optimizer, x = setting(torch.float32)
    original = sum(p.numel() for p in model.parameters())
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, theta=0.8, interval=3)
    sizes = []
    for _ in range(150):
        one_step(model, optimizer, x, trainer)
        sizes.append(trainer.size)
        if trainer.done:
            break
    assert trainer.done
    assert all(size >= 0.6 * original for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
    # No coupling can lose one more entry: the smallest unit is a hidden entry of the MLP.
    assert trainer.size - 0.6 * original < 2 * 12 + 1
    assert sum(sum(entry["removed"].values()) for entry in trainer.history) > 0
    before = trainer.size
    one_step(model, optimizer, x, trainer)
    assert trainer.size == before


@pytest.mark.parametrize("target", [0.75, 0.4])
def test_the_end_of_the_schedule_is_kept(target):
    model, optimizer, x = setting(torch.float32)
    original = sum(p.numel() for p in model.parameters())
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=target, theta=0.999, interval=4, start=4, end=22)
    for step in range(1, 24):
        one_step(model, optimizer, x, trainer)
        assert trainer.done == (step >= 22) or trainer.done
    assert trainer.done
    assert 0 <= trainer.size / original - target < 0.02
    assert trainer.history[-1]["step"] <= 22
    assert len(trainer.history) >= 4  # gradually


def test_size_model_counts_what_is_there():
    model, _, _ = setting(torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        sizes = CostModel(model, model.__dict__[MODEL])
        assert sizes.total({}) == sum(p.numel() for p in model.parameters())
        wish = {name: int(torch.randint(1, size + 1, (), generator=generator)) for name, size in sizes.sizes.items()}
        ecospa_fx.shrink(model, {name: torch.arange(size) for name, size in wish.items()})
        assert sizes.total(wish) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_training_goes_on_exactly(optimizer, options):
    """After a shrink, steps equal those of a freshly built small model with sliced weights and state."""
    model, opt, x = setting(optimizer=optimizer, **options)
    for _ in range(3):
        loss = one_step(model, opt, x)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {
        name: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in opt.state[p].items()}
        for name, p in model.named_parameters()
    }
    ecospa_fx.shrink(model, {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model)}, optimizer=opt)
    plan = ecospa_fx.plan(model)
    assert loss.requires_grad  # the old graph is still alive, with gradient accumulators of the old shapes

    def cut(tensor, name):
        for dim in range(tensor.ndim):
            if (name, dim) in plan.kept:
                tensor = tensor.index_select(dim, plan.kept[name, dim])
        return tensor

    fresh = copy.deepcopy(model)
    fresh_opt = optimizer(fresh.parameters(), **{"lr": 1e-2, **options})
    for name, p in fresh.named_parameters():
        assert torch.equal(p, cut(dense[name], name))
        fresh_opt.state[p] = {
            k: cut(v, name) if isinstance(v, torch.Tensor) and v.shape == dense[name].shape else copy.deepcopy(v)
            for k, v in moments[name].items()
        }
    for _ in range(2):
        one_step(model, opt, x)
        one_step(fresh, fresh_opt, x)
    for (name, p), q in zip(model.named_parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=name)


def test_gradients_follow_a_shrink_between_backward_and_step():
    model, optimizer, x = setting()
    loss = (model(x) - x).square().mean()
    loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    ecospa_fx.shrink(model, {"layers.0.ffn": torch.tensor([1, 4, 7])}, optimizer=optimizer)
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert torch.equal(grads["layers.0.up.weight"], before["layers.0.up.weight"][[1, 4, 7]])
    assert torch.equal(grads["layers.0.down.weight"], before["layers.0.down.weight"][:, [1, 4, 7]])
    assert torch.equal(grads["layers.1.up.weight"], before["layers.1.up.weight"])
    optimizer.step()


def test_hooks_on_parameters_survive_a_shrink():
    model, optimizer, x = setting()
    seen = []
    model.layers[0].up.weight.register_hook(lambda grad: seen.append(("tensor", tuple(grad.shape))))
    model.layers[0].up.weight.register_post_accumulate_grad_hook(lambda p: seen.append(("post", tuple(p.grad.shape))))
    loss = one_step(model, optimizer, x)
    ecospa_fx.shrink(model, {"layers.0.ffn": torch.arange(6)}, optimizer=optimizer)
    one_step(model, optimizer, x)
    assert seen == [("tensor", (20, 12)), ("post", (20, 12)), ("tensor", (6, 12)), ("post", (6, 12))]
    assert loss.requires_grad


def test_step_without_gradients_says_so():
    model, optimizer, x = setting()
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=1)
    model(x).sum().backward()
    optimizer.zero_grad()
    with pytest.raises(
        ecospa_fx.errors.OptimizerError, match=r"call trainer.step\(\) after backward\(\) and before zero"
    ):
        trainer.step()


def test_before_shrink_sees_what_will_stay():
    model, optimizer, x = setting()
    seen = []

    def before_shrink(model_, keeps, optimizer_):
        assert model_ is model and optimizer_ is optimizer
        seen.append({coupling.name: (coupling.size, len(keep)) for coupling, keep in keeps.items()})

    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=1, before_shrink=before_shrink)
    one_step(model, optimizer, x, trainer)
    assert [{name: size - keep for name, (size, keep) in seen[0].items()}] == [trainer.history[0]["removed"]]


def test_fit_on_pairs_and_mappings():
    model, optimizer, x = setting(torch.float32)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=2)
    losses = trainer.fit([(x, x.flip(-1))] * 12, loss=nn.functional.mse_loss)
    assert len(losses) == 12 and trainer.steps == 12 and losses[-1] < losses[0]
    with pytest.raises(ecospa_fx.errors.EcoSpaError, match="pass loss="):
        trainer.fit([(x, x)])


def test_lazily_compiled_model_trains():
    torch.manual_seed(0)
    model = ecospa_fx.compile(Stack())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=3, theta=0.7, end=20)
    x = torch.randn(4, 5, 12)
    for _ in range(21):
        one_step(model, optimizer, x, trainer)
    assert trainer.done
    assert type(model).__name__ == "Stack" and isinstance(model, Stack)
