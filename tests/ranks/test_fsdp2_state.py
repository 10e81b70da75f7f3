"""FSDP2: what a trainer keeps, errors that take everything back on every rank, and verbs that read weights."""

import os

import pytest
import torch
import torch.distributed as dist
from crew import Crew, said
from test_fsdp2 import beside, sharded, whole
from tiny import batch, compiled, loss_of, made, share, trained
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import ecospa_fx
from ecospa_fx.model import slicing

ADAPTIVE = {"policy": "adaptive", "end": 9}


@pytest.fixture(scope="module")
def two():
    with Crew(2) as crew:
        yield crew


def begun(rank, world, kind="glu", steps=2, **settings):
    """Train for some steps, without a shrink."""
    model = sharded(compiled(made(kind), kind, lambda given: share(given, rank, world)), world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, **{"target": 0.7, "start": 50, "interval": 50, **settings})
    trained(model, optimizer, trainer, kind, lambda given: share(given, rank, world), steps)
    return model, optimizer, trainer


def sums(state):
    return {name: each for scores in state["scores"] for name, each in scores["tensors"].items()}


def state_of_a_trainer(rank, world, settings):
    """Return the state on each rank, beside that of one process, and after it was loaded into a new trainer."""
    model, optimizer, trainer = begun(rank, world, **settings)
    lone = compiled(made("glu"), "glu")
    its = torch.optim.AdamW(lone.parameters(), lr=1e-2)
    its_trainer = ecospa_fx.EcoSpaTrainer(lone, its, **{"target": 0.7, "start": 50, "interval": 50, **settings})
    trained(lone, its, its_trainer, "glu", steps=2)
    mine, theirs = sums(trainer.state_dict()), sums(its_trainer.state_dict())
    assert mine.keys() == theirs.keys() and mine
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-10, atol=0)
    again = ecospa_fx.EcoSpaTrainer(model, optimizer, **{"target": 0.7, "start": 50, "interval": 50, **settings})
    again.load_state_dict(trainer.state_dict())
    for each in (again, trainer):
        trained(model, optimizer, each, "glu", lambda given: share(given, rank, world), steps=0)
    for name, each in sums(again.state_dict()).items():
        torch.testing.assert_close(each, theirs[name], rtol=1e-10, atol=0)
    importance = [each.policy.estimators[0].importance() for each in (again, its_trainer)]
    for a, b in zip(importance[0].values(), importance[1].values(), strict=True):
        assert a == pytest.approx(b, rel=1e-10)


KEEP = [{}, {"window": 2}, {"decay": 0.5, "score": "taylor_squared"}, {"policy": "adaptive", "end": 99}]


@pytest.mark.parametrize("settings", KEEP, ids=str)
def test_the_state_of_a_trainer_is_whole_on_every_rank_and_counts_once(two, settings):
    two.run(state_of_a_trainer, settings)


def failing(rank, world, who):
    """Fail on one rank in the middle of a commit; then go on as if nothing had been tried."""
    model, optimizer, trainer = begun(rank, world)
    before = [local.clone() for local in (p.to_local().detach() for p in model.parameters())]
    plan, calls, real = ecospa_fx.plan(model), [], slicing.anew

    def anew(owner, new):
        calls.append(owner)
        if rank == who and len(calls) == 3:
            raise MemoryError("no memory left")
        return real(owner, new)

    slicing.anew = anew
    coupling = ecospa_fx.couplings(model)[0]
    keep = torch.arange(coupling.size // 2)
    try:
        error = said(ecospa_fx.shrink, model, {coupling: keep}, optimizer=optimizer)
    finally:
        slicing.anew = real
    assert ecospa_fx.plan(model) == plan
    assert all(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))
    ecospa_fx.shrink(model, {coupling: keep}, optimizer=optimizer)
    trained(model, optimizer, trainer, "glu", lambda given: share(given, rank, world), steps=2, first=2)

    other, its, its_trainer = begun(rank, world)
    ecospa_fx.shrink(other, {ecospa_fx.couplings(other)[0]: keep}, optimizer=its)
    trained(other, its, its_trainer, "glu", lambda given: share(given, rank, world), steps=2, first=2)
    model.reshard()
    other.reshard()
    assert all(torch.equal(whole(a), whole(b)) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    return error


def test_a_failure_on_one_rank_takes_the_shards_back_on_all(two):
    errors = two.run(failing, 1)
    assert errors[1] == "MemoryError: no memory left"
    assert "rank 1 cannot take part (MemoryError: no memory left)" in errors[0], errors


def dying(rank, world, where):
    """Kill one rank in the middle of a shrink: while rows move, or as it puts them in place."""
    model, optimizer, _ = begun(rank, world)
    before, plan = [p.to_local().detach().clone() for p in model.parameters()], ecospa_fx.plan(model)
    place, name = {"rows move": (dist, "all_to_all_single"), "a commit": (slicing, "anew")}[where]
    real = getattr(place, name)
    setattr(place, name, (lambda *_, **__: os._exit(9)) if rank == 1 else real)
    coupling = ecospa_fx.couplings(model)[0]
    error = said(ecospa_fx.shrink, model, {coupling: torch.arange(coupling.size // 2)}, optimizer=optimizer)
    same = all(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))
    return error, same and ecospa_fx.plan(model) == plan


@pytest.mark.parametrize("where", ["rows move", "a commit"])
def test_a_rank_is_killed_in_a_shrink_and_the_others_stay_as_they_are(two, where):
    (kind, (error, same)), died = two.outcomes(dying, where)
    assert died == ("died", 9) and kind == "ok" and same
    assert error.startswith("RanksError: shrink: another rank does not answer "), error


def unreduced(rank, world):
    model, optimizer, _ = begun(rank, world)
    model.set_requires_gradient_sync(False)
    loss_of(model, share(batch("glu", 3), rank, world)).backward()
    coupling = ecospa_fx.couplings(model)[0]
    error = said(ecospa_fx.shrink, model, {coupling: torch.arange(4)}, optimizer=optimizer)
    model.set_requires_gradient_sync(True)
    loss_of(model, share(batch("glu", 4), rank, world)).backward()
    ecospa_fx.shrink(model, {coupling: torch.arange(4)}, optimizer=optimizer)  # gradients are cut too
    optimizer.step()
    grads = [whole(p.grad) for p in model.parameters()]
    return error, all(g.shape == p.shape for g, p in zip(grads, model.parameters(), strict=True))


def test_gradients_that_are_not_reduced_yet_are_refused(two):
    for error, cut in two.run(unreduced):
        assert error.startswith("RanksError: the gradient of `") and cut
        assert error.endswith(
            "is not reduced yet, as between micro-batches with set_requires_gradient_sync(False): shrink after the "
            "optimizer's step"
        )


def along_columns(rank, world):
    model = compiled(made("glu"), "glu", lambda given: share(given, rank, world))
    fully_shard(model, shard_placement_fn=lambda p: Shard(1 if p.ndim > 1 and p.shape[1] % world == 0 else 0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, share(batch("glu", 0), rank, world)).backward()
    coupling = ecospa_fx.couplings(model)[0]
    uneven = said(ecospa_fx.shrink, model, {coupling: torch.arange(7)}, optimizer=optimizer)
    ecospa_fx.shrink(model, {coupling: torch.arange(8)}, optimizer=optimizer)
    optimizer.step()
    lone = compiled(made("glu"), "glu")
    its = torch.optim.SGD(lone.parameters(), lr=0.1)
    loss_of(lone, batch("glu", 0)).backward()
    ecospa_fx.shrink(lone, {ecospa_fx.couplings(lone)[0]: torch.arange(8)}, optimizer=its)
    its.step()
    for mine, theirs in zip(model.parameters(), lone.parameters(), strict=True):
        assert float((whole(mine) - theirs.detach()).abs().max()) < 1e-12
    return uneven


def test_shards_along_columns_stay_multiples_of_the_ranks(two):
    for error in two.run(along_columns):
        assert error.startswith("RanksError: `blocks.0.") and "FSDP2 shards only multiples of 2 along it" in error
        assert error.endswith("make widths multiples of it, round_to=2, or let fully_shard shard rows")


def verbs(rank, world):
    """Call what reads weights."""
    model, optimizer, trainer = begun(rank, world)
    given = share(batch("glu", 0), rank, world)
    coupling = ecospa_fx.couplings(model)[0]
    ecospa_fx.shrink(model, {coupling: torch.arange(8)}, optimizer=optimizer)
    assert ecospa_fx.verify(model, example_kwargs=given).ok
    lone = compiled(made("glu"), "glu")
    ecospa_fx.shrink(lone, {ecospa_fx.couplings(lone)[0]: torch.arange(8)})
    assert str(ecospa_fx.diff(model)) == str(ecospa_fx.diff(lone))
    assert [c.size for c in ecospa_fx.explain(model).couplings] == [c.size for c in ecospa_fx.couplings(lone)]
    assert all(isinstance(p, DTensor) for p in model.parameters())
    loss_of(model, given).backward()
    refused = [
        said(ecospa_fx.save, model, f"nowhere{rank}", optimizer=optimizer, trainer=trainer),
        said(ecospa_fx.export, model, (), given),
        said(ecospa_fx.EcoSpaTrainer, model, optimizer, policy="adaptive", end=9, gradients="backward"),
    ]
    ecospa_fx.restore(model)
    assert type(model).__name__ == "FSDPGLU" and float(loss_of(model, given).detach()) > 0
    return refused


def test_verbs_that_read_weights_work_or_say_how_to_gather_them(two):
    for save, export, adaptive in two.run(verbs):
        assert save.startswith('RanksError: save: ranks differ in directory, "nowhere0" on rank 0 and "nowhere1" on')
        assert "and an export takes whole weights" in export
        assert adaptive == (
            'WrapperError: gradients="backward" reads each gradient as soon as backward has it, and where parameters '
            "are sharded ranks add up saliency once a step has all gradients; read them at the steps of the "
            'optimizers, gradients="optimizer"'
        )


def collectives(rank, world, settings):
    """Count the collectives of trainer.step at a step without and at a step with a sparsification step."""
    model, optimizer, trainer = begun(rank, world, steps=0, start=3, interval=50, **settings)
    counts = []
    names = ["all_reduce", "all_gather_into_tensor", "all_to_all_single", "broadcast", "all_gather_object"]
    real = {name: getattr(dist, name) for name in names}
    for step in range(4):
        loss_of(model, share(batch("glu", step), rank, world)).backward()
        optimizer.step()
        seen = dict.fromkeys(names, 0)

        def counted(name, seen=seen):
            def function(*args, **kwargs):
                seen[name] += 1
                return real[name](*args, **kwargs)

            return function

        for name in names:
            setattr(dist, name, counted(name))
        try:
            trainer.step()
        finally:
            for name in names:
                setattr(dist, name, real[name])
        optimizer.zero_grad()
        counts.append(seen)
    assert len(trainer.history) == 1
    return counts


@pytest.mark.parametrize(("settings", "asked"), [({}, 0), (ADAPTIVE, 1)], ids=["paper", "adaptive"])
def test_nothing_is_sent_between_sparsification_steps(two, settings, asked):
    """The adaptive policy asks once, after each of them, whether all ranks read the same couplings by position."""
    for first, second, at, after in two.run(collectives, settings):
        assert not any(second.values())
        assert all(sum(each.values()) == each["all_reduce"] == asked for each in (first, after))
        assert at["all_to_all_single"] == 1 and (asked or at["all_gather_into_tensor"] == 0)


SETTINGS = [
    {"policy": "adaptive"},
    {"preset": "finetune", "absorb": False},
    {"score": "taylor_positions"},
    {"absorb": True},
    {"absorb": True, "rotate": True},
    {"score": "activation"},
    {"score": "adam"},
    {"score": "magnitude"},
    {"score": "taylor"},
    {"score": "random"},
    {"index_score": "taylor"},
    {"gradients": "optimizer"},
    {"gradients": "backward"},
]
OPTIMIZERS = [
    "SGD",
    "NAdam",
    "RAdam",
    "Adamax",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "ASGD",
]  # torch's Rprop takes no shards


def check(crew, *case):
    for apart, wrong in crew.run(beside, *case):
        assert not wrong and apart < 1e-12, (apart, wrong)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_entries_take_over_and_bases_change_on_shards(two, kind):
    check(two, kind, "graph", "blocks", (), {"absorb": True, "rotate": True})


@pytest.mark.parametrize("execution", ["graph", "module"])
def test_the_adaptive_policy_on_shards(two, execution):
    """By position where graphs run, else by gradients of weights along gates."""
    check(two, "glu", execution, "blocks", (), {"policy": "adaptive", "absorb": execution == "graph", "rotate": False})


@pytest.mark.sweep
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["glu", "llama"])
def test_every_setting(two, kind, settings):
    check(two, kind, "graph", "blocks", (), settings)


class RowScaled(torch.optim.Optimizer):
    """An optimizer that keeps a number per row of a matrix, so that its state has another shape than its parameter."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                scaled = p.grad
                if p.ndim > 1:
                    state = self.state[p]
                    state["rows"] = p.grad.square().sum(1) + state.get("rows", 0.0)
                    scaled = p.grad / (1.0 + state["rows"].sqrt())[:, None]
                p.sub_(scaled, alpha=group["lr"])


@ecospa_fx.state_rule(RowScaled)
def row_scaled(state, parameter, keep):
    return {"rows": ecospa_fx.optimizers.take(state["rows"], keep, dims=(0,))}


def test_state_of_another_shape_than_its_parameter_is_cut(two):
    check(two, "glu", "graph", "blocks", (), {}, RowScaled)


@pytest.mark.sweep
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(two, optimizer):
    check(two, "glu", "graph", "blocks", (), {}, getattr(torch.optim, optimizer))
