"""Ctrl-C at any line of a shrink: everything is as before it, or as after it, never between."""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel

import ecospa_fx
from ecospa_fx.model.journal import Journal, all_or_nothing


class Attention(nn.Module):
    """Linear attention with heads, whose number the model's own Python must follow."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.up, self.norm, self.down = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (m(x).view(b, s, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o((q @ k.mT @ v).transpose(1, 2).flatten(2))
        h = self.norm(self.up(x).transpose(1, 2)).transpose(1, 2)
        return x + self.down(torch.relu(h))


class Trial:
    """A compiled model in training, and everything that a shrink of it may touch."""

    def __init__(self, execution: Any, adaptive: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(Attention(), Attention())
        self.average = AveragedModel(self.model)
        ecospa_fx.compile(self.model, example_inputs=(torch.randn(2, 3, 8),), execution=execution)
        self.optimizer = AdamW(self.model.parameters(), lr=0.01)
        how: dict[str, Any] = {"policy": "adaptive", "end": 8} if adaptive else {"top_k": 1.0, "theta": 0.6}
        self.trainer = ecospa_fx.EcoSpaTrainer(
            self.model, self.optimizer, target=0.6, interval=4, start=4, also=[self.average], **how
        )
        self.loss = torch.zeros(())
        for step in range(3):
            self.train(step)
        self.backward(3)
        self.trainer._clock.now = 6.0  # a shrink is due

    def backward(self, step: int) -> None:
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(step))
        self.loss = self.model(x).square().mean()
        self.loss.backward()
        self.optimizer.step()
        self.average.update_parameters(self.model)

    def train(self, step: int) -> None:
        self.backward(step)
        self.trainer.step(loss=self.loss)
        self.optimizer.zero_grad()

    def by_hand(self) -> None:
        keeps = {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(self.model) if c.size > 1}
        ecospa_fx.shrink(self.model, keeps, optimizer=self.optimizer, also=self.average)

    def by_trainer(self) -> None:
        self.trainer.sparsify()

    def everything(self) -> dict[str, Any]:
        """All that must be before or after."""
        named: dict[str, Any] = {}
        for who, module in (("model", self.model), ("average", self.average.module)):
            for name, parameter in module.named_parameters():
                named[f"{who} {name}"] = parameter.detach().clone()
                named[f"{who} {name} gradient"] = None if parameter.grad is None else parameter.grad.clone()
            for name, buffer in module.named_buffers():
                named[f"{who} {name}"] = buffer.clone()
            for path, child in module.named_modules():
                named[f"{who} {path} class"] = type(child)
                sizes = {k: v for k, v in vars(child).items() if isinstance(v, (int, tuple)) and k[0] != "_"}
                named[f"{who} {path} sizes"] = sizes
            compiled = vars(module).get("_ecospa_model")
            if compiled is not None:
                named[f"{who} plan"] = {key: kept.tolist() for key, kept in compiled.plan.kept.items()}
                named[f"{who} attributes"] = {str(a): both for a, both in compiled.attributes.items()}
                for name, region in compiled.regions.items():
                    programs = [each.program.source for each in region.specializations]
                    named[f"{who} {name} programs"] = programs
                couplings = ecospa_fx.couplings(module)
                named[f"{who} couplings"] = [(c.name, c.size) for c in couplings]
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                named[f"optimizer {name} {key}"] = value.clone()
        state = self.trainer.state_dict()
        named |= {f"trainer {key}": copy.deepcopy(state[key]) for key in ("steps", "done", "history", "from", "spikes")}
        for number, scores in enumerate(state["scores"]):
            named[f"trainer scores {number} steps"] = scores["steps"]
            named |= {f"trainer scores {number} {k}": t.clone() for k, t in scores["tensors"].items()}
        grams = state["compensation"].get("tensors", {})
        named |= {f"trainer grams {key}": tensor.clone() for key, tensor in grams.items()}
        named["trainer shrinks"] = (self.trainer.last_shrink is None, self.trainer.forecast is None)
        return named

    def goes_on(self) -> None:
        """The model runs, trains, and the copy is one."""
        for step in range(4, 6):
            self.optimizer.zero_grad()
            self.backward(step)


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    def same(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x.shape == y.shape and torch.equal(x, y)
        return type(x) is type(y) and bool(x == y)

    return [key for key in {**a, **b} if key not in a or key not in b or not same(a[key], b[key])]


class Interrupt:
    """Raises KeyboardInterrupt at one line of the library, or counts them."""

    def __init__(self, at: int = 0, again: int = 0) -> None:
        self.at, self.again, self.lines, self.where = at, again, 0, ""
        self.all: list[tuple[int, str]] = []

    def __enter__(self) -> Interrupt:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith("ecospa_fx."):
            return None
        if event == "line":
            self.lines += 1
            where = f"{module}:{frame.f_lineno}"
            if not self.at:
                self.all.append((self.lines, where))
            if self.lines == self.at:
                self.where = where
                if self.again:
                    self.at, self.again = self.lines + self.again, 0
                raise KeyboardInterrupt
        return self._trace


def interrupted(case: tuple[str, bool, Any], lines: Iterable[int], again: int = 0) -> tuple[int, int]:
    """Interrupt a shrink at some of its lines; return how often it was as before, and as after."""
    execution, adaptive, shrink = case
    trial, done = Trial(execution, adaptive), Trial(execution, adaptive)
    before = trial.everything()
    shrink(done)
    after = done.everything()
    assert differing(before, after)
    counts = [0, 0]
    for line in lines:
        with suppress(KeyboardInterrupt), Interrupt(line, again) as interrupt:
            shrink(trial)  # its last lines may be fewer than at the first time
        now = trial.everything()
        changed, missing = differing(before, now), differing(after, now)
        assert not changed or not missing, f"{interrupt.where}: {changed[:5]} changed, {missing[:5]} did not"
        counts[bool(changed)] += 1
        if changed:
            trial.goes_on()
            trial = Trial(execution, adaptive)
    trial.goes_on()
    return counts[0], counts[1]


def lines_of(case: tuple[str, bool, Any]) -> list[tuple[int, str]]:
    """Return the number of every line of a shrink, and where it is."""
    execution, adaptive, shrink = case
    trial = Trial(execution, adaptive)
    with Interrupt() as counted:
        shrink(trial)
    return counted.all


CASES = [
    pytest.param(("graph", False, Trial.by_hand), id="graph"),
    pytest.param(("module", False, Trial.by_hand), id="module"),
    pytest.param(("graph", False, Trial.by_trainer), id="trainer"),
    pytest.param(("module", False, Trial.by_trainer), id="trainer, module"),
    pytest.param(("graph", True, Trial.by_trainer), id="absorb and rotate"),
]


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_shrink_is_done_or_not_done(case: Any) -> None:
    lines = lines_of(case)
    assigning = [number for number, where in lines if ".journal:" in where]
    others = [number for number, where in lines if assigning[0] < number < assigning[-1]]
    dice = random.Random(0)
    chosen = {*dice.sample(assigning, 8), *dice.sample(others, 4), *dice.sample(range(1, assigning[0]), 2)}
    before, after = interrupted(case, [*sorted(chosen), (assigning[-1] + lines[-1][0]) // 2])
    assert before > 10 and after >= 1


@pytest.mark.sweep
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("case", CASES)
def test_every_line_of_a_shrink_may_be_interrupted(case: Any) -> None:
    """Every line of the library that a shrink runs, the first three times and the last time that it runs."""
    times: dict[str, list[int]] = {}
    for number, where in lines_of(case):
        times.setdefault(where, []).append(number)
    interrupted(case, sorted({number for each in times.values() for number in (*each[:3], each[-1])}))


@pytest.mark.parametrize("again", [*range(1, 40), 60, 100])
def test_an_interrupt_may_itself_be_interrupted(again: int) -> None:
    """The second one comes while everything is put back."""
    held, steps = {"a": 1, "b": 2}, []

    def change(journal: Journal) -> None:
        for key in ("a", "b", "c"):
            steps.append(key)
            journal.set_item(held, key, 7)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Interrupt(again):
        all_or_nothing(change)
    assert held == {"a": 1, "b": 2}


def test_ctrl_c_waits_while_everything_is_put_back() -> None:
    held = {"a": 1}

    def press() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def change(journal: Journal) -> None:
        journal.set_item(held, "a", 2)
        journal.note(press)
        raise ValueError

    handler = signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)  # in the background signals may be ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            all_or_nothing(change)
        assert held == {"a": 1} and signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_no_signal_is_touched() -> None:
    held, errors = {"a": 1}, []

    def change(journal: Journal) -> None:
        journal.set_item(held, "a", 2)
        raise ValueError

    def run() -> None:
        try:
            all_or_nothing(change)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert held == {"a": 1} and len(errors) == 1


def test_what_fails_after_weights_were_cut_takes_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial("graph")
    before = trial.everything()

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("ecospa_fx.model.state.ModelState.adopt", fail)
    with pytest.raises(MemoryError):
        trial.by_hand()
    monkeypatch.undo()
    assert not differing(before, trial.everything())
    trial.by_hand()
    trial.goes_on()
