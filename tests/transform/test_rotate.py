"""Rotation: the model computes what it did, and removing entries afterwards costs the least possible."""

import copy
import logging

import pytest
import torch
from test_absorb import WITHOUT, built, gathered, mlp
from torch import nn, optim
from zoo import ZOO

import ecospa_fx
from ecospa_fx.errors import NoCouplingError, OptimizerError
from ecospa_fx.model.optimizer_table import rules_for
from ecospa_fx.passes.transform.rotate import balanced, near_old_basis

ATTENTION = {"qk": "", "vo": ""}
ROTARY = {"qk": "brings in values that keep the old basis", "vo": ""}
EXPECTED = {  # kind -> the reason against a rotation, empty where it turns
    "attention": ATTENTION,
    "attention_without_bias": ATTENTION,
    "eager_attention": ATTENTION,
    "einsum_attention": ATTENTION,
    "folded_attention": ATTENTION,
    "attention_folded_heads_first": ATTENTION,
    "fused_segments": ATTENTION,
    "fused_split": ATTENTION,
    "fused_groups": ATTENTION,
    "fused_multi_query": ATTENTION,
    "fused_per_head": ATTENTION,
    "fused_stacked": ATTENTION,
    "fused_stacked_select": ATTENTION,
    "torch_attention": ATTENTION,
    "cross_attention": ATTENTION,
    "multi_query": ATTENTION,
    "grouped_expand": ROTARY,
    "grouped_repeat_interleave": ROTARY,
    "grouped_interleaved": ROTARY,
    "grouped_sdpa": ROTARY,
    "normed_queries": {"vo": ""},
    "transformer_block": ATTENTION,
    "everything_equal": ATTENTION,
}
QUICK = ("attention", "cross_attention", "fused_per_head", "fused_stacked", "multi_query", "grouped_sdpa",
         "everything_equal", "mlp", "glu", "conv_norm_conv", "recurrent")  # fmt: skip


def params(names):
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.sweep) for n in sorted(names)]


def computed(model, x):
    """Return the outputs, and the gradients of the inputs."""
    x = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in x]
    out = model(*x)
    out.square().sum().backward()
    model.zero_grad()
    return [out.detach(), *(t.grad for t in x if t.requires_grad)]


@pytest.mark.parametrize("name", params(EXPECTED))
@pytest.mark.parametrize("weighted", [False, True], ids=["weights", "activations"])
def test_a_rotation_changes_nothing_that_is_computed(name, weighted):
    """Also where heads have shrunk to different dims before."""
    model, x = built(name)
    for shrunk in (False, True):
        if shrunk:
            for coupling in ecospa_fx.couplings(model):
                if coupling.kind in ("qk", "vo") and coupling.size > 2:
                    rows = [torch.arange(coupling.size).roll(i)[1:].sort().values for i in range(coupling.contexts)]
                    ecospa_fx.shrink(model, {coupling: torch.stack(rows) if coupling.context else rows[0]})
        before, weights = computed(model, x), {n: p.detach().clone() for n, p in model.named_parameters()}
        grams = gathered(model, x) if weighted else None
        done = ecospa_fx.rotate(model, grams=grams)
        for a, b in zip(before, computed(model, x)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
        for coupling in ecospa_fx.couplings(model):
            if coupling.kind in EXPECTED[name]:
                assert EXPECTED[name][coupling.kind] in done.refused.get(coupling.name, "")
                assert bool(EXPECTED[name][coupling.kind]) == (coupling.name not in done.energy)
            if coupling.kind in ("heads", "groups"):
                assert coupling.name in done.refused
            if coupling.name in done.energy:
                energy = done.energy[coupling.name]
                assert energy.shape == (coupling.contexts, coupling.size) and (energy.diff(dim=-1) <= 0).all()
                turned = {m.parameter for m in coupling.members}
                assert all(not torch.equal(weights[n], model.get_parameter(n)) for n in turned)


@pytest.mark.parametrize("name", params(ZOO.keys() - EXPECTED.keys() - WITHOUT))
def test_what_is_not_linear_keeps_its_basis(name):
    model, _ = built(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    done = ecospa_fx.rotate(model)
    assert not done.energy and all(done.refused.values())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def product(model, head, size):
    """Multiply the output weight of one head with its value weight, the bias of the values as one more column."""
    rows = slice(head * size, (head + 1) * size)
    return model.o.weight[:, rows] @ torch.cat([model.v.weight[rows], model.v.bias[rows, None]], 1)


@pytest.mark.parametrize("keep", [None, {"vo": 2}])
def test_what_stays_is_the_best_that_so_few_can_do(keep):
    """Eckart and Young: no product of that rank is nearer, for any head, in any coordinates."""
    model, _ = built("attention")
    before = [product(model, head, 4) for head in range(3)]
    done = ecospa_fx.rotate(model, ["vo"], keep=keep)
    for head in range(3):
        torch.testing.assert_close(product(model, head, 4), before[head])
    for head in range(3):
        singular = torch.linalg.svdvals(before[head])[:4]
        torch.testing.assert_close(done.energy["vo"][head], singular.detach())
    ecospa_fx.shrink(model, {"vo": torch.arange(2)})
    for head in range(3):
        u, s, v = torch.linalg.svd(before[head], full_matrices=False)
        torch.testing.assert_close(product(model, head, 2), u[:, :2] * s[:2] @ v[:2])


def test_coordinates_stay_near_to_those_there_were():
    """Each entry that will stay is an old one plus a part of those that will go; they stay in order."""
    torch.manual_seed(0)
    near, far = torch.randn(2, 6, 9, dtype=torch.float64), torch.randn(2, 6, 7, dtype=torch.float64)
    near[:, 5] *= 30  # large ones stay
    grams = near @ near.mT, far @ far.mT
    turn = near_old_basis(balanced(*grams), 3, grams[0].diagonal(dim1=-2, dim2=-1).sqrt())
    for context in range(2):
        old = [int(((row - 1).abs() < 1e-9).nonzero()[-1]) for row in turn.near[context, :3]]
        assert old == sorted(set(old)) and 5 in old
        torch.testing.assert_close(turn.near[context, :3, old], torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(turn.far.mT @ turn.near, torch.eye(6, dtype=torch.float64).expand(2, 6, 6))


def test_with_activations_scores_change_least():
    """Queries times keys, over all pairs of positions that were seen, head by head."""
    model, x = built("attention")

    def scores(model):
        q, k, _ = model.heads(x[0])
        q, k = (t.transpose(0, 1).flatten(1, 2) for t in (q, k))
        return q @ k.mT

    before = scores(model).detach()
    grams = gathered(model, x)
    done = ecospa_fx.rotate(model, ["qk"], grams=grams)
    model.E = 2
    ecospa_fx.shrink(model, {"qk": torch.arange(2)})
    u, s, v = torch.linalg.svd(before, full_matrices=False)
    torch.testing.assert_close(scores(model), u[..., :2] * s[:, None, :2] @ v[:, :2])
    ratio = done.energy["qk"] / s[:, :4]  # of means over positions, not sums
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))


@pytest.mark.parametrize("name", ["attention", "fused_per_head", "grouped_sdpa"])
def test_gradients_turn_as_gradients_do(name):
    model, x = built(name)
    model(*x).square().sum().backward()
    ecospa_fx.rotate(model)
    turned = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(*x).square().sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(turned[n], p.grad, rtol=1e-8, atol=1e-8, msg=n)


def by_hand(before, after, blocks):
    """Return the matrices `[blocks, d, d]` that make the rows of `after` of those of `before`, block by block."""
    before, after = (t.detach().view(blocks, -1, t.shape[-1]) for t in (before, after))
    return after @ torch.linalg.pinv(before)


@pytest.mark.parametrize(("cls", "options"), [
    (optim.SGD, {"momentum": 0.9}), (optim.AdamW, {"amsgrad": True}), (optim.Adam, {}), (optim.NAdam, {}),
    (optim.RAdam, {}), (optim.Adamax, {}), (optim.RMSprop, {"momentum": 0.9, "centered": True}), (optim.Adagrad, {}),
    (optim.Adadelta, {}), (optim.ASGD, {"t0": 1.0}),
])  # fmt: skip
def test_what_optimizers_hold_turns_by_what_it_is_of(cls, options):
    model, x = built("attention")
    optimizer = cls(model.parameters(), **options)
    for _ in range(3):
        model(*x).square().sum().backward()
        optimizer.step()
    weight = model.v.weight
    before = weight.detach().clone()
    held = {k: v.clone() for k, v in optimizer.state[weight].items() if isinstance(v, torch.Tensor) and v.ndim}
    others = {k: v.clone() for k, v in optimizer.state[model.q.weight].items() if isinstance(v, torch.Tensor)}
    ecospa_fx.rotate(model, ["vo"], optimizer=optimizer)
    turn = by_hand(before, weight, 3)
    back = turn.inverse().mT
    by = {"gradient": back, "square": back.square(), "update": turn, "update_square": turn.square()}
    transforms = rules_for(cls).transforms
    assert held and held.keys() <= transforms.keys()
    for entry, value in held.items():
        how, value = transforms[entry], value.view(3, 4, -1)
        expected = (back.square() @ value.square()).sqrt() if how == "scale" else by[how] @ value
        found = optimizer.state[weight][entry].view(3, 4, -1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, msg=entry)
    assert all(torch.equal(optimizer.state[model.q.weight][k], v) for k, v in others.items())


@pytest.mark.parametrize(("cls", "entry"), [(optim.Rprop, "prev"), (optim.Adafactor, "row_var")])
def test_what_cannot_follow_keeps_its_basis(cls, entry, caplog):
    model, x = built("attention")
    optimizer = cls(model.parameters())
    model(*x).square().sum().backward()
    optimizer.step()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with caplog.at_level(logging.INFO, logger="ecospa_fx.shrink"):
        done = ecospa_fx.rotate(model, ["vo"], optimizer=optimizer)
    assert done.refused["vo"].endswith(f": how `{entry}` of {cls.__name__} follows a change of basis is not known")
    assert f"vo keeps its basis: {done.refused['vo']}" in caplog.text
    assert str(done) == f"vo: as it was, {done.refused['vo']}"
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_copies_turn_too():
    model, x = built("attention")
    module = copy.deepcopy(model)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) / 10)
    tensors = {n: t.detach().clone() for n, t in model.state_dict().items()}
    before = module(*x)
    ecospa_fx.rotate(model, also=[module, tensors])
    torch.testing.assert_close(module(*x), before)
    assert all(torch.equal(tensors[n], p) for n, p in model.named_parameters())


def test_what_was_gathered_turns_too():
    model, x = built("fused_per_head")
    grams = gathered(model, x)
    ecospa_fx.rotate(model, grams=grams)
    now = gathered(model, x).state_dict()
    assert grams.state_dict().keys() == now.keys() and any(name.startswith("near ") for name in now)
    for name, value in grams.state_dict().items():
        torch.testing.assert_close(value, now[name], msg=name)


class Between(nn.Module):
    """Two linear maps and something between them."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(5, 6), nn.Linear(6, 5), between
        self.scale = nn.Parameter(torch.rand(6))
        self.register_buffer("table", torch.rand(6))

    def forward(self, x):
        return self.b(self.between(self, self.a(x)))


BETWEEN = {
    "nothing": (lambda m, x: x, ""),
    "a number": (lambda m, x: -x * 0.5 / 3, ""),
    "a sum of two": (lambda m, x: x + x.flip(0), "aten.flip"),
    "itself": (lambda m, x: x + x, ""),
    "a constant": (lambda m, x: x + 1, "aten.add"),
    "a table": (lambda m, x: x + m.table, "a buffer lies on it"),
    "scales": (lambda m, x: x * m.scale, "aten.mul"),
    "a shift": (lambda m, x: x + m.scale, ""),
    "its own size": (lambda m, x: x / x.abs().sum(), "aten.abs"),
    "one over it": (lambda m, x: 1 / x, "aten.reciprocal"),
    "a view": (lambda m, x: x.view(-1, 3, 2).flatten(1), ""),
    "dropout": (lambda m, x: nn.functional.dropout(x, 0.1), "aten.dropout"),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_only_what_is_linear_in_all_entries_alike_may_stand_between(what):
    between, reason = BETWEEN[what]
    torch.manual_seed(0)
    model, x = Between(between).double(), torch.randn(4, 5, dtype=torch.float64)
    ecospa_fx.compile(model, example_inputs=(x,))
    done = ecospa_fx.rotate(model)
    for coupling in ecospa_fx.couplings(model):  # a view makes two of one
        assert (reason == "") == (coupling.name in done.energy), done
        assert reason in done.refused.get(coupling.name, "")
    if not reason:
        torch.manual_seed(0)
        twin = Between(between).double()
        torch.testing.assert_close(model(x), twin(x))


def test_dead_entries_and_dead_weights_do_no_harm():
    model, x = built("attention")
    with torch.no_grad():
        model.v.weight[:2].zero_()
        model.v.bias[:2].zero_()
        model.q.weight.zero_()
        model.q.bias.zero_()
    before = computed(model, x)
    ecospa_fx.rotate(model)
    for a, b in zip(before, computed(model, x)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    zero = torch.zeros(1, 3, 3)
    assert all(bool(t.isfinite().all()) for t in (lambda t: (t.near, t.far, t.energy))(balanced(zero, zero)))


def test_float32_is_as_exact_as_float32_can_be():
    torch.manual_seed(0)
    model = ZOO["attention"].build().eval()
    x = ZOO["attention"].inputs(4, 5)
    ecospa_fx.compile(model, example_inputs=x)
    before = model(*x)
    for _ in range(10):
        ecospa_fx.rotate(model)
    torch.testing.assert_close(model(*x), before, rtol=1e-5, atol=1e-6)


def test_an_optimizer_that_nothing_can_be_carried_through_is_an_error():
    model, _ = built("attention")
    optimizer = optim.LBFGS(model.parameters())
    with pytest.raises(OptimizerError, match="LBFGS keeps steps and gradient differences"):
        ecospa_fx.rotate(model, optimizer=optimizer)


def test_an_unknown_name_is_an_error():
    model, _ = mlp()
    with pytest.raises(NoCouplingError, match="the model has no coupling `qk`; it has ffn"):
        ecospa_fx.rotate(model, ["qk"])


def test_a_trainer_rotates_what_it_shrinks():
    errors = {}
    for options in ({}, {"rotate": True}, {"rotate": True, "absorb": True}):
        model, x = built("attention")
        model.train()
        whole, optimizer = model(*x).detach(), optim.AdamW(model.parameters(), lr=1e-5)
        trainer = ecospa_fx.EcoSpaTrainer(
            model, optimizer, target=0.7, interval=10, end=4, shape="one_shot", start=3, top_k=1.0,
            frozen=["heads"], score="magnitude", **options,
        )  # fmt: skip
        for _ in range(4):
            (model(*x) - whole).square().mean().backward()
            optimizer.step()
            trainer.step()
            optimizer.zero_grad()
        assert trainer.history
        errors[len(options)] = (model(*x) - whole).square().mean().item()
    assert errors[1] < 0.5 * errors[0] and errors[2] < errors[1]
