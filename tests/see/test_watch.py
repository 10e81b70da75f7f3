"""Watching a run: what is shown, written down and warned of."""

import functools
import json
import logging
import math

import pytest
import torch
from expecttest import assert_expected_inline
from test_steps import setting
from torch import nn

import ecospa_fx
from ecospa_fx.errors import EcoSpaError
from ecospa_fx.see.report import save_widths
from ecospa_fx.see.report.training import widths_of
from ecospa_fx.see.symptoms import collapses, odd_widths, spike
from ecospa_fx.train.loss_spikes import LossSpikes


class Writer:
    """What a SummaryWriter is to us."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[int, float]]] = {}

    def add_scalar(self, name, value, step) -> None:
        self.seen.setdefault(name, []).append((step, value))


def run(steps=14, losses=None, **options):
    """A short run whose losses are made up, so that what is shown is the same everywhere."""
    model, optimizer, x = setting()
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=4, start=4, end=12)
    with ecospa_fx.Watch(trainer, **options) as watch:
        for step in range(steps):
            (model(x) - x.flip(-1)).square().mean().backward()
            optimizer.step()
            trainer.step()
            optimizer.zero_grad()
            watch.step((losses or (lambda step: 4 - step / 8))(step))
    return watch


default = functools.cache(run)


def test_a_table_of_shrinks():
    assert_expected_inline(
        str(default()),
        """\
2,272 -> 1,388 parameters (x 0.611)
step  parameters    share  couplings  entries  loss before  after
   4       1,947  x 0.857          3       11        3.812  2.938
   8       1,666  x 0.733          4        7        3.562  2.688
  12       1,388  x 0.611          3        4        3.188  2.438""",
    )


def test_lines_of_json_hold_all_of_it(tmp_path):
    path = tmp_path / "run.jsonl"
    watch = run(lines=path, losses=lambda step: math.nan if step == 13 else 4.0 if step < 5 else 5.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line for line in lines if "event" not in line]
    assert [line["step"] for line in steps] == list(range(1, 15))
    assert [line["size"] for line in steps] == watch.sizes and steps[-1]["loss"] == "nan"
    assert [line["loss"] for line in steps[:-1]] == watch.losses[:-1]
    shrinks = [line for line in lines if line.get("event") == "shrink"]
    assert [{k: line[k] for k in ("step", "size", "removed", "importance", "flow")} for line in shrinks] == (
        watch.trainer.history
    )
    # Widths add up with what was removed, and are those of the model at the end.
    assert shrinks[-1]["widths"] == {c.name: c.size for c in ecospa_fx.couplings(watch.trainer.model)}
    at, widths = widths_of(watch.report())
    assert at[1:] == [line["step"] for line in shrinks]
    assert {name: sizes[-1] for name, sizes in widths.items()} == shrinks[-1]["widths"]
    signs = [line for line in lines if line.get("event") == "sign"]
    assert [(s["kind"], s["step"]) for s in signs] == [(s.kind, s.step) for s in watch.signs] and signs
    run(lines=path, steps=1)  # a run that goes on adds to it
    assert len(path.read_text().splitlines()) == len(lines) + 1


def test_waits_are_written_down(tmp_path):
    path = tmp_path / "run.jsonl"
    model, optimizer, x = setting()
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=2, start=2, end=12)
    with ecospa_fx.Watch(trainer, lines=path) as watch:
        for step in range(8):
            (model(x) - x.flip(-1)).square().mean().backward()
            optimizer.step()
            trainer.step(loss=1.0 if step < 2 else 9.0)
            optimizer.zero_grad()
            watch.step(1.0 if step < 2 else 9.0)
    waits = [json.loads(line) for line in path.read_text().splitlines() if '"wait"' in line]
    assert [{k: v for k, v in line.items() if k != "event"} for line in waits] == trainer.postponed and waits
    (sign,) = watch.signs
    assert "; the next shrink waits for it. If it does not come down, " in sign.text


def test_curves_for_tensorboard(tmp_path):
    writer = Writer()
    watch = run(tensorboard=writer)
    assert writer.seen["loss"] == list(enumerate(watch.losses, 1))
    assert writer.seen["size"] == list(enumerate(watch.sizes, 1))
    names = {c.name for c in ecospa_fx.couplings(watch.trainer.model)}
    steps = [entry["step"] for entry in watch.trainer.history]
    for name in names:
        assert [step for step, _ in writer.seen[f"width/{name}"]] == steps
        assert writer.seen[f"importance/{name}"] == [
            (entry["step"], entry["importance"][name]) for entry in watch.trainer.history
        ]


def test_a_directory_for_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    watch = run(tensorboard=tmp_path / "board")
    events = accumulator.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("loss")] == list(range(1, 15))
    assert events.Scalars("size")[-1].value == watch.sizes[-1]


def test_no_tensorboard_and_files_that_cannot_be_written(monkeypatch, tmp_path):
    import builtins

    found = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(EcoSpaError) as caught:
        run(steps=1, tensorboard=tmp_path / "board")
    assert str(caught.value) == "tensorboard= needs TensorBoard: pip install tensorboard"
    with pytest.raises(EcoSpaError) as caught:
        run(steps=1, lines=tmp_path / "nowhere" / "run.jsonl")
    assert str(caught.value) == (
        f"lines='{tmp_path / 'nowhere' / 'run.jsonl'}' cannot be written: No such file or directory"
    )


def test_progress_in_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    run(steps=1)
    assert capsys.readouterr().err == ""  # without a number of steps none is shown
    model, optimizer, x = setting()
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=2, start=2, end=6)
    with ecospa_fx.Watch(trainer, steps=8) as watch:
        for _ in range(8):
            (model(x) - x.flip(-1)).square().mean().backward()
            optimizer.step()
            trainer.step()
            optimizer.zero_grad()
            watch.step(torch.tensor(1.25))
        shown = watch._progress.tasks[0].fields["shown"]
    assert watch._progress.tasks[0].completed == 8
    assert shown.startswith("loss 1.250  size x 0.6") and "  importance " in shown
    assert "loss 1.250" in capsys.readouterr().err


def test_fit_tells_the_watch():
    model, optimizer, x = setting()
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=2, end=8)
    watch = ecospa_fx.Watch(trainer)
    assert trainer.fit([(x, x.flip(-1))] * 6, loss=nn.functional.mse_loss, watch=watch) == watch.losses


def test_a_picture_of_widths(tmp_path):
    watch = default()
    for name in ("widths.png", "widths.svg"):
        save_widths(watch.report(), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    svg = (tmp_path / "widths.svg").read_text()
    assert svg.count('<g id="axes_') == len({c.kind for c in ecospa_fx.couplings(watch.trainer.model)}) >= 4


# Signs


def test_a_loss_that_stays_up_after_a_shrink_is_said_once_for_each(caplog):
    with caplog.at_level(logging.WARNING, "ecospa_fx.shrink"):
        watch = run(losses=lambda step: 4.0 if step < 4 else 9.0)
    shrinks = [entry["step"] for entry in watch.trainer.history]
    spikes = [sign for sign in watch.signs if sign.kind == "spike"]
    assert len({*shrinks}) > 1 and spikes and len(spikes) <= len(shrinks)
    assert str(spikes[0]) == (
        "step 5: the loss is 4.5, 12% above the 4 before the shrink at step 4; with trainer.step(loss=loss) the "
        "next shrink would wait for it. If it does not come down, shrink less at a time: a larger theta, a smaller "
        "top_k, a longer interval"
    )
    assert [record.getMessage() for record in caplog.records] == [str(sign) for sign in watch.signs]
    assert str(watch).splitlines()[-1].startswith("! step ")


def test_a_loss_that_comes_down_is_no_sign():
    assert not [sign for sign in default().signs if sign.kind == "spike"]
    spikes = LossSpikes()
    spikes.update(1.0)
    assert spike(spikes, 1, 0, waits=False) is None


def test_a_layer_that_is_all_but_gone_is_said_once():
    model, _, _ = setting()
    found = {c.name: c for c in ecospa_fx.couplings(model)}
    ecospa_fx.shrink(model, {found["layers.1.ffn"]: torch.tensor([3])})
    (sign,) = collapses(ecospa_fx.couplings(model), 7)
    assert str(sign) == (
        "step 7: `layers.1.ffn` has 1 of 20 entries left (5.0%), the median coupling 100%: its layer contributes "
        "almost nothing. min_keep= or frozen= keeps more of it"
    )
    assert collapses(ecospa_fx.couplings(model), 8, reported={"layers.1.ffn"}) == []
    model, _, _ = setting()
    ecospa_fx.shrink(model, {c: torch.arange(max(1, c.size // 5)) for c in ecospa_fx.couplings(model)})
    assert collapses(ecospa_fx.couplings(model), 9) == []  # all have gone as far: that is what was asked for


def test_widths_that_run_no_faster():
    model, _, _ = setting()
    found = {c.name: c for c in ecospa_fx.couplings(model)}
    assert odd_widths(model, found.values(), 3, 8) is None  # those that the model came with are its own affair
    ecospa_fx.shrink(model, {"layers.0.ffn": torch.arange(13), "layers.1.ffn": torch.arange(16)})
    sign = odd_widths(model, ecospa_fx.couplings(model), 3, 8)
    assert str(sign) == (
        "step 3: 2 of 4 widths that have shrunk are not multiples of 8, such as 13 of `layers.0.up.weight`: they may "
        "run no faster than 16. round_to=8 keeps multiples"
    )
    assert not [sign for sign in default().signs if sign.kind == "width"]  # on a CPU they are as good as any
    assert len([sign for sign in run(multiple=8).signs if sign.kind == "width"]) == 1
