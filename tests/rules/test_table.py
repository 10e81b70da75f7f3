"""The table against torch: every op that its functions and modules emit has a rule, or is refused with a reason."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from emitted_ops import UNTRACED, WITHOUT_OPS, emitted, public_names
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.errors import NoCouplingError
from ecospa_fx.passes.rules import OPS, op_info

LEAST = 0.98  # of the ops that torch emits


@pytest.fixture(scope="module")
def ops() -> dict[Any, set[str]]:
    with ThreadPoolExecutor(1) as thread:  # where the stack is short: torch notes it at every value that it traces
        seen, failed = thread.submit(emitted).result()
    assert set(failed) <= UNTRACED, {name: why for name, why in failed.items() if name not in UNTRACED}
    return seen


def test_all_functions_and_modules_of_torch_are_told(ops: dict[Any, set[str]]) -> None:
    """A new one in torch is a new line in `emitted_ops`, if op_db and module_db do not have it."""
    named = {name.rpartition(".")[2] for names in ops.values() for name in names}
    assert not public_names() - named - WITHOUT_OPS - UNTRACED


def test_ops_have_a_rule_or_a_reason(ops: dict[Any, set[str]]) -> None:
    without = {str(op): min(names) for op, names in ops.items() if op_info(op) is None}
    refused = [op for op in ops if (info := op_info(op)) is not None and info.refused]
    told = len(ops) - len(without)
    print(f"{len(ops)} ops: {told - len(refused)} with a rule, {len(refused)} refused, {len(without)} without")
    assert told >= LEAST * len(ops), without
    assert len(refused) <= 0.1 * len(ops)


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
