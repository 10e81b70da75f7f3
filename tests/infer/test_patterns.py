"""The pattern language: it is read as it is meant, and each mistake is an error that shows the place."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ecospa_fx.errors import EcoSpaError, PatternError, RuleError
from ecospa_fx.passes.axes.algebra import Mismatch, size_of
from ecospa_fx.passes.capture.capture import capture
from ecospa_fx.passes.graph.nodes import place
from ecospa_fx.passes.infer.infer import infer_axes
from ecospa_fx.passes.ir.patterns import Dots, Group, Name, ParsedPattern, TensorDims, bind, parse
from ecospa_fx.passes.ir.relations import Pattern
from ecospa_fx.passes.rules import OPS, OpInfo

aten = torch.ops.aten

MALFORMED = {
    "a (b c -> a": """\
`(` is not closed; expected `)` before `->`
    a (b c -> a
      ^""",
    "a (b, c -> a": """\
`(` is not closed; expected `)` before `,`
    a (b, c -> a
      ^""",
    "a -> (b": """\
`(` is not closed; expected `)` before the end
    a -> (b
         ^""",
    "a b) -> a": """\
`)` without `(`; expected a name or `,` or `->`
    a b) -> a
       ^""",
    "a ((b c) d) -> a": """\
`(` inside a group; expected a name or `)`, a product of products is one product
    a ((b c) d) -> a
       ^""",
    "a ( ) -> a": """\
an empty group; expected at least one name
    a ( ) -> a
      ^^^""",
    "(... h) -> h": """\
`...` inside a group; expected a name or `)`
    (... h) -> h
     ^^^""",
    "(a b a) -> b": """\
`a` twice in one group; expected each name once
    (a b a) -> b
         ^""",
    "... a ... -> a": """\
`...` twice in one tensor; expected it once
    ... a ... -> a
          ^^^""",
    "a -> ... ...": """\
`...` twice in one tensor; expected it once
    a -> ... ...
             ^^^""",
    "row, column": """\
no `->`; expected it behind the operands, before the dims of the output
    row, column
               ^""",
    "a -> b -> c": """\
a second `->`; expected one, between operands and output
    a -> b -> c
           ^^""",
    "a -> b, +c": """\
`+` on the output; expected it before an operand
    a -> b, +c
            ^""",
    "a -> row (b row)": """\
`row` twice in the output; expected each name once
    a -> row (b row)
                ^^^""",
    "a -> +b": """\
`+` on the output; expected it before an operand
    a -> +b
         ^""",
    "a +b -> a": """\
`+` inside an operand; expected it before the first dim, it speaks of the whole operand
    a +b -> a
      ^""",
    "a ! -> b": """\
`!` without a name; expected it right behind the name that is pinned, `k!`
    a ! -> b
      ^""",
    "(a b)! -> a": """\
`!` behind a group; expected it behind each name that is pinned, `(h! g!)`
    (a b)! -> a
         ^""",
    "...! -> ...": """\
`!` behind `...`; expected it behind a name
    ...! -> ...
       ^""",
    "a!! -> a": """\
`!` twice; expected it once
    a!! -> a
      ^""",
    "a~! -> a": """\
`!` behind `~`; expected one mark
    a~! -> a
      ^""",
    "a ~ -> b": """\
`~` without a name; expected it right behind the name that is reduced, `k~`
    a ~ -> b
      ^""",
    "a b# -> a": """\
unknown character '#'; expected a name, `...`, `(`, `)`, `!`, `~`, `+`, `,` or `->`
    a b# -> a
       ^""",
    "a\tb -> a": """\
unknown character '\\t'; expected a name, `...`, `(`, `)`, `!`, `~`, `+`, `,` or `->`
    a b -> a
     ^""",
    "a .. -> a": """\
`..`; expected three dots, `...`
    a .. -> a
      ^^""",
    "a - b": """\
`-` without `>`; expected `->`
    a - b
      ^""",
    "2d -> d": """\
`2d`; expected a name, which starts with a letter
    2d -> d
    ^^""",
}

UNFIT: dict[tuple[Any, ...], str] = {
    ("m k, k n -> m n", 3): """\
the pattern names 2 operands; expected 3, the tensors of the op
    m k, k n -> m n
    ^^^^^^^^""",
    ("m k, k n -> m n", 1): """\
the pattern names 2 operands; expected 1, the tensors of the op
    m k, k n -> m n
    ^^^^^^^^""",
    ("k, n k, +n -> n", 4): """\
the pattern names 2 to 3 operands; expected 4, the tensors of the op
    k, n k, +n -> n
    ^^^^^^^^^^""",
    ("a -> a", 1, ("g",)): """\
`sizes` tells the size of `g`; expected a name of the pattern
    a -> a
    ^^^^^^""",
    ("(row column) -> row column", 1): """\
neither `row` nor `column` of a group has a size; expected all but one to be dims of an operand, or in `sizes`
    (row column) -> row column
         ^^^^^^""",
    ("a -> (a copy)", 1): """\
`copy` in a group of the output has no size; expected a name of an operand, or of `sizes`
    a -> (a copy)
            ^^^^""",
}


@pytest.mark.parametrize("pattern", MALFORMED)
def test_a_malformed_pattern_is_shown_with_the_place(pattern: str) -> None:
    with pytest.raises(PatternError) as error:
        parse(pattern)
    assert str(error.value) == MALFORMED[pattern]


@pytest.mark.parametrize("arguments", UNFIT, ids=str)
def test_a_pattern_that_does_not_fit_its_op_is_shown(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(PatternError) as error:
        bind(*arguments)
    assert str(error.value) == UNFIT[arguments]


def test_it_is_read_as_it_is_meant() -> None:
    assert parse("... (h g) s! , + n->(h g)s") == ParsedPattern(
        (
            TensorDims((Dots(), Group((Name("h"), Name("g"))), Name("s", "!"))),
            TensorDims((Name("n"),), added=True),
        ),
        (TensorDims((Group((Name("h"), Name("g"))), Name("s"))),),
    )


class Factors(nn.Module):
    """The two factors of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.qr(self.weight)


def test_each_output_may_be_named() -> None:
    pattern = parse("... m n-> ...m k! ,,... k! n")
    assert str(pattern) == "... m n -> ... m k!, , ... k! n"
    assert pattern.outputs[1] == TensorDims(())
    assert pattern.kept == {".", "m", "k", "n"} and (pattern.pinned, pattern.absent) == (("k",), ())
    assert parse("m n~, +n -> m n~").absent == ("n",)


def test_outputs_have_their_axes_and_what_none_has_is_summed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(x: Any) -> str:
        """One result per row, one per column."""
        return "m n -> m rank!, n rank!"

    def short(x: Any) -> str:
        """One result of two."""
        return "m n -> m rank!, n rank!, m"

    facts = {}
    for rule in (parts, short):
        monkeypatch.setitem(OPS, aten.linalg_qr.default, OpInfo(rule))
        facts[rule] = infer_axes(capture(Factors(), (torch.zeros(2),), {}))
    rows, columns = facts[parts].parameters["weight"]
    (node,) = (node for node in facts[parts].operands if node.target is aten.linalg_qr.default)
    (first, _), (second, _) = facts[parts].values[node]
    assert (first, second) == (rows, columns)
    reasons = {fact.reason for fact in facts[short].facts if fact.role == "pinned"}
    assert "aten.linalg_qr: the rule names 3 outputs of 2" in reasons
    assert str(parse("... (h g) s! , + n->(h g)s")) == "... (h g) s!, +n -> (h g) s"


def test_tensors_without_dims_are_written_as_nothing() -> None:
    assert str(parse("k,k->")) == "k, k ->"
    assert str(parse(" , n, + -> n")) == ", n, + -> n"
    assert parse("->").operands == (TensorDims(()),)
    assert bind("-> n", 0).operands == ()  # or no tensor


def test_only_what_is_added_at_the_end_may_be_left_out() -> None:
    assert str(bind("... k, n k, +n -> ... n", 2)) == "... k, n k -> ... n"
    with pytest.raises(PatternError, match=r"^the pattern names 2 operands; expected 1"):
        bind("+n, n -> n", 1)


def test_dims_under_dots_are_counted_from_the_right() -> None:
    term = parse("a ... b -> a").operands[0]
    assert term.keys_of((2, 3)) == ["a", "b"]
    assert term.keys_of((2, 3, 4, 5)) == ["a", ".2", ".1", "b"]
    assert parse("... (h g) s -> s").operands[0].keys_of((5,)) == ["s"]
    with pytest.raises(Mismatch) as mismatch:
        parse("n k -> n").operands[0].keys_of((6,))
    assert str(mismatch.value) == "the rule names 2 dims, `n k`, of a tensor with 1, [6]"


names = st.builds(Name, st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,2}", fullmatch=True), st.sampled_from(["", "!", "~"]))
groups = st.builds(
    lambda names: Group(tuple(names)), st.lists(names, min_size=1, max_size=3, unique_by=lambda name: name.text)
)


@st.composite
def terms(draw: st.DrawFn, output: bool = False) -> TensorDims:
    dims: list[Name | Group | Dots] = []
    for dim in draw(st.lists(st.one_of(names, groups, st.just(Dots())), max_size=4)):
        texts = {name.text for name in TensorDims(tuple(dims)).names}
        again = {name.text for name in TensorDims((dim,)).names} & texts
        if not (output and again) and not (dim == Dots() and dim in dims):
            dims.append(dim)
    return TensorDims(tuple(dims), added=not output and draw(st.booleans()))


patterns = st.builds(
    lambda operands, outputs: ParsedPattern(tuple(operands), tuple(outputs)),
    st.lists(terms(), min_size=1, max_size=4),
    st.lists(terms(output=True), min_size=1, max_size=3),
)


@settings(deadline=None, max_examples=300)
@given(patterns)
def test_printed_and_parsed_again_it_is_the_same(pattern: ParsedPattern) -> None:
    assert parse(str(pattern)) == pattern
    assert str(parse(str(pattern))) == str(pattern)
    dense = str(pattern).replace("( ", "(").replace(" )", ")").replace(", ", ",").replace(" -> ", "->")
    assert parse(dense) == pattern


@settings(deadline=None, max_examples=300)
@given(patterns, st.data())
def test_any_text_is_read_or_refused_with_the_typed_error(pattern: ParsedPattern, data: st.DataObject) -> None:
    text = str(pattern)
    for _ in range(data.draw(st.integers(1, 4))):
        at, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        new = data.draw(st.one_of(st.sampled_from([*" ()!~+,.>-a1_\n", "->", "..."]), st.text(max_size=2)))
        text = text[:at] + new + text[data.draw(st.sampled_from([at, stop])) :]
    try:
        parsed = parse(text)
    except PatternError as error:
        problem, shown, caret = str(error).rsplit("\n", 2)
        assert "expected" in problem and len(shown) == 4 + len(text)
        assert set(caret) <= {" ", "^"} and "^" in caret and len(caret) <= 5 + len(text)
        return
    assert parse(str(parsed)) == parsed
    for operands in range(len(parsed.operands) + 2):
        with contextlib.suppress(PatternError):
            assert len(bind(text, operands).operands) == operands


class Model(nn.Module):
    """One op on a weight, between two that contract it."""

    def __init__(self, op: Any = F.relu) -> None:
        super().__init__()
        self.weight, self.op = nn.Parameter(torch.randn(4, 3)), op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x @ self.weight)


@pytest.mark.parametrize("relation", ["m (n -> m n", lambda x: Pattern("m (n -> m n", (x,))])
def test_the_error_names_the_rule_and_the_op(monkeypatch: pytest.MonkeyPatch, relation: Any) -> None:
    def bent(x: Any) -> Any:
        return relation if isinstance(relation, str) else relation(x)

    monkeypatch.setitem(OPS, aten.relu.default, OpInfo(bent, None))
    captured = capture(Model(), (torch.ones(2, 4),), {})
    (node,) = (node for node in captured.graph.nodes if node.target is aten.relu.default)
    with pytest.raises(PatternError) as error:
        infer_axes(captured)
    assert str(error.value) == (
        f"the axis rule `bent` gives aten.relu ({place(node)}) a pattern that is wrong: "
        "`(` is not closed; expected `)` before `->`\n"
        "    m (n -> m n\n"
        "      ^\n"
        "this is a bug in the rule, nothing was changed"
    )
    assert isinstance(error.value, RuleError) and isinstance(error.value, EcoSpaError)


def test_a_rule_for_other_numbers_of_dims_is_a_refusal() -> None:
    """A call that a rule was not written for does not stop a model from being compiled: its axes stay whole."""
    model = Model(lambda x: F.linear(x, torch.ones(3)))
    axis_facts = infer_axes(capture(model, (torch.ones(2, 4),), {}))
    pinned = {fact.reason for fact in axis_facts.facts if fact.role == "pinned" and size_of(fact.expr) == 3}
    assert pinned == {"aten.linear: the rule names 2 dims, `n k`, of a tensor with 1, [3]"}


def test_the_page_about_patterns_is_true(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The code in docs/patterns.md runs in its order and prints what it says."""
    page = (Path(__file__).parents[2] / "docs" / "patterns.md").read_text()
    names: dict[str, Any] = {}
    blocks = re.findall(r"```(python|text)\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.setitem(OPS, "docs::scale", None)  # so that the rule which the page adds is taken out again
    monkeypatch.delitem(OPS, "docs::scale")
    for language, text in blocks:
        if language == "python":
            capsys.readouterr()
            exec(compile(text, "patterns.md", "exec"), names)
        else:
            assert settled(capsys.readouterr().out) == settled(text)
    assert len(blocks) == 35


def settled(text: str) -> list[str]:
    """The lines without what depends on versions of torch."""
    return [line.rstrip() for line in re.sub(r"\(\w*\.\w+:\d+\)", "(FILE:LINE)", text).strip().splitlines()]
