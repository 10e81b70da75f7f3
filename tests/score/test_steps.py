"""Optimizers as trainers use them: groups, several of them, schedulers, gradient scalers, clipping."""

import copy
import functools

import pytest
import torch
from test_other_optimizers import LBFGS, Wrapper
from test_training import Stack, one_step
from test_training import setting as compiled
from torch import nn, optim

import ecospa_fx
from ecospa_fx.errors import OptimizerError
from ecospa_fx.score.step_watcher import StepWatcher

compiled_once = functools.cache(compiled)


def setting(dtype=torch.float64):
    """A compiled model, an AdamW and an input; captured once."""
    original, _, x = compiled_once(dtype)
    model = copy.deepcopy(original)
    return model, optim.AdamW(model.parameters(), lr=1e-2), x


def halves(model):
    return {c.name: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model)}


def assert_goes_on_as_a_fresh_model(model, optimizers, x, make):
    """Steps equal those of a model built anew at these sizes, with optimizers built anew that hold the same state."""
    fresh = copy.deepcopy(model)
    others = make(fresh)
    mine, theirs = dict(model.named_parameters()), dict(fresh.named_parameters())
    for optimizer, other in zip(optimizers, others, strict=True):
        for name, p in mine.items():
            if p in optimizer.state:
                other.state[theirs[name]] = copy.deepcopy(optimizer.state[p])
        for group, theirs_group in zip(optimizer.param_groups, other.param_groups, strict=True):
            theirs_group.update({key: value for key, value in group.items() if key != "params"})
    for _ in range(2):
        for each, all_of_it in ((model, optimizers), (fresh, others)):
            (each(x) - x.flip(-1)).square().mean().backward()
            for optimizer in all_of_it:
                optimizer.step()
                optimizer.zero_grad()
            each.zero_grad()
    for name, p in mine.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-12, atol=1e-14, msg=name)


def by_groups(model):
    """Decay on matrices only, another rate in the second layer, and a layer in no optimizer."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("layers.0")]
    vectors = [p for n, p in model.named_parameters() if p.ndim == 1 and n.startswith("layers.0")]
    rest = [p for n, p in model.named_parameters() if n.startswith("layers.1") and "down" not in n]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}, {"params": rest, "lr": 1e-3}]
    return [optim.AdamW(groups, lr=1e-2, weight_decay=0.0)]


def muon_and_adamw(model):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return [optim.Muon(matrices, lr=0.02), optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=1e-3)]


def one_per_layer(model):
    return [
        optim.AdamW(model.layers[0].parameters(), lr=1e-2, fused=True),
        optim.RMSprop(model.layers[1].parameters(), lr=1e-3, momentum=0.9, foreach=True),
    ]


@pytest.mark.parametrize("make", [by_groups, muon_and_adamw, one_per_layer])
def test_groups_several_optimizers_and_parameters_in_none(make):
    model, _, x = setting()
    optimizers = make(model)
    for _ in range(3):
        (model(x) - x.flip(-1)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    groups = [[[id(p) for p in group["params"]] for group in each.param_groups] for each in optimizers]
    options = [[{k: v for k, v in g.items() if k != "params"} for g in each.param_groups] for each in optimizers]
    ecospa_fx.shrink(model, halves(model), optimizer=iter(optimizers))
    assert groups == [[[id(p) for p in group["params"]] for group in each.param_groups] for each in optimizers]
    assert options == [
        [{k: v for k, v in g.items() if k != "params"} for g in each.param_groups] for each in optimizers
    ]
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            assert all(value.shape == p.shape for value in state.values() if value.ndim)
    assert_goes_on_as_a_fresh_model(model, optimizers, x, make)


def test_what_an_optimizer_holds_beside_the_model_stays():
    """One optimizer of two models, of which one shrinks."""
    model, _, x = setting()
    other = nn.Linear(12, 12).double()
    optimizer = optim.AdamW([*model.parameters(), *other.parameters()], lr=1e-2)
    other(model(x)).square().mean().backward()
    optimizer.step()
    before = {entry: value.clone() for entry, value in optimizer.state[other.weight].items()}
    ecospa_fx.shrink(model, halves(model), optimizer=optimizer)
    assert other.weight.shape == (12, 12)
    for entry, value in optimizer.state[other.weight].items():
        assert torch.equal(value, before[entry])
    other(model(x)).square().mean().backward()
    optimizer.step()


SCHEDULES = {
    "lambda": lambda o: optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "one cycle, which also turns the momentum": lambda o: optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "averaging": lambda o: optim.swa_utils.SWALR(o, swa_lr=0.005, anneal_epochs=5),
    "chained": lambda o: optim.lr_scheduler.SequentialLR(
        o,
        [optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("rate", ["number", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_schedules_go_on_untouched(schedule, rate):
    def rates(shrinks):
        model, _, x = setting()
        lr = torch.tensor(1e-2, dtype=torch.float64) if rate == "tensor" else 1e-2
        optimizer = optim.AdamW(model.parameters(), lr=lr)
        scheduler = SCHEDULES[schedule](optimizer)
        held, found = optimizer.param_groups[0]["lr"], []
        for step in range(6):
            one_step(model, optimizer, x)
            if shrinks and step == 3:
                before = copy.deepcopy({k: v for k, v in scheduler.state_dict().items() if "lambda" not in k})
                ecospa_fx.shrink(model, halves(model), optimizer=optimizer)
                after = {k: v for k, v in scheduler.state_dict().items() if "lambda" not in k}
                if schedule != "chained":
                    assert before == after
                if rate == "tensor":
                    assert optimizer.param_groups[0]["lr"] is held  # the scheduler writes into it
            scheduler.step()
            found.append((float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["betas"]))
        return found

    assert rates(True) == rates(False)


def test_a_plateau_is_still_seen():
    model, _, _ = setting()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scheduler = optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    scheduler.step(1.0)
    ecospa_fx.shrink(model, halves(model), optimizer=optimizer)
    scheduler.step(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("when", ["before", "after"])
def test_clipping_before_and_after_a_shrink(when):
    """Before, gradients are parts of what was clipped; after, the norm is that of what is left."""
    model, optimizer, x = setting()
    one_step(model, optimizer, x)
    (model(x) - x.flip(-1)).square().sum().backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    if when == "before":
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    ecospa_fx.shrink(model, halves(model), optimizer=optimizer)
    kept = ecospa_fx.plan(model).kept
    left = {}
    for name, gradient in whole.items():
        for dim in range(gradient.ndim):
            gradient = gradient.index_select(dim, kept[name, dim]) if (name, dim) in kept else gradient
        left[name] = gradient
    if when == "after":
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    of = whole if when == "before" else left
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in of.values()]).norm()), rel=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, left[name] * 0.5 / (norm + 1e-6), rtol=1e-12, atol=1e-15)
    optimizer.step()


# What the trainer reads


def test_a_trainer_with_two_optimizers_reads_every_gradient_once():
    def run(several, gradients):
        model, _, x = setting()
        if several:
            optimizers = [optim.SGD(model.layers[i].parameters(), lr=0.1, momentum=0.9) for i in (0, 1)]
        else:
            optimizers = [optim.SGD(model.parameters(), lr=0.1, momentum=0.9)]
        trainer = ecospa_fx.EcoSpaTrainer(
            model, optimizers if several else optimizers[0], target=0.6, interval=2, end=8, gradients=gradients
        )
        for _ in range(10):
            (model(x) - x.flip(-1)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            trainer.step()
            model.zero_grad()
        assert trainer.done
        return trainer.history, list(model.parameters())

    expected, weights = run(False, "step")
    for several, gradients in ((True, "step"), (True, "optimizer"), (False, "optimizer")):
        history, others = run(several, gradients)
        assert history == expected, (several, gradients)
        assert all(torch.equal(p, q) for p, q in zip(weights, others, strict=True))


def test_fit_steps_several_optimizers():
    model, _, x = setting()
    optimizers = muon_and_adamw(model)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizers, target=0.6, interval=2, end=8)
    losses = trainer.fit([(x, x.flip(-1))] * 10, loss=nn.functional.mse_loss)
    assert trainer.done and losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("gradients", ["step", "optimizer"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clipping", [False, True])
def test_a_gradient_scaler_changes_nothing_a_trainer_sees(gradients, fused, clipping):
    """Scaled gradients are divided, steps left out count for nothing: as in a run without a scaler and such batches."""

    def run(scaled):
        model, _, x = setting(torch.float32)
        optimizer = optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3, enabled=scaled)
        trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=1000, gradients=gradients)
        for step in range(8):
            if step in (0, 5):  # the first step is where a scale too large is found out
                if not scaled:
                    continue
                loss = (model(x) - x.flip(-1)).square().mean() * float("inf")
            else:
                loss = (model(x) - x.flip(-1)).square().mean()
            scaler.scale(loss).backward()
            if clipping:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            trainer.step()
            optimizer.zero_grad()
        return {c.name: value for c, value in trainer.policy.estimators[0].importance().items()}

    expected, found = run(False), run(True)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value > 0 and found[name] == pytest.approx(value, rel=1e-4), name


def test_a_scaler_of_two_optimizers_may_leave_out_the_step_of_one():
    model, _, x = setting(torch.float32)
    optimizers = [optim.SGD(model.layers[i].parameters(), lr=1e-3) for i in (0, 1)]
    steps, scaler = StepWatcher(model, optimizers), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(x).square().mean()).backward()
    model.layers[0].up.weight.grad[0, 0] = float("nan")
    for optimizer in optimizers:
        scaler.step(optimizer)
    (reading,) = steps.readings()
    assert reading.names == {name for name, _ in model.named_parameters() if name.startswith("layers.1")}
    steps.detach()
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in optimizers)


class Scaling(optim.Optimizer):
    """Somebody's own fused optimizer, which divides by the scale on its own."""

    _step_supports_amp_scaling = True

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self, closure=None) -> None:
        for p in self.param_groups[0]["params"]:
            p.data.sub_(p.grad / self.grad_scale, alpha=1e-3)


def test_scaled_gradients_that_nobody_is_known_to_divide_are_refused():
    model, _, x = setting(torch.float32)
    for gradients in ("step", "optimizer"):
        optimizer, scaler = Scaling(model.parameters()), torch.amp.GradScaler("cpu", init_scale=8.0)
        trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, gradients=gradients)
        model.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        weights = [p.detach().clone() for p in model.parameters()]
        if gradients == "optimizer":
            scaler.step(optimizer)
            trainer.step()
            continue
        with pytest.raises(OptimizerError) as caught:
            scaler.step(optimizer)
        assert str(caught.value) == (
            "this Scaling takes gradients multiplied by a GradScaler's scale, and whether it leaves them so is not "
            'known: read them before its steps, EcoSpaTrainer(..., gradients="optimizer")'
        )
        assert all(torch.equal(p, q) for p, q in zip(weights, model.parameters(), strict=True))
        trainer._readings.steps.detach()


def test_steps_that_no_hook_sees_are_read_as_they_are():
    """In a wrapper that never calls them, in a captured CUDA graph, or read before the step."""
    model, optimizer, x = setting()
    steps = StepWatcher(model, [Wrapper(optimizer)])
    model(x).square().mean().backward()
    assert [tuple(reading) for reading in steps.readings()] == [(None, None)]
    optimizer.step()
    assert [tuple(reading) for reading in steps.readings()] == [(None, None)]


def test_a_trainer_refuses_what_no_shrink_can_be_carried_through():
    model, _, _ = setting()
    with pytest.raises(OptimizerError) as caught:
        ecospa_fx.EcoSpaTrainer(model, optim.LBFGS(model.parameters()))
    assert str(caught.value) == LBFGS
    stranger = optim.SGD(Stack().parameters())
    with pytest.raises(OptimizerError, match="this SGD holds 16 parameters, none of them of this Stack"):
        ecospa_fx.EcoSpaTrainer(model, [optim.SGD(model.parameters()), stranger])
    with pytest.raises(OptimizerError) as caught:
        ecospa_fx.EcoSpaTrainer(model, [])
    assert str(caught.value) == "no optimizer is given; pass the one made from model.parameters()"


def factored(model):
    return [optim.Adafactor(model.parameters(), lr=1e-2)]


def with_tensor_rate_and_others(model):
    """A learning rate that is a tensor, and parameters that are not of the model."""
    torch.manual_seed(7)
    other = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    other.grad = torch.ones_like(other)
    return [optim.AdamW([*model.parameters(), other], lr=torch.tensor(1e-2, dtype=torch.float64))]


@pytest.mark.parametrize("make", [factored, with_tensor_rate_and_others, muon_and_adamw])
def test_optimizers_of_a_shrunk_model_resume_to_the_bit(make, tmp_path):
    def train(model, optimizers, steps):
        for _ in range(steps):
            (model(x) - x.flip(-1)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()

    model, _, x = setting()
    optimizers = make(model)
    train(model, optimizers, 3)
    ecospa_fx.shrink(model, halves(model), optimizer=optimizers)
    train(model, optimizers, 1)
    ecospa_fx.save(model, tmp_path / "run", optimizer=optimizers)
    loaded = ecospa_fx.load(tmp_path / "run", lambda: Stack().double())
    others = make(loaded)
    ecospa_fx.resume(tmp_path / "run", loaded, optimizer=others)
    for each, held in ((model, optimizers), (loaded, others)):
        train(each, held, 2)
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q), name
    for optimizer, other in zip(optimizers, others, strict=True):
        mine = [state for state in optimizer.state.values() if state]
        theirs = [state for state in other.state.values() if state]
        assert len(mine) == len(theirs)
        assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
        assert type(optimizer.param_groups[0]["lr"]) is type(other.param_groups[0]["lr"])
