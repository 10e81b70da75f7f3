"""Fuzzing: a short run of it, and that a planted bug is found and made small."""

from __future__ import annotations

import importlib
import random
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from ecospa_fx.passes.capture.capture import capture
from ecospa_fx.passes.ir.relations import SameDims
from ecospa_fx.passes.rules import OPS, OpInfo
from ecospa_fx.testing.check import Failure, Tally, check
from ecospa_fx.testing.fuzz import FuzzFailure, check_exported, fuzz, main, program_number, smallest
from ecospa_fx.testing.programs import RandomProgram, Statement
from ecospa_fx.testing.random_program import KINDS, random_program
from ecospa_fx.testing.sized import resized, widths_of
from ecospa_fx.testing.smaller import check_smaller
from ecospa_fx.testing.strategies import modules, programs
from ecospa_fx.testing.trace import trace

aten = torch.ops.aten


def test_random_programs_are_exact() -> None:
    tally = Tally()
    assert not [str(smallest(found)) for found in fuzz(range(70), seed=20251125, tally=tally, every=30)]
    # Programs in which nothing can shrink would be no test.
    assert tally.programs == 70 and tally.shrinkable > 45 and tally.comparisons > 80 and tally.twins > 40
    assert tally.smaller > 100 and tally.reduced > 10
    assert tally.exported == 3 and {"qk", "vo", "heads", "ffn", "glu", "conv"} <= tally.kinds.keys()


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(3))
def test_many_random_programs_are_exact(seed: int) -> None:
    assert not [str(smallest(found)) for found in fuzz(range(10_000), seed=seed, tally=Tally(), every=20)]


@settings(max_examples=8, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs("attention", "glu", "residual", "tied", most=4))
def test_what_hypothesis_draws_is_exact(program: Any) -> None:
    assert check(program) is None


@settings(max_examples=3, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(modules("experts", "conv", most=3))
def test_modules_run(drawn: Any) -> None:
    model, args = drawn
    assert not model.training and all(p.dtype == torch.float64 for p in model.parameters())
    model(*args)


@pytest.fixture
def broken_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that believes that softmax leaves its entries alone."""

    def softmax(x: Any, dim: int, *_: Any) -> SameDims:
        return SameDims(x)

    monkeypatch.setitem(OPS, aten.softmax.int, OpInfo(softmax, None))


@pytest.mark.usefixtures("broken_softmax")
def test_a_planted_bug_is_found_and_made_small(capsys: pytest.CaptureFixture[str]) -> None:
    candidates = ((number, program_number(3, number)) for number in range(200))
    number = next(n for n, program in candidates if "softmax" in str(program) and check(program, seed=n))
    assert main(["1", "--start", str(number), "--seed", "3", "--every", "0"]) == 1
    printed = capsys.readouterr().out
    assert "# program " in printed and "of seed 3, minimised: masking: " in printed
    code = printed[printed.index("# program ") :].split("\n\n# program")[0]
    body = code.split("def forward")[1].split("return")[0].strip().splitlines()[1:]
    # A weight, the softmax, and a weight that takes up its entries.
    assert len(body) <= 4 and any("softmax" in line for line in body)
    exec(code, scope := {"__name__": "printed"})
    assert scope["failure"].kind == "masking"


def test_the_module_at_smaller_sizes_knows_no_rule() -> None:
    """An average that divides by the original number is a difference to the same program at smaller sizes."""
    source = RandomProgram(
        (("x0", "torch.randn(2, 5, dtype=torch.float64)"),),
        (("m0", "nn.Linear(5, 13)"), ("m1", "nn.Linear(13, 11)"), ("m2", "nn.Linear(11, 4)")),
        (
            Statement(("h0",), "self.m0(x0)"),
            Statement(("h1",), "h0 - h0.mean(-1, keepdim=True)"),
            Statement(("h2",), "self.m2(self.m1(h1).relu())"),
        ),
        ("h2",),
    )
    tally = Tally()
    assert check_smaller(source, tally) is None and (tally.smaller, tally.reduced) == (2, 1)
    assert widths_of(source) == [11, 13]
    assert "nn.Linear(5, 7)" in resized(source, {13: 7}).source() and "nn.Linear(7, 11)" in str(
        resized(source, {13: 7})
    )
    by_hand = replace(source.statements[1], code="h0 - h0.sum(-1, keepdim=True) / 13")
    failure = check_smaller(replace(source, statements=(source.statements[0], by_hand, source.statements[2])))
    assert failure is not None and failure.kind == "smaller" and "13 to " in failure.what


def test_the_same_numbers_make_the_same_program() -> None:
    first, second = program_number(1, 2), program_number(1, 2)
    assert str(first) == str(second) and str(first) != str(program_number(2, 1))
    (model, _), (again, _) = first.build(), second.build()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert check(first) is None and check_exported(first) is None
    source = FuzzFailure(1, 2, first, Failure("exported", "so it is")).source()
    assert source.endswith('\n\nassert_exact(model, args, regions="root")\n')


def test_a_program_is_traced_as_it_is_exported() -> None:
    def ops(captured: Any) -> list[Any]:
        symbolic = ("sym_size", "<built-in")
        names = [str(node.target) for node in captured.graph.nodes if node.op == "call_function"]
        # A constant is what export makes a copy of.
        names = ["aten.lift_fresh_copy.default" if name == "aten.lift_fresh.default" else name for name in names]
        return [name for name in names if not any(text in name for text in symbolic)]

    for number in range(3):
        model, args = random_program(random.Random(number), ("attention", "glu", "in_place", "tied", "view")).build()
        assert ops(trace(model, args)) == ops(capture(model, args, {}, check=False)), number


def test_a_kind_that_is_none_is_named() -> None:
    with pytest.raises(ValueError) as error:
        programs("atention")
    assert str(error.value) == f"there is no kind of step `atention`; the kinds are {', '.join(KINDS)}"


def test_without_hypothesis_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ecospa_fx.testing.strategies")
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError) as error:
        importlib.import_module("ecospa_fx.testing.strategies")
    assert str(error.value) == ("ecospa_fx.testing.strategies needs hypothesis: pip install hypothesis")
