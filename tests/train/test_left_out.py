"""Couplings of which nothing is known: frozen layers, gradients that are all zero, couplings that calls withdraw."""

import pytest
import torch
from test_training import Stack
from torch import nn

import ecospa_fx
from ecospa_fx.errors import NoCouplingError, OptimizerError
from ecospa_fx.score.estimator import CoupledEstimator

X = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
SETTINGS = {"target": 0.8, "among": "prunable", "interval": 2, "end": 8}
BOTH = pytest.mark.parametrize("policy", ["paper", "adaptive"])


def stack():
    torch.manual_seed(0)
    return Stack(width=16, heads=2, hidden=32)


def trained(model, steps, between=lambda step: None, zero_first=False, execution="graph", **settings):
    """Train a compiled model, its optimizer made from what trains at the start."""
    ecospa_fx.compile(model, execution=execution)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, **{**SETTINGS, **settings})
    for step in range(steps):
        between(step)
        (model(X) - X.flip(-1)).square().mean().backward()
        optimizer.step()
        if zero_first:
            optimizer.zero_grad(set_to_none=False)
        trainer.step()
        optimizer.zero_grad()
    return trainer


def said(caplog):
    return [record.message for record in caplog.records if record.name == "ecospa_fx.shrink"]


def freeze(model, *names):
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


def couplings_under(model, name):
    return {c.name: c.size for c in ecospa_fx.couplings(model) if any(m.parameter.startswith(name) for m in c.members)}


MODULE = {"policy": "adaptive", "absorb": False, "rotate": False}


@pytest.mark.parametrize(("execution", "settings"), [("graph", {"policy": "paper"}), ("module", MODULE)])
def test_gradients_that_are_all_zero_remove_nothing(execution, settings):
    model = stack()
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(OptimizerError) as caught:
        trained(model, 8, zero_first=True, execution=execution, **settings)
    assert str(caught.value) == (
        "every gradient that was read since the last sparsification step is 0, as after zero_grad(set_to_none=False), "
        "so that no entry is worth less than another: call trainer.step() before zero_grad(), or make the trainer with "
        'gradients="optimizer"'
    )
    assert [p.shape for p in model.parameters()] == shapes
    assert trained(stack(), 8, zero_first=True, gradients="optimizer", policy=settings["policy"]).done  # way out


def test_what_is_read_in_backward_does_not_mind_gradients_that_are_zeroed():
    same = [trained(stack(), 8, policy="adaptive", zero_first=zeroed) for zeroed in (False, True)]
    assert same[0].done and [e["removed"] for e in same[0].history] == [e["removed"] for e in same[1].history]


@pytest.mark.parametrize(("policy", "end"), [("paper", 8), ("paper", None), ("adaptive", 8)])
def test_frozen_layers_stay_whole_and_it_is_said(policy, end, caplog):
    model = freeze(stack(), "layers.0")
    trainer = trained(model, 10, policy=policy, end=end)
    frozen = couplings_under(model, "layers.0.")
    whole = {c.name: c.original_size for c in ecospa_fx.couplings(model)}
    assert frozen and all(size == whole[name] for name, size in frozen.items())
    gone = {name for entry in trainer.history for name in entry["removed"]}
    assert gone and not gone & frozen.keys()
    reason = "its weights are frozen (requires_grad=False), so that no gradient says what they are worth"
    assert trainer.left_out == dict.fromkeys(frozen, reason)
    warnings = [message for message in said(caplog) if "left out" in message]
    assert len(warnings) == 1 and warnings[0].endswith(
        f'left out: {reason}. Let them train, or judge them by something else: score="magnitude" and '
        'score="activation" need no gradients; frozen=[...] keeps them whole without this warning'
    )


def test_a_coupling_with_one_frozen_weight_is_judged_by_the_others():
    model = freeze(stack(), "layers.0.up", "layers.1.up")
    trainer = trained(model, 10)
    (up, down) = (model.layers[0].up.weight, model.layers[0].down.weight)
    assert up.shape[0] == down.shape[1] < 32 and not trainer.left_out
    # Of the same gradients the estimator makes the mean over the weight that trains alone.
    estimator = CoupledEstimator(model)
    (model(X) - X.flip(-1)).square().mean().backward()
    estimator.accumulate()
    (ffn,) = (c for c in ecospa_fx.couplings(model) if c.name == "layers.0.ffn")
    assert estimator.importance()[ffn] == pytest.approx(float(down.grad.double().square().mean()))
    # The adaptive policy reads the gradient where the coupling is summed over, whatever trains around it. Where the
    # model's own Python runs, it wants all weights that sum over it: here that is `down`.
    for name in ("layers.0.up", "layers.0.down"):
        trainer = trained(freeze(stack(), name), 10, policy="adaptive")
        assert not trainer.left_out and any("layers.0.ffn" in entry["importance"] for entry in trainer.history)
    assert not trained(freeze(stack(), "layers.0.up"), 10, execution="module", **MODULE).left_out
    left_out = trained(freeze(stack(), "layers.0.down"), 10, execution="module", **MODULE).left_out
    reason = "some of its weights are frozen (requires_grad=False), so that gradients say what a part of it is worth"
    assert left_out == {"layers.0.ffn": reason}


def test_scores_that_need_no_gradient_judge_frozen_layers():
    trainer = trained(freeze(stack(), "layers.0"), 10, score="magnitude")
    assert trainer.done and not trainer.left_out
    assert any(name.startswith("layers.0.") for entry in trainer.history for name in entry["removed"])


def test_a_model_that_is_all_frozen_is_waited_for(caplog):
    model = nn.Sequential(stack(), nn.Linear(16, 16))
    model[0].requires_grad_(False)

    def thaw(step):
        if step == 5:
            model[0].requires_grad_(True)

    trainer = trained(model, 10, thaw)
    assert [entry["step"] for entry in trainer.history] == [6, 8] and trainer.done
    assert len([message for message in said(caplog) if "left out" in message]) == 1
    model[0].requires_grad_(False)
    again = ecospa_fx.EcoSpaTrainer(model, torch.optim.SGD(model[1].parameters(), 0.1), target=0.5)
    with pytest.raises(OptimizerError) as caught:
        again.sparsify()
    assert str(caught.value) == (
        "every weight on a coupling is frozen (requires_grad=False), so that no gradient says what they are worth; let "
        'some train, or judge them by something else: score="magnitude" and score="activation" need no gradients'
    )


class Modes(nn.Module):
    """Needs the axis of some layers whole in train mode."""

    def __init__(self, layers):
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(16, 32) for _ in range(layers))
        self.downs = nn.ModuleList(nn.Linear(32, 16) for _ in range(layers))

    def forward(self, x):
        for i, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
            hidden = up(x)
            x = x + down(hidden.sort(-1).values if self.training and i == 0 else hidden.relu())
        return x


@BOTH
def test_couplings_that_a_later_call_withdraws(policy, caplog):
    model = ecospa_fx.compile(Modes(1))
    model.eval()(X)
    assert len(ecospa_fx.couplings(model)) == 1
    with pytest.raises(NoCouplingError) as caught:
        trained(model.train(), 10, policy=policy)
    assert str(caught.value).startswith(
        "no coupling of Modes is left to shrink: a call of the model, in another mode or with other arguments than the "
        "first, needs their axes whole: ups.0.weight[0], ups.0.bias[0], downs.0.weight[1] (32): aten.sort: "
    )
    # With others left it goes on with these, as far as they reach.
    model = ecospa_fx.compile(Modes(2))
    model.eval()(X)
    trainer = trained(model.train(), 10, policy=policy, target=0.4, among="all")
    assert model.ups[0].weight.shape == (32, 16) and model.ups[1].weight.shape[0] < 20
    assert trainer.done and model.ups[1].weight.shape[0] == 1
    assert said(caplog)[-1].endswith(
        "left, but no coupling can lose another entry: calls of the model since the start need the others whole"
    )
