"""All ranks decide as one: losses, tokens, times, calls and failures that differ between them."""

import os

import pytest
import torch
import torch.distributed as dist
from crew import Crew, differ, said
from rank_models import Run
from tiny import batch, loss_of
from tiny import share as part
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import ecospa_fx


@pytest.fixture(scope="module")
def two():
    with Crew(2) as crew:
        yield crew


def run_of(rank, world, **settings):
    return Run(wrap=DDP, of=(rank, world), **settings)


def told_own_losses(rank, world):
    """Ranks tell the trainer losses that differ: one never spikes, the other twice as much as the mean."""
    settings = {"spike": 0.02, "interval": 2, "end": 9}
    run, alone = run_of(rank, world, **settings), Run(**settings)
    for step in range(12):
        bump = 0.5 * (2 <= step < 6)
        for one, more in ((run, 2 * rank * bump), (alone, bump)):
            loss = loss_of(one.called, part(batch("glu", step), *one.of))
            loss.backward()
            one.optimizer.step()
            one.trainer.step(loss=loss + more)
            one.optimizer.zero_grad()
    levels = [torch.tensor(run.trainer._spikes.level)]
    waited = [[each["step"] for each in one.trainer.postponed] for one in (run, alone)]
    return waited, run.kept() == alone.kept(), differ(run.state()), differ(levels) > 0


def test_losses_are_averaged_where_they_matter(two):
    for (waited, alone), same, between, own in two.run(told_own_losses):
        assert waited == alone and waited and same and between == 0.0 and own


def counted_in_tokens(rank, world):
    """The tokens of all ranks count, of which one has more."""
    run = run_of(rank, world, unit="tokens", interval=60, start=40, end=130)
    for step in range(8):
        loss_of(run.called, part(batch("glu", step), rank, world)).backward()
        run.optimizer.step()
        run.trainer.step(tokens=7 + 6 * rank)
        run.optimizer.zero_grad()
    return [h["step"] for h in run.trainer.history], run.trainer.done, differ(run.state())


def test_tokens_of_all_ranks_count(two):
    assert two.run(counted_in_tokens) == [([2, 5, 7], True, 0.0)] * 2


def timed(rank, world):
    """Each rank measures other times; those of the first count."""
    cost = ecospa_fx.Latency(measure=lambda model: sum(p.numel() for p in model.parameters()) ** (1.0 + rank))
    run = run_of(rank, world, cost=cost).train()
    return cost.points, len(run.trainer.history) > 0, differ(run.state())


def test_latencies_of_the_first_rank_count(two):
    first, second = two.run(timed)
    assert first == second and first[1:] == (True, 0.0)


def counted_collectives(rank, world):
    counts = []
    original = {name: getattr(dist, name) for name in ("all_reduce", "broadcast", "all_gather_object", "all_gather")}
    calls = []

    def counting(name):
        return lambda *args, **kwargs: (calls.append(name), original[name](*args, **kwargs))[1]

    run = run_of(rank, world)
    for name in original:
        setattr(dist, name, counting(name))
    try:
        for step in range(10):
            calls.clear()
            run.step(step, told=True)
            counts.append(len(calls))
    finally:
        for name, each in original.items():
            setattr(dist, name, each)
    return counts, [h["step"] for h in run.trainer.history]


def test_nothing_is_sent_between_sparsification_steps(two):
    (counts, shrinks), same = two.run(counted_collectives)
    assert (counts, shrinks) == same and len(shrinks) == 2
    assert all((count > 0) == (step + 1 in shrinks) for step, count in enumerate(counts)), counts
    assert max(counts) < 12


class Bad(torch.optim.AdamW):
    """An optimizer whose state cannot be sliced any more."""


@ecospa_fx.state_rule(Bad)
def _bad(state, parameter, keep):
    raise RuntimeError("disk full")


def one_raises(rank, world, who, where):
    """Return what is said on this rank, and whether it is as before and goes on."""
    make = Bad if rank == who and where == "state" else torch.optim.AdamW
    run = run_of(rank, world, optimizer=lambda parameters: make(parameters, lr=1e-2))
    if where == "callback" and rank == who:
        run.trainer.before_shrink = lambda *_: 1 / 0
    loss_of(run.called, part(batch("glu", 0), rank, world)).backward()
    run.optimizer.step()
    run.trainer.step()
    before = [each.clone() for each in run.state()]
    plan, shapes = run.kept(), [p.shape for p in run.model.parameters()]
    if where == "by hand":
        keeps = {c: torch.arange(4 if rank == who else 5) for c in ecospa_fx.couplings(run.model)}
        text = said(ecospa_fx.shrink, run.model, keeps, optimizer=run.optimizer)
    elif where == "selection":
        keeps = {c: torch.arange(4 - 5 * (rank == who)) for c in ecospa_fx.couplings(run.model)} if rank != who else {}
        keeps = keeps or {"nothing": torch.arange(3)}
        text = said(ecospa_fx.shrink, run.model, keeps, optimizer=run.optimizer)
    elif where == "after":  # everything is in place on this rank, and a part of it fails on the other
        if rank == who:
            run.called._ddp_init_helper = lambda *_: (run.called.__dict__.pop("_ddp_init_helper"), 1 / 0)
        text = said(run.trainer.sparsify)
    elif where == "loss":
        run.trainer._clock.now = 1.0
        text = said(run.trainer.step, loss="high" if rank == who else 1.0)
    else:
        text = said(run.trainer.sparsify)
    same = all(torch.equal(a, b) for a, b in zip(before, run.state()))
    same = same and plan == run.kept() and shapes == [p.shape for p in run.model.parameters()]
    run.optimizer.zero_grad()
    loss_of(run.called, part(batch("glu", 1), rank, world)).backward()
    return text, same and not run.trainer.history, differ([p.grad for p in run.model.parameters()])


FAILURES = {
    "callback": ("ZeroDivisionError: division by zero", "shrink: rank {} cannot take part (ZeroDivisionError"),
    "state": ("OptimizerError: the state rule of Bad failed", "shrink: rank {} cannot take part (OptimizerError: the"),
    "selection": ("NoCouplingError: ", "shrink: rank {} cannot take part (NoCouplingError: "),
    "after": ("ZeroDivisionError: division by zero", "sparsify: rank {} cannot take part (ZeroDivisionError"),
    "loss": ("TargetError: the loss is", "wait for gradients: rank {} cannot take part (TargetError: the loss is"),
}


@pytest.mark.parametrize("where", FAILURES)
@pytest.mark.parametrize("who", [0, 1])
def test_one_rank_fails_and_none_changes(two, who, where):
    found = two.run(one_raises, who, where)
    own, others = FAILURES[where]
    assert found[who][0].startswith(own)
    assert found[1 - who][0].startswith("RanksError: " + others.format(who)), found
    assert found[1 - who][0].endswith("so no rank does; the model is unchanged on every rank")
    assert [each[1:] for each in found] == [(True, 0.0)] * 2


def test_other_entries_on_one_rank_are_refused_on_all(two):
    (text, *rest), other = two.run(one_raises, 1, "by hand")
    assert (text, *rest) == other and rest == [True, 0.0]
    assert text.startswith(
        "RanksError: shrink: ranks differ in the entries kept of `blocks.0.gate.weight` along dim 0, ["
    )
    assert text.endswith("average both before a shrink")


def other_settings(rank, world):
    run = run_of(rank, world, theta=0.9 - 0.1 * rank)
    return said(run.train)


def test_other_settings_on_one_rank_are_refused_on_all(two):
    assert set(two.run(other_settings)) == {
        "RanksError: trainer.step: ranks differ in the setting theta, 0.9 on rank 0 and 0.8 on rank 1; the model "
        "is unchanged on every rank. All ranks must make the same model, call it in the same ways and use the same "
        "settings"
    }


def one_dies(rank, world):
    run = run_of(rank, world)
    run.step(0)
    before = [p.clone() for p in run.model.parameters()]
    if rank == 1:
        run.trainer.before_shrink = lambda *_: os._exit(9)
    text = said(run.trainer.sparsify)
    return text, all(torch.equal(a, b) for a, b in zip(before, run.model.parameters())), not run.kept()


def test_one_rank_is_killed_and_the_other_stays_as_it_is():
    with Crew(2) as crew:
        (kind, found), died = crew.outcomes(one_dies)
    assert died == ("died", 9) and kind == "ok" and found[1:] == (True, True)
    assert found[0].startswith("RanksError: sparsify: another rank does not answer (") or found[0].startswith(
        "RanksError: shrink: another rank does not answer ("
    )


class Peeks(nn.Module):
    """A block that needs its hidden axis whole when it does not train: it sorts along it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        y = torch.relu(self.up(x))
        return x + self.down(y if self.training else y.sort(-1).values)


def other_call(rank, world):
    """The first rank validates, in a way in which one of two couplings must stay whole."""
    torch.manual_seed(0)
    net = nn.Sequential(Peeks(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)).double()
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
    model = ecospa_fx.compile(net, example_inputs=(x,), regions="root")
    wrapper = DDP(model)
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(wrapper, optimizer, target=0.8, start=2, interval=2)
    if rank == 0:
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()
    names = [c.name for c in ecospa_fx.couplings(model)]
    for _ in range(6):
        wrapper(x + rank).square().mean().backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    left = [c.name for c in ecospa_fx.couplings(model)]
    return len(names), left, trainer.left_out, sorted(trainer.history[0]["removed"]), differ(list(model.parameters()))


def test_couplings_that_only_some_ranks_can_follow_are_left_out_on_all(two):
    first, second = two.run(other_call)
    assert (first[0], second[0]) == (2, 3) and first[1] == second[1] == ["ffn", "ffn2"]
    assert first[3:] == second[3:] == (["ffn2"], 0.0)
    assert first[2] == {} and second[2] == {"0.ffn": "another rank has met a call of the model that needs it whole"}
