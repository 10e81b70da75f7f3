"""Steps of a loop that a trainer must not misread: losses, optimizers, hooks, the execution of the model."""

import copy
import gc

import pytest
import torch
from test_training import Stack
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ecospa_fx
from ecospa_fx.errors import CaptureError, EcoSpaError, OptimizerError
from ecospa_fx.model.step_watch import _WATCHERS
from ecospa_fx.train.foreign_steps import ForeignSteps

X = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
SETTINGS = {"target": 0.8, "among": "prunable", "interval": 2, "end": 8}


def stack(**options):
    torch.manual_seed(0)
    return ecospa_fx.compile(Stack(width=16, heads=2, hidden=32), **options)


def loss_of(model):
    return (model(X) - X.flip(-1)).square().mean()


def watching():
    return sum(isinstance(each, ForeignSteps) for each in _WATCHERS)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 1e-2)


def train(model, trainer, optimizers, steps):
    for _ in range(steps):
        loss_of(model).backward()
        for each in optimizers:
            each.step()
        trainer.step()
        for each in optimizers:
            each.zero_grad()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (torch.ones(3), "the loss is a tensor of shape (3,), and it must be one number: pass its mean, loss.mean()"),
        ("low", "the loss is 'low', and it must be one number: pass a float or a tensor of one entry"),
    ],
)
def test_a_loss_is_one_number(loss, words):
    model = stack()
    trainer = ecospa_fx.EcoSpaTrainer(model, adamw(model), **SETTINGS)
    loss_of(model).backward()
    with pytest.raises(EcoSpaError) as caught:
        trainer.step(loss=loss)
    assert str(caught.value) == words
    assert trainer.steps == 0 and trainer.now == 0
    trainer.step(loss=torch.ones(1, 1))
    assert trainer.steps == 1
    pairs = [(X, X)]
    with pytest.raises(EcoSpaError, match=r"the loss is a tensor of shape \(4, 5, 16\), and it must be one number"):
        trainer.fit(pairs, loss=lambda outputs, targets: (outputs - targets).square())


@pytest.mark.parametrize("gradients", ["step", "optimizer"])
def test_an_optimizer_that_is_not_the_trainers_is_found_before_a_shrink(gradients):
    model = stack()
    old = adamw(model)
    trainer = ecospa_fx.EcoSpaTrainer(model, old, gradients=gradients, **SETTINGS)
    train(model, trainer, [old], 4)
    new, shapes = adamw(model), [p.shape for p in model.parameters()]
    with pytest.raises(OptimizerError) as caught:
        train(model, trainer, [new], 4)
    assert str(caught.value) == (
        "this AdamW takes steps on `layers.0.up.weight` and was not given to the trainer, so that its state would keep "
        "its sizes when the model shrinks. Give the trainer all optimizers of the model; where the loop has made a new "
        "one, make a new trainer with it, and new.load_state_dict(old.state_dict()) to go on with the schedule"
    ).replace("layers.0.up.weight", str(caught.value).split("`")[1])
    assert [p.shape for p in model.parameters()] == shapes
    # The way out.
    again = ecospa_fx.EcoSpaTrainer(model, new, gradients=gradients, **SETTINGS)
    again.load_state_dict(trainer.state_dict())
    trainer.detach()
    train(model, again, [new], 6)
    assert again.done and len(again.history) > len(trainer.history) > 0
    assert all(new.state[p]["exp_avg"].shape == p.shape for p in model.parameters())


def test_optimizers_of_others_and_without_state_are_no_concern():
    model, other = stack(), stack()
    mine, plain, theirs = adamw(model), torch.optim.SGD(model.parameters(), 1e-3), adamw(other)
    gc.collect()  # of trainers that nobody holds any more
    watchers = watching()
    trainer = ecospa_fx.EcoSpaTrainer(model, mine, **SETTINGS)
    for _ in range(8):
        loss_of(other).backward()
        theirs.step()
        train(model, trainer, [mine, plain], 1)
    assert trainer.done and watching() == watchers  # nothing is watched any more
    trainer = ecospa_fx.EcoSpaTrainer(other, theirs, target=0.9)
    assert watching() == watchers + 1
    del trainer
    gc.collect()
    assert watching() == watchers


def test_a_trainer_that_is_collected_while_an_optimizer_steps_breaks_nothing():
    model = stack()
    held = [ecospa_fx.EcoSpaTrainer(other, adamw(other), **SETTINGS) for other in (stack(), stack())]
    optimizer = adamw(model)

    def collect(*_):
        held.clear()
        gc.collect()

    handle = register_optimizer_step_pre_hook(collect)
    try:
        trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, **SETTINGS)
        train(model, trainer, [optimizer], 8)
    finally:
        handle.remove()
    assert trainer.done and not held


def test_gradients_in_backward_are_read_before_hooks_that_step():
    model = stack()
    twin = copy.deepcopy(model)
    runs = []
    for each, first in ((model, True), (twin, False)):
        optimizers = {p: torch.optim.Adam([p], 1e-2) for p in each.parameters()}

        def step(p, optimizers=optimizers):
            optimizers[p].step()
            optimizers[p].zero_grad()

        def hook(each=each, step=step):
            for p in each.parameters():
                p.register_post_accumulate_grad_hook(step)

        if first:
            hook()
        trainer = ecospa_fx.EcoSpaTrainer(each, list(optimizers.values()), gradients="backward", **SETTINGS)
        if not first:
            hook()
        for _ in range(9):
            loss_of(each).backward()
            trainer.step()
        runs.append(trainer)
    assert runs[0].done and runs[0].history == runs[1].history
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_gradients_that_are_gone_before_any_hook_of_ours_are_named_at_the_first_step():
    model = stack()
    trainer = ecospa_fx.EcoSpaTrainer(model, adamw(model), gradients="backward", **SETTINGS)
    loss_of(model).backward()
    with torch.no_grad():
        for estimator in trainer.policy.estimators:
            estimator.reset()
    for p in model.parameters():
        p.grad = None
        for hook in list(p._post_accumulate_grad_hooks.values()):
            hook(p)  # as where a hook on the tensor itself has stepped, and freed the gradient
    with pytest.raises(OptimizerError) as caught:
        trainer.step()
    assert str(caught.value) == (
        'gradients="backward" reads each gradient as soon as backward has it, but something has freed them before, '
        'such as a hook on a tensor that steps; read them at the steps of the optimizers, gradients="optimizer"'
    )


@pytest.mark.parametrize(
    "settings", [{"policy": "adaptive"}, {"score": "activation"}, {"absorb": True}, {"rotate": True}]
)
@pytest.mark.parametrize("called", [False, True])
def test_settings_that_read_graphs_are_refused_at_once_where_no_graph_runs(settings, called):
    model = stack(execution="module")
    if called:
        loss_of(model).backward()
    with pytest.raises(EcoSpaError) as caught:
        ecospa_fx.EcoSpaTrainer(model, adamw(model), **{**SETTINGS, **settings})
    assert str(caught.value) == (
        "scores of activations, and Gram matrices (for absorb and rotate, which policy='adaptive' turns on), are read "
        "off the graphs that run, and with execution='module' the model's own Python runs; use another score, "
        "absorb=False and rotate=False, or execution='graph'"
    )
    if called:
        settings = {"policy": "adaptive", "absorb": False, "rotate": False}
        ecospa_fx.EcoSpaTrainer(model, adamw(model), **SETTINGS, **settings)  # what it says is so


@pytest.mark.parametrize("execution", ["graph", "module"])
def test_a_first_call_inside_a_transform_of_torch_func(execution):
    model = stack(execution=execution)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def total(w, x):
        return torch.func.functional_call(model, w, (x[None],)).sum()

    per_sample = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with pytest.raises(CaptureError) as caught:
            per_sample(weights, X)
        assert str(caught.value) == (
            "the first call of this Stack is inside a transform of torch.func, where nothing can be captured; call it "
            "once with the same arguments before, or compile it with example_inputs=(x,)"
        )
        model(X[:1])
        assert per_sample(weights, X)["layers.0.up.weight"].shape == (4, 32, 16)
