"""The table against torch: every op that its functions and modules emit has a rule, or is refused with a reason."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sympy
import torch
from emitted_ops import UNTRACED, WITHOUT_OPS, Seen, emitted, public_names
from torch import Tensor, fx, nn

import ecospa_fx
from ecospa_fx.errors import NoCouplingError
from ecospa_fx.passes.axes.algebra import UNIT
from ecospa_fx.passes.ir.relations import Operand
from ecospa_fx.passes.rules import OPS, op_info

LEAST = 0.98  # of the ops that torch emits


@pytest.fixture(scope="module")
def ops() -> dict[Any, Seen]:
    with ThreadPoolExecutor(1) as thread:  # where the stack is short: torch notes it at every value that it traces
        seen, failed = thread.submit(emitted).result()
    assert set(failed) <= UNTRACED, {name: why for name, why in failed.items() if name not in UNTRACED}
    return seen


def test_all_functions_and_modules_of_torch_are_told(ops: dict[Any, Seen]) -> None:
    """A new one in torch is a new line in `emitted_ops`, if op_db and module_db do not have it."""
    named = {name.rpartition(".")[2] for seen in ops.values() for name in seen.names}
    assert not public_names() - named - WITHOUT_OPS - UNTRACED


def test_ops_have_a_rule_or_a_reason(ops: dict[Any, Seen]) -> None:
    without = {str(op): min(seen.names) for op, seen in ops.items() if op_info(op) is None}
    refused = [op for op in ops if (info := op_info(op)) is not None and info.refused]
    told = len(ops) - len(without)
    print(f"{len(ops)} ops: {told - len(refused)} with a rule, {len(refused)} refused, {len(without)} without")
    assert told >= LEAST * len(ops), without
    assert len(refused) <= 0.1 * len(ops)


@pytest.mark.parametrize("what", ["sizes", "numbers", "both"])
def test_rules_take_symbols_for_numbers(ops: dict[Any, Seen], what: str) -> None:
    """Sizes, and whatever an op takes as a size, may be dynamic: a rule cannot compare them as numbers."""
    broken = {}
    for op, seen in ops.items():
        info = op_info(op)
        for node in seen.nodes if info is not None else ():
            args, kwargs = with_symbols(node, what)
            try:
                info.axes(*args, **kwargs)
            except Exception as error:  # every one of them is a bug in the rule
                broken[str(op)] = f"{info.axes.__name__}: {type(error).__name__}: {error}"
    assert not broken


def with_symbols(node: fx.Node, what: str) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a call as a rule sees them, with symbols for sizes of tensors, for numbers, or both."""

    def size(number: int) -> Any:
        return sympy.Symbol(f"s{number}", positive=True, integer=True) if number > 1 else number

    def argument(value: Any, sized: bool) -> Any:
        if isinstance(value, fx.Node):
            shape = tuple(map(size, value.meta["val"].shape)) if what != "numbers" else tuple(value.meta["val"].shape)
            return Operand(tuple(UNIT for _ in shape), shape, value, True)
        if isinstance(value, (list, tuple)):
            return [argument(item, sized) for item in value]
        return size(value) if sized and type(value) is int and what != "sizes" else value

    schema = node.target._schema.arguments
    sized = {a.name: "SymInt" in str(a.real_type) for a in schema}
    args = [argument(value, sized[a.name]) for a, value in zip(schema, node.args, strict=False)]
    return args, {name: argument(value, sized[name]) for name, value in node.kwargs.items()}


def test_a_rule_says_why_in_a_sentence() -> None:
    """The reason is read behind the name of the op: it starts with a capital letter and is one line."""
    for op, info in OPS.items():
        if info.axes.__name__ != "<lambda>":
            assert info.why[:1].isupper() or info.why[:1] in "`1", f"{op}: {info.why!r}"
            assert len(info.why) < 120 and info.why[-1] not in ".:", f"{op}: {info.why!r}"


class Watched(nn.Module):
    """Two weights, and an op that is refused on what lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) * torch.block_diag(y, y).sum()


def test_a_refusal_on_purpose_reaches_who_asks() -> None:
    with pytest.raises(NoCouplingError) as refusal:
        ecospa_fx.compile(Watched(), example_inputs=(torch.randn(2, 4),))
    assert "aten.block_diag: each entry of the result stands for a pair of entries, or for none" in str(refusal.value)
