"""Fuzzing of state: a short run of it, and that planted bugs are found and made small, in programs that run."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx.errors import CaptureError
from ecospa_fx.testing import beside_ranks
from ecospa_fx.testing.beside import Beside, Ended
from ecospa_fx.testing.beside_ranks import RankCrew
from ecospa_fx.testing.fuzz_state import (
    StateProgram,
    StateTally,
    check,
    check_on_rank,
    check_on_ranks,
    fuzz,
    main,
    program_number,
    smallest,
)
from ecospa_fx.testing.sandbox import Differs, Generators
from ecospa_fx.testing.stateful import PARTS, Draw, StatefulModule, random_module

PLAIN = StatefulModule((), blocks=1).source()
COUNTING = PLAIN.replace("y = self.down(h)", "y = self.down(h)\n        self.calls = getattr(self, 'calls', 0) + 1")


def test_stateful_modules_in_loops_equal_the_plain_ones() -> None:
    tally = StateTally()
    assert not [str(smallest(found)) for found in fuzz(range(40), seed=20261129, tally=tally)]
    # Programs in which nothing is compiled, or nothing shrinks, would be no test.
    assert tally.programs == 40 and tally.compiled > 8 and tally.shrunk > 3 and tally.steps > 220


def test_on_two_ranks_they_equal_the_plain_ones_there() -> None:
    tally = StateTally()
    with RankCrew(2, check_on_rank) as crew:
        assert not [str(found) for found in fuzz(range(10), 4, tally, partial(check_on_ranks, crew))]
    assert tally.programs == 10 and tally.compiled > 2 and tally.shrunk > 0 and tally.steps > 40


def _check_without_new_reducers(program: Any) -> Any:
    ecospa_fx.model.journal.make_again = lambda wrapper: None  # of this process, which ends with its crew
    return check_on_rank(program)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_gradients_that_are_not_reduced_after_a_shrink_are_found(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = "compile(2)", "train(3)", "shrink(1)", "train(2)"
    program = StateProgram(StatefulModule(()), steps, "graph", "root")
    if start == "spawn":
        monkeypatch.setattr(beside_ranks, "may_fork", lambda: False)
    with RankCrew(2, _check_without_new_reducers) as crew:
        failure = check_on_ranks(crew, program)
    assert failure is not None and failure.step == 3


@pytest.mark.sweep
@pytest.mark.timeout(7200)
def test_many_on_two_ranks_equal_the_plain_ones_there() -> None:
    with RankCrew(2, check_on_rank) as crew:
        assert not [str(found) for found in fuzz(range(1500), 1, StateTally(), partial(check_on_ranks, crew))]


@pytest.mark.sweep
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(3))
def test_many_stateful_modules_in_loops_equal_the_plain_ones(seed: int) -> None:
    assert not [str(smallest(found)) for found in fuzz(range(3000), seed=seed, tally=StateTally())]


def test_a_seed_makes_its_programs_again() -> None:
    programs = [program_number(7, number) for number in range(20)]
    assert programs == [program_number(7, number) for number in range(20)]
    assert len({program.source() for program in programs}) == 20


@pytest.mark.parametrize("make", [make for make, _ in PARTS], ids=[make.__name__ for make, _ in PARTS])
def test_every_part_runs_in_plain_python(make: Any) -> None:
    """Else its programs would compare two errors."""
    for number in range(12):
        rng = random.Random(number)
        draw = Draw(rng, rng.choice("xhy"), 0, tokens=number % 2 == 0)
        both = Beside(StatefulModule((make(draw),), tokens=draw.tokens).source(), tokens=draw.tokens)
        for training in (True, False):
            both.mode(training)
            both.train(3)
            both.call(2)


def test_modules_are_drawn_of_every_part() -> None:
    drawn = {part.name.split(" in ")[0] for i in range(400) for part in random_module(random.Random(i)).parts}
    assert {"running tensor", "counter", "list", "aux loss", "momentum copy", "chance", "noise", "hook"} <= drawn


def broken(monkeypatch: pytest.MonkeyPatch, method: str, change: Any) -> None:
    """Break compiled calls."""
    before = getattr(ecospa_fx.model.region.Region, method)
    monkeypatch.setattr(ecospa_fx.model.region.Region, method, lambda *args: change(before, *args))


def test_a_planted_bug_is_found_and_made_small(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A region that draws a number that the plain model does not."""

    def draws(call: Any, region: Any, module: nn.Module, *rest: Any) -> Any:
        result = call(region, module, *rest)
        torch.rand(())
        return result

    broken(monkeypatch, "__call__", draws)
    tally = StateTally()
    found = next(fuzz(range(100), seed=5, tally=tally))
    assert found.failure.kind.endswith("torch's generator")
    small = smallest(found)
    assert not small.program.module.parts and small.program.module.blocks == 1 and len(small.program.steps) <= 2
    assert main(["1", "--start", str(found.number), "--seed", "5"]) == 1
    printed = capsys.readouterr().out
    program = printed[printed.index("# program ") :]
    assert f"# program {found.number} of seed 5, minimised: " in program and "both.compile(" in program
    # The printed program is one to run; with the bug gone it passes.
    path = tmp_path / "program.py"
    path.write_text(program)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "PASS\n"


def hook_of(change: Any) -> Any:
    def hook(module: nn.Module, *_: Any) -> None:
        change(module)

    return hook


@pytest.mark.parametrize(
    ("after", "where"),
    [
        (lambda m: setattr(m, "calls", 0), "attribute blocks.0.calls is 0, expected 1"),
        (lambda m: m.down.bias.data.add_(1), "parameter blocks.0.down.bias"),
        (lambda m: m.down.bias.requires_grad_(False), "parameter blocks.0.down.bias has requires_grad False"),
        (lambda m: m.register_buffer("late", torch.ones(1)), "buffer blocks.0.late is a tensor"),
        (lambda _: random.random(), "Python's generator"),
    ],
)
def test_whatever_differs_is_named(after: Any, where: str) -> None:
    both = Beside(COUNTING)
    for world, change in ((both.ours, after), (both.plain, lambda _: None)):
        world.model.blocks[0].register_forward_hook(hook_of(change))
    with pytest.raises(Differs, match=where.replace("(", r"\(")):
        both.call(2)


def test_a_refusal_that_leaves_something_behind_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Beside(PLAIN, regions="root")

    def refuse(*_: Any, **__: Any) -> None:
        both.ours.model.blocks[0].left = 1
        raise CaptureError("no")

    monkeypatch.setattr("ecospa_fx.testing.beside.compile", refuse)
    with pytest.raises(Differs, match=r"refused compile \(no\): attribute blocks.0.left is int 1, expected nothing"):
        both.compile(2)


def test_a_compiled_model_may_not_refuse_a_call_before_any_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Beside(PLAIN, regions="root")
    both.compile(2)

    def refuse(*_: Any) -> None:
        raise CaptureError("not again")

    monkeypatch.setattr(ecospa_fx.model.region.Region, "__call__", refuse)
    with pytest.raises(Differs, match="a compiled model refuses a call: not again"):
        both.call(2)


def test_the_twin_follows_a_shrink_by_zeros_or_by_size() -> None:
    for sized in (False, True):
        both = Beside(PLAIN, regions="root", sized=sized)
        both.compile(2)
        both.train(3)
        both.shrink(1)
        both.train(2)
        both.save_and_load()
        both.train(2)
        assert both.shrinks == 1
        assert (both.plain.model.blocks[0].up.weight.shape == (6, 4)) == (not sized)


@pytest.mark.parametrize("execution", ["graph", "module"])
def test_a_graph_that_the_module_holds_is_no_obstacle_to_a_smaller_twin(execution: Any) -> None:
    """It holds the gradient accumulators of the old shapes. Program 386 of seed 3."""
    source = PLAIN.replace("y = self.down(h)", "y = self.down(h)\n        self.last = y")
    both = Beside(source, execution=execution, regions="root", sized=True)
    both.compile(2)
    both.train(3)
    both.shrink(1)
    both.train(5)
    assert both.shrinks == 1 and both.plain.model.blocks[0].last.requires_grad


def test_gradients_of_a_backward_that_fails_half_way_are_no_difference() -> None:
    """A loss of a graph that is freed, kept by a forward in another mode. Program 548 of seed 2."""
    aux = "if self.training:\n            self.aux = (self.down.weight ** 2).mean()\n        y = self.down(h)"
    both = Beside(PLAIN.replace("y = self.down(h)", aux), regions="root")
    both.train(3)
    both.mode(False)
    both.compile(5)
    both.shrink(657)
    both.train(5)
    assert both.shrinks == 1
    assert all(p.grad is None for world in (both.plain, both.ours) for p in world.model.parameters())


def test_zeros_stand_for_no_reduction_that_only_another_mode_runs() -> None:
    """A softmax over what is left, in training only. Program 1211 of seed 1."""
    softmax = "if self.training:\n            self.aux = x.softmax(-1).mean(0).pow(2).sum()\n        h = "
    both = Beside(PLAIN.replace("h = ", softmax, 1), regions="root")
    both.mode(False)
    both.compile(5)
    both.shrink(18)
    both.mode(True)
    with contextlib.suppress(Ended):
        both.train(3)
    assert both.shrinks == 1


def test_generators_are_compared_each() -> None:
    state = Generators.seeded(0)
    state.check("now")
    torch.rand(1)
    with pytest.raises(Differs, match="now: torch's generator"):
        state.check("now")


def test_a_program_that_is_right_has_no_failure() -> None:
    steps = "compile(2)", "train(3)", "shrink(1)", "train(2)"
    assert check(StateProgram(StatefulModule(()), steps, "graph", "root")) is None
