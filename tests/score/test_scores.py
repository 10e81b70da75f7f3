"""Every score against a slow obvious twin in float64, and what decides which entries go."""

import math

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx.score.judging import index_scores
from ecospa_fx.score.scores import SCORES


class Block(nn.Module):
    """Attention and an MLP whose inner values a twin can read."""

    def __init__(self, width=12, heads=3, hidden=10):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def parts(self, x):
        b, s, _ = x.shape
        q, k, v = (m(x).view(b, s, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        shares = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(torch.ones(s, s).triu(1).bool(), -math.inf).softmax(-1)
        return q, k, shares, (shares @ v).transpose(1, 2).flatten(2)

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = (m(x).view(b, s, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, -1))
        return x + self.down(nn.functional.gelu(self.up(x)))


def setting(optimizer=torch.optim.AdamW):
    torch.manual_seed(0)
    model, x = Block().double(), torch.randn(3, 5, 12, dtype=torch.float64)
    ecospa_fx.compile(model, example_inputs=(x,))
    return model, optimizer(model.parameters(), lr=1e-2), x


def train(model, optimizer, x, steps, estimator=None):
    """Steps with the gradients and weights that the estimator saw."""
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - x.flip(-1)).square().mean().backward()
        seen.append({n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()})
        if estimator is not None:
            estimator.accumulate()
        optimizer.step()
    return seen


def coupling_of(model, kind):
    return next(c for c in ecospa_fx.couplings(model) if c.kind == kind)


ELEMENTWISE = {
    "fisher": lambda w, g: g**2,
    "gradient": lambda w, g: abs(g),
    "taylor": lambda w, g: abs(w * g),
    "taylor_squared": lambda w, g: (w * g) ** 2,
}
GATHERING = {
    "sum": ({}, lambda steps: sum(steps) / len(steps)),
    "window": ({"window": 2}, lambda steps: sum(steps[-2:]) / 2),
    "decay": ({"decay": 0.8}, lambda s: sum(0.2 * 0.8 ** (3 - i) * x for i, x in enumerate(s)) / (1 - 0.8**4)),
}


@pytest.mark.parametrize("gathering", GATHERING)
@pytest.mark.parametrize("name", [*ELEMENTWISE, "own"])
def test_gradient_scores(name, gathering):
    of = ELEMENTWISE.get(name, lambda w, g: (w - g).abs())
    options, gathered = GATHERING[gathering]
    model, optimizer, x = setting()
    estimator = ecospa_fx.CoupledEstimator(model, of if name == "own" else name, **options)
    seen = train(model, optimizer, x, 4, estimator)
    up = gathered([of(*step["up.weight"]) for step in seen])
    down = gathered([of(*step["down.weight"]) for step in seen])
    ffn = coupling_of(model, "ffn")
    assert estimator.importance()[ffn] == pytest.approx(float(up.mean() + down.mean()) / 2, rel=1e-9)
    torch.testing.assert_close(estimator.entries(ffn), (up.mean(1) + down.mean(0)) / 2, rtol=1e-9, atol=0)
    # Dims of heads: by head, each matrix by its rows and columns.
    v = gathered([of(*step["v.weight"]) for step in seen]).view(3, 4, 12).mean(2)
    out = gathered([of(*step["out.weight"]) for step in seen]).view(12, 3, 4).mean(0)
    vo = coupling_of(model, "vo")
    torch.testing.assert_close(estimator.entries(vo, by_context=True), (v + out) / 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(estimator.entries(vo), ((v + out) / 2).sum(0), rtol=1e-9, atol=0)


def test_magnitude_reads_the_weights_as_they_are():
    model, optimizer, x = setting()
    estimator = ecospa_fx.CoupledEstimator(model, "magnitude")
    train(model, optimizer, x, 2, estimator)
    ffn = coupling_of(model, "ffn")
    expected = (model.up.weight.detach().square().mean(1) + model.down.weight.detach().square().mean(0)) / 2
    torch.testing.assert_close(estimator.entries(ffn), expected, rtol=1e-12, atol=0)
    assert estimator.importance()[ffn] == pytest.approx(float(expected.mean()), rel=1e-12)


def test_adam_reads_the_second_moments_of_the_optimizer():
    model, optimizer, x = setting()
    estimator = ecospa_fx.CoupledEstimator(model, "adam", optimizer=optimizer)
    with pytest.raises(ecospa_fx.errors.OptimizerError, match=r'"adam" reads `exp_avg_sq`.*nothing yet; take a step'):
        estimator.importance()
    train(model, optimizer, x, 3, estimator)
    moments = [optimizer.state[m.weight]["exp_avg_sq"] / (1 - 0.999**3) for m in (model.up, model.down)]
    expected = (moments[0].mean(1) + moments[1].mean(0)) / 2
    torch.testing.assert_close(estimator.entries(coupling_of(model, "ffn")), expected, rtol=1e-9, atol=0)
    sgd = torch.optim.SGD(model.parameters(), momentum=0.9, lr=1e-3)
    with pytest.raises(ecospa_fx.errors.OptimizerError, match="this SGD holds"):
        ecospa_fx.CoupledEstimator(model, "adam", optimizer=sgd).importance()
    with pytest.raises(ecospa_fx.errors.TargetError, match="reads the optimizer's state; pass optimizer="):
        ecospa_fx.CoupledEstimator(model, "adam")


def norms_of(value, dim):
    return value.detach().square().mean([d for d in range(value.ndim) if d != dim])


def test_activation_is_the_norm_of_what_an_entry_adds_to_a_product():
    model, optimizer, x = setting(torch.optim.SGD)
    optimizer.param_groups[0]["lr"] = 0.0  # the weights stay, so that one forward tells all
    estimator = ecospa_fx.CoupledEstimator(model, "activation")
    train(model, optimizer, x, 2, estimator)
    q, k, _, y = model.parts(x)
    hidden = nn.functional.gelu(model.up(x + model.out(y)))
    ffn = (norms_of(hidden, 2) * norms_of(model.down.weight, 1)).sqrt()
    torch.testing.assert_close(estimator.entries(coupling_of(model, "ffn")), ffn, rtol=1e-9, atol=0)
    vo = (norms_of(y, 2) * norms_of(model.out.weight, 1)).sqrt().view(3, 4)
    torch.testing.assert_close(estimator.entries(coupling_of(model, "vo"), by_context=True), vo, rtol=1e-9, atol=0)
    torch.testing.assert_close(estimator.entries(coupling_of(model, "heads")), vo.sum(1), rtol=1e-9, atol=0)
    qk = (q.detach().square().mean((0, 2)) * k.detach().square().mean((0, 2))).sqrt()
    torch.testing.assert_close(estimator.entries(coupling_of(model, "qk"), by_context=True), qk, rtol=1e-9, atol=0)
    assert estimator.importance()[coupling_of(model, "ffn")] == pytest.approx(float(ffn.mean()))
    with torch.no_grad():
        model(100 * x)  # not trained on, not looked at
    torch.testing.assert_close(estimator.entries(coupling_of(model, "ffn")), ffn, rtol=1e-9, atol=0)


def test_activation_follows_a_shrink():
    model, optimizer, x = setting(torch.optim.SGD)
    optimizer.param_groups[0]["lr"] = 0.0
    estimator = ecospa_fx.CoupledEstimator(model, "activation")
    train(model, optimizer, x, 1, estimator)
    before = {c.name: estimator.entries(c, by_context=True) for c in ecospa_fx.couplings(model)}
    keep = {"vo": torch.tensor([[0, 2], [1, 3], [0, 3]]), "ffn": torch.tensor([2, 5, 7])}
    ecospa_fx.shrink(model, {coupling_of(model, kind): rows for kind, rows in keep.items()})
    estimator.reset()
    train(model, optimizer, x, 1, estimator)
    vo = coupling_of(model, "vo")
    torch.testing.assert_close(estimator.entries(vo, by_context=True), before[vo.name].gather(1, keep["vo"]))


class Grouped(nn.Module):
    """Four query heads, two key heads, rotary halves: a context on one side only, and entries of two rows."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 8)

    def parts(self, x):
        b, s, _ = x.shape
        q, k, v = (m(x).view(b, s, -1, 4).transpose(1, 2) for m in (self.q, self.k, self.v))
        angle = torch.arange(s, dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=x.dtype)
        turned = [t * angle.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * angle.sin() for t in (q, k)]
        return *turned, v

    def forward(self, x):
        q, k, v = self.parts(x)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def test_activation_of_grouped_queries_and_rotary_pairs():
    torch.manual_seed(0)
    model, x = Grouped().double(), torch.randn(3, 5, 8, dtype=torch.float64)
    ecospa_fx.compile(model, example_inputs=(x,))
    estimator = ecospa_fx.CoupledEstimator(model, "activation")
    model(x).sum().backward()
    q, k, _ = (t.detach().square().mean((0, 2)) for t in model.parts(x))  # [heads, dims]
    before = q.view(2, 2, 4)
    both = (before.sum(1) * k).sqrt()  # queries of a group add up
    qk = coupling_of(model, "qk")
    pairs = both[:, :2] + both[:, 2:]
    torch.testing.assert_close(estimator.entries(qk, by_context=True), pairs, rtol=1e-9, atol=0)
    assert set(estimator.importance()) == set(ecospa_fx.couplings(model))
    ecospa_fx.shrink(model, {qk: torch.tensor([[1], [0]]), coupling_of(model, "groups"): torch.tensor([0])})
    estimator.reset()
    model(x).sum().backward()
    assert set(estimator.importance()) == set(ecospa_fx.couplings(model))
    # The first query of each group is left, and the rows of one pair in each head.
    qk = coupling_of(model, "qk")
    left = (before[:, 0] * k).sqrt()[[0, 1], :].gather(1, torch.tensor([[1, 3], [0, 2]])).sum(1, keepdim=True)
    torch.testing.assert_close(estimator.entries(qk, by_context=True), left, rtol=1e-9, atol=0)


def test_attention_entropy_judges_heads():
    model, optimizer, x = setting(torch.optim.SGD)
    optimizer.param_groups[0]["lr"] = 0.0
    with torch.no_grad():
        model.q.weight[:4] *= 30  # the first head looks hard
    estimator = ecospa_fx.CoupledEstimator(model, "attention_entropy")
    train(model, optimizer, x, 1, estimator)
    shares = model.parts(x)[2].detach()
    expected = []
    for head in range(3):
        focus = []
        for row in range(1, 5):  # the first query sees one key only
            p = shares[:, head, row, : row + 1]
            focus.append(1 + (p * p.log()).sum(-1).mean() / math.log(row + 1))
        expected.append(float(sum(focus)) / 4)
    heads = coupling_of(model, "heads")
    assert estimator.entries(heads).tolist() == pytest.approx(expected, rel=1e-5)
    assert set(estimator.importance()) == {heads}
    assert expected[0] > max(expected[1:])


def test_random_is_the_same_for_the_same_seed_and_step():
    model, _, _ = setting()
    ffn = coupling_of(model, "ffn")
    a, b, c = (ecospa_fx.CoupledEstimator(model, "random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.entries(ffn), b.entries(ffn)) and not torch.equal(a.entries(ffn), c.entries(ffn))
    assert a.importance() == b.importance() != c.importance()
    b.accumulate()
    assert not torch.equal(a.entries(ffn), b.entries(ffn))


OF_EXPERTS = ("reap", "frequency")  # see test_contributions.py


@pytest.mark.parametrize("name", [name for name in SCORES if name not in OF_EXPERTS])
def test_each_score_shrinks_to_the_target(name):
    model, optimizer, x = setting()
    target = 0.9 if name == "attention_entropy" else 0.6  # heads alone reach no further
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=target, interval=2, end=6, score=name)
    for _ in range(6):
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    assert trainer.done or name == "attention_entropy"
    assert all(value >= 0 for entry in trainer.history for value in entry["importance"].values())


@pytest.mark.parametrize("index", ["norms", "fisher", "activation", "random"])
def test_the_index_score_decides_which_entries_go(index):
    model, optimizer, x = setting()
    decided = []

    def before_shrink(model, keeps, optimizer):
        for coupling, keep in keeps.items():
            scores = (
                index_scores(model, coupling, by_context=True)
                if index == "norms"
                else own.entries(coupling, by_context=True)
            )
            decided.append(
                torch.equal(keep.expand(coupling.contexts, -1), scores.topk(keep.shape[-1]).indices.sort().values)
            )

    trainer = ecospa_fx.EcoSpaTrainer(
        model, optimizer, target=0.6, interval=2, end=2, index_score=index, before_shrink=before_shrink
    )
    own = trainer.policy.index
    for _ in range(2):
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    assert decided and all(decided) and trainer.done


def test_wrong_scores_are_refused():
    model, optimizer, x = setting()
    with pytest.raises(
        ecospa_fx.errors.TargetError, match=r"score='size' is none of 'fisher', 'gradient', .*nor a function"
    ):
        ecospa_fx.CoupledEstimator(model, "size")
    with pytest.raises(ecospa_fx.errors.TargetError, match=r"one of them forgets, not both"):
        ecospa_fx.CoupledEstimator(model, decay=0.5, window=3)
    estimator = ecospa_fx.CoupledEstimator(model, lambda weight, gradient: gradient.sum())
    with pytest.raises(ecospa_fx.errors.TargetError, match=r"returned \(\) for `.*` of shape .*what each entry of the"):
        train(model, optimizer, x, 1, estimator)


def test_heads_folded_into_the_batch_have_no_activation_of_their_own():
    """Which of the folded rows is whose head is not written down; what is seen elsewhere still counts."""
    from zoo import ZOO

    torch.manual_seed(0)
    model, x = ZOO["folded_attention"].build(), ZOO["folded_attention"].inputs(2, 3)
    ecospa_fx.compile(model, example_inputs=x)
    estimator = ecospa_fx.CoupledEstimator(model, "activation")
    model(*x)
    assert {c.kind for c in estimator.importance()} == {"vo", "heads"}
