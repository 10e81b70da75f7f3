"""Odd calls of the methods of what public functions return."""

from __future__ import annotations

from typing import Any

import torch
from odd_calls import CALLS, THEIRS, World, explained, method, model, right
from torch import Tensor

import ecospa_fx
from ecospa_fx.model.cost import CostModel
from ecospa_fx.model.lookup import state_of


def _trained(world: World) -> Any:
    trainer = world.trainer()
    world.model(world.x).square().mean().backward()
    trainer.step()
    return trainer


def _observed(world: World) -> Any:
    latency = ecospa_fx.Latency((world.x,), repeats=1)
    return latency


def _gathered(world: World) -> Any:
    grams = ecospa_fx.Grams(world.model)
    world.model(world.x)
    return grams


def _verified(world: World) -> Any:
    return ecospa_fx.verify(world.model, example_inputs=(world.x,))


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def _couplings(world: World) -> Any:
    return ecospa_fx.couplings(world.model)


def _estimator(world: World) -> Any:
    return ecospa_fx.CoupledEstimator(world.model)


def _sparsifier(world: World) -> Any:
    return ecospa_fx.CoupledSparsifier(world.model)


def _flops(world: World) -> Any:
    return CostModel(world.model, state_of(world.model), "flops")


METHODS = {
    "trainer.fit": method(lambda w: w.trainer(), "fit", lambda w: [(w.x, torch.zeros(5, 3))], looks=False, trains=True,
                           loss=lambda w: loss, scheduler=None, watch=None),
    "trainer.sparsify": method(_trained, "sparsify", looks=False),
    "trainer.step of tokens": method(lambda w: w.trainer(unit="tokens"), "step", looks=False, tokens=100),
    "trainer.step of epochs": method(lambda w: w.trainer(unit="epochs"), "step", looks=False, epochs=0.5),
    "trainer.state_dict": method(_trained, "state_dict"),
    "trainer.detach": method(_trained, "detach", looks=False),
    "estimator.attach": method(_estimator, "attach", lambda w: w.optimizer, looks=False),
    "estimator.importance": method(_estimator, "importance"),
    "estimator.state_dict": method(_estimator, "state_dict"),
    "estimator.accumulate scaled": method(_estimator, "accumulate", scale=2.0, found_inf=None, names=None,
                                           new_step=True),
    "sparsifier.target_size": method(_sparsifier, "target_size", _flops),
    "sparsifier.reached": method(_sparsifier, "reached"),
    "sparsifier.decide at most": method(_sparsifier, "decide", lambda w: dict.fromkeys(_couplings(w), 1.0),
                                         at_most=100),
    "constraints.units": method(lambda w: ecospa_fx.Constraints(), "units", model, _couplings),
    "latency.observe": method(_observed, "observe", model, _flops),
    "grams.load_state_dict": method(_gathered, "load_state_dict", lambda w: _gathered(w).state_dict(), looks=False),
    "grams.absorbed": method(_gathered, "absorbed", lambda w: ecospa_fx.plan(w.model),
                              lambda w: ecospa_fx.plan(w.model), lambda w: [dict(w.model.named_parameters())],
                              looks=False),
    "watch.report": method(lambda w: ecospa_fx.Watch(w.trainer()), "report", looks=False),
    "explanation.by_module": method(explained, "by_module"),
    "explanation.to_json": method(explained, "to_json"),
    "verification.raise_if_failed": method(_verified, "raise_if_failed"),
    "plan.under": method(lambda w: ecospa_fx.plan(w.model), "under", "a"),
    "rotate to sizes": right(False, ecospa_fx.rotate, model, lambda w: [_couplings(w)[0]], keep=lambda w: {"ffn": 2},
                             grams=_gathered, optimizer=lambda w: w.optimizer, also=()),
    "shrink absorbing": right(False, ecospa_fx.shrink, model, lambda w: w.keep(), optimizer=lambda w: w.optimizer,
                              absorb=_gathered),
}  # fmt: skip
CALLS |= METHODS
THEIRS |= {("trainer.fit", "loss"), ("trainer.fit", 0)}
