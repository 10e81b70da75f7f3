"""Schedules, targets and waiting for the loss."""

import math
from itertools import pairwise

import pytest
import torch
from test_training import setting
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ecospa_fx
from ecospa_fx.errors import TargetError
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.cost import CostModel
from ecospa_fx.train.schedule import Schedule


def taken(schedule, until, by=1):
    """(now, share due) at each sparsification step."""
    found, now, ended = [], 0, False
    while now < until and not ended:
        before, now = now, now + by
        if schedule.due(before, now):
            found.append((now, schedule.share(now)))
            ended = schedule.end is not None and now >= schedule.end
    return found


SHAPES = {
    "linear": lambda t: t,
    "cubic": lambda t: 1 - (1 - t) ** 3,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    found = taken(Schedule(interval=4, start=4, end=22, shape=shape), 40)
    assert [now for now, _ in found] == [4, 9, 13, 18, 22]
    assert [share for _, share in found] == pytest.approx([SHAPES[shape](i / 5) for i in range(1, 6)])


@pytest.mark.parametrize("end", range(90, 111))
def test_the_last_one_has_as_long_to_judge_as_the_others(end):
    steps = [0, *(now for now, _ in taken(Schedule(interval=10, end=end), 200))]
    assert steps[-1] == end
    gaps = [b - a for a, b in pairwise(steps)]
    assert max(gaps) - min(gaps) <= 1 and min(gaps) >= 9 and max(gaps) <= 11


def test_one_shot_and_without_an_end():
    assert taken(Schedule(start=7, shape="one_shot"), 40) == [(7, 1.0)]
    assert taken(Schedule(shape="one_shot"), 40) == [(1, 1.0)]
    assert taken(Schedule(interval=10, start=5), 30) == [(5, None), (15, None), (25, None)]
    assert taken(Schedule(interval=10), 30) == [(10, None), (20, None), (30, None)]


@pytest.mark.parametrize(("start", "steps"), [(10, [10, 20, 30, 40]), (0, [10, 20, 30, 40])])
def test_a_few_large_shrinks(start, steps):
    assert [now for now, _ in taken(Schedule(start=start, end=40, shrinks=4), 99)] == steps
    assert taken(Schedule(start=start, end=40, shrinks=1), 99) == [(40, 1.0)]


def test_tokens_and_epochs():
    schedule = Schedule(interval=1000, start=1000, end=4000, unit="tokens")
    assert taken(schedule, 9000, by=300) == [(1200, 0.25), (2100, 0.5), (3000, 0.75), (4200, 1.0)]
    found = taken(Schedule(interval=0.5, start=1, end=2, unit="epochs"), 9, by=0.125)
    assert [now for now, _ in found] == [1, 1.5, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": 0}, "interval=0 is out of range; it is a whole number of steps, at least 1"),
        ({"interval": 0, "unit": "epochs"}, "interval=0 is out of range; it is a number of epochs, above 0"),
        ({"start": -1}, "start=-1 is out of range; it is a whole number of steps, at least 0"),
        ({"start": 5, "end": 5}, "end=5 is not after start=5"),
        ({"shape": "square"}, "shape='square' is none of 'linear', 'cubic', 'cosine', 'one_shot'"),
        ({"unit": "samples"}, "unit='samples' is none of 'steps', 'tokens', 'epochs'"),
        ({"shape": "cubic"}, "shape='cubic' needs an end to be reached; pass end="),
        ({"shrinks": 3}, "shrinks=3 needs an end by which to have been taken; pass end="),
        ({"shrinks": 0, "end": 9}, "shrinks=0 is out of range; it is a whole number, at least 1"),
        ({"shrinks": 3, "end": 9, "shape": "one_shot"}, 'shape="one_shot" is one shrink, and shrinks=3'),
    ],
)
def test_wrong_schedules(settings, message):
    with pytest.raises(TargetError) as caught:
        Schedule(**settings)
    assert str(caught.value) == message


def run(trainer, model, optimizer, x, steps, losses=None, **counts):
    for i in range(steps):
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        trainer.step(loss=None if losses is None else losses[i], **counts)
        optimizer.zero_grad()


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_follow_the_shape(shape):
    model, optimizer, x = setting(torch.float32)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5, theta=1.0, interval=2, end=12, shape=shape)
    original = trainer.size
    run(trainer, model, optimizer, x, 12)
    assert trainer.done
    for i, entry in enumerate(trainer.history, start=1):
        due = original - SHAPES[shape](entry["step"] / 12) * original * 0.5
        assert entry["size"] <= due or (trainer.done and i == len(trainer.history))


@pytest.mark.parametrize("tail", [0, 40], ids=["even", "heavy"])
def test_no_more_goes_than_is_due(tail):
    """Where few entries hold nearly all of the score, theta alone would let most of a coupling go at once."""
    model, optimizer, x = setting(torch.float32)
    with torch.no_grad():
        for layer in model.layers:
            for weight in (layer.up.weight, layer.down.weight.T, layer.qkv.weight, layer.out.weight.T):
                weight[::3] *= 1 + tail
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5, top_k=1.0, theta=0.5, interval=3, end=15)
    original = trainer.size
    run(trainer, model, optimizer, x, 15)
    assert trainer.done and len(trainer.history) == 5
    entry_of = max(c.width * c.contexts for c in ecospa_fx.couplings(model)) * 12 * 2 + 12  # weights of one entry
    for entry in trainer.history:
        due = original * (1 - 0.5 * entry["step"] / 15)
        assert due - entry_of <= entry["size"] <= due + entry_of * trainer.done, entry["step"]


@pytest.mark.parametrize("cost", ["parameters", "flops", "bytes"])
@pytest.mark.parametrize("among", ["all", "prunable"])
def test_targets(cost, among):
    model, optimizer, x = setting(torch.float32)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5, cost=cost, among=among, interval=2, end=8)
    run(trainer, model, optimizer, x, 8)
    assert trainer.done
    if cost == "flops":

        def counted(model):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                model(x)
            return counter.get_total_flops()

        now, original = counted(model), counted(setting(torch.float32)[0])
    elif cost == "bytes":
        held = [v for state in optimizer.state.values() for v in state.values() if v.numel() > 1]
        now = sum(t.numel() * 4 for t in [*held, *model.parameters(), *model.parameters()])
        original = 16 * sum(p.numel() for p in setting()[0].parameters())
    else:
        now, original = (sum(p.numel() for p in m.parameters()) for m in (model, setting()[0]))
    sizes = CostModel(model, model.__dict__[MODEL], cost, [optimizer])
    assert sizes.total({}) == now and sizes.original == original
    rest = 0 if among == "all" else original - sizes.prunable
    assert 0 <= now - (rest + 0.5 * (original - rest)) < 0.02 * original
    assert among == "all" or 0 <= rest < 0.2 * original  # biases that nothing couples; they multiply nothing


def area(model):
    """Something to bring down that is neither FLOPs nor parameters, in place of a clock."""
    return sum(p.shape[0] ** 1.5 for p in model.parameters()) / 1e6


def test_a_target_in_time_is_measured_and_corrected():
    model, optimizer, x = setting(torch.float32)
    seen = []
    cost = ecospa_fx.Latency(measure=lambda m: (seen.append(m), area(m))[1])
    before = area(model)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, cost=cost, interval=2, end=8)
    kinds = {c.kind for c in ecospa_fx.couplings(model)}
    assert len(seen) == 2 * len(kinds)  # the model in turn with a copy for each kind
    assert all(m is model for m in seen[::2]) and len({id(m) for m in seen[1::2]} - {id(model)}) == len(kinds)
    run(trainer, model, optimizer, x, 40)
    assert trainer.done and seen[-1] is model
    assert 0.5 < area(model) / before < 0.62
    flops = CostModel(model, model.__dict__[MODEL], "flops")
    assert cost.points[-1] == (flops.total({}), pytest.approx(area(model)))
    timed = ecospa_fx.Latency((x,), repeats=2)
    timed.observe(model, flops)
    assert timed.points[0][1] > 0  # the clock, once
    state = trainer.state_dict()
    assert state["settings"]["cost"] == "latency" and state["latency"] == cost.readings()


def test_a_latency_needs_something_to_time():
    with pytest.raises(TargetError, match=r"Latency\(\) has nothing to time; pass the inputs of a call, or measure="):
        ecospa_fx.Latency()
    with pytest.raises(TargetError, match="repeats=0 is out of range"):
        ecospa_fx.Latency((1,), repeats=0)


def test_a_target_that_cannot_be_reached_of_what_is_prunable():
    model, optimizer, _ = setting(torch.float32)
    with pytest.raises(TargetError, match=r"target=0.01 of the 2,224 prunable ones of 2,272 parameters is 71, but"):
        ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.01, among="prunable")


def test_presets_and_settings_out_of_range():
    model, optimizer, _ = setting(torch.float32)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, preset="finetune", theta=0.8)
    settings = trainer.state_dict()["settings"]
    assert (settings["top_k"], settings["theta"]) == (0.1, 0.8)
    for name, value in (("preset", "train"), ("cost", "memory"), ("among", "some")):
        with pytest.raises(TargetError, match=f"{name}='{value}' is none of"):
            ecospa_fx.EcoSpaTrainer(model, optimizer, **{name: value})
    with pytest.raises(TargetError, match=r"spike=0 is out of range; it is a share above 0: 0.1 allows 10% more loss"):
        ecospa_fx.EcoSpaTrainer(model, optimizer, spike=0)


def test_a_schedule_in_tokens_must_be_told():
    model, optimizer, x = setting(torch.float32)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=20, end=60, unit="tokens")
    with pytest.raises(TargetError, match=r"the schedule counts tokens: call trainer.step\(tokens=...\)"):
        run(trainer, model, optimizer, x, 1)
    run(trainer, model, optimizer, x, 5, tokens=20)
    assert trainer.done and [entry["step"] for entry in trainer.history] == [1, 2, 3]


def test_a_shrink_waits_until_the_loss_has_come_down():
    model, optimizer, x = setting(torch.float32)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=2, end=8)
    losses = [1.0, 1.0, 3.0, 3.0, 3.0, 3.0] + [1.0] * 40
    run(trainer, model, optimizer, x, len(losses), losses)
    steps = [entry["step"] for entry in trainer.history]
    assert steps[0] == 2 and trainer.done
    waited = [entry["step"] for entry in trainer.postponed]
    assert waited[:2] == [4, 6] and all(step not in steps for step in waited)
    assert steps[-1] == 8 + 2 * len(waited)  # the end moves with it
    assert trainer.postponed[0]["before"] == 1.0 and trainer.postponed[0]["loss"] > 1.1


def test_waiting_comes_to_an_end_and_nan_waits_too():
    model, optimizer, x = setting(torch.float32)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=1, end=3)
    run(trainer, model, optimizer, x, 14, [1.0, *[math.nan] * 13])
    assert [entry["step"] for entry in trainer.history] == [1, 12]
    assert [entry["step"] for entry in trainer.postponed] == [*range(2, 12), 13, 14]


def test_a_resumed_schedule_goes_on_equally():
    torch.manual_seed(0)
    losses = [1.0, 1.0, 3.0, 3.0, *[1.0] * 30]
    settings = {"target": 0.6, "interval": 2, "end": 10, "window": 2, "index_score": "activation", "score": "taylor"}
    model, optimizer, x = setting(torch.float64)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, **settings)
    run(trainer, model, optimizer, x, 5, losses)
    other = ecospa_fx.EcoSpaTrainer(model, optimizer, **settings)
    other.load_state_dict(trainer.state_dict())
    assert str(other.state_dict()) == str(trainer.state_dict())
    run(other, model, optimizer, x, 29, losses[5:])
    again, optimizer, x = setting(torch.float64)
    straight = ecospa_fx.EcoSpaTrainer(again, optimizer, **settings)
    run(straight, again, optimizer, x, 34, losses)
    assert straight.history == other.history and straight.postponed == other.postponed
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
