"""A run of a tiny model under one process or several, and the judge: one process that trains on the whole batch."""

import torch
from crew import differ
from tiny import SCHEDULE, batch, loss_of, made
from tiny import share as part

import ecospa_fx


class Run:
    """A model in training, with AdamW and a trainer.

    Args:
        kind: a model of `tiny.KINDS`.
        execution: see `ecospa_fx.compile`.
        wrap: makes the wrapper of the compiled model.
        of: `(rank, world)`, whose part of every batch it trains on.
    """

    def __init__(self, kind="glu", execution="graph", wrap=None, of=(0, 1), lazily=False, optimizer=None, **settings):
        self.kind, self.of = kind, of
        given = {} if lazily else {"example_kwargs": part(batch(kind, 0), *of)}
        self.model = ecospa_fx.compile(made(kind), execution=execution, **given)
        self.called = self.model if wrap is None else wrap(self.model)
        self.objects = [id(p) for p in self.model.parameters()]
        make = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
        self.optimizer = make(self.called.parameters())
        self.trainer = ecospa_fx.EcoSpaTrainer(self.called, self.optimizer, **{**SCHEDULE, **settings})

    def step(self, step, told=False, parts=1):
        """Train on a batch; `parts`: as the calls that so many ranks make of it."""
        mine = part(batch(self.kind, step), *self.of)
        for number in range(parts):
            loss = loss_of(self.called, part(mine, number, parts)) / parts
            loss.backward()
        self.optimizer.step()
        self.trainer.step(loss=loss if told else None)
        self.optimizer.zero_grad()

    def train(self, steps=10, told=False, parts=1):
        for step in range(steps):
            self.step(step, told, parts)
        return self

    def kept(self):
        return {key: each.tolist() for key, each in ecospa_fx.plan(self.model).kept.items()}

    def state(self):
        """The weights, then Adam's moments, whole, on this rank."""
        states = [self.optimizer.state.get(p, {}) for p in self.model.parameters()]
        moments = [s[key] for s in states for key in ("exp_avg", "exp_avg_sq") if key in s]
        return [each.detach() for each in (*self.model.parameters(), *moments)]


def compared(run, alone):
    """Compare a run with that of one process on the whole batch: how far apart, and how far ranks are."""
    assert [h["step"] for h in run.trainer.history] == [h["step"] for h in alone.trainer.history]
    assert run.kept() == alone.kept() and len(run.trainer.history) == 2
    assert run.objects == [id(p) for p in run.model.parameters()]
    mine, theirs = run.state(), alone.state()
    assert len(mine) == len(theirs)
    return max(float((a - b).abs().max()) for a, b in zip(mine, theirs)), differ(run.state())
