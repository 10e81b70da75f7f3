"""Sizes that differ between calls: what an op cannot do with one leaves the other axes alone, and is told in words."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecospa_fx.passes.axes.algebra import atoms_of
from ecospa_fx.passes.capture.capture import capture
from ecospa_fx.passes.infer.infer import infer_axes

DYNAMIC: dict[str, Callable[[Tensor], Tensor]] = {
    "every second token": lambda x: x[:, ::2],
    "every second but the last": lambda x: x[:, :-1:2],
    "every third sample, every second token": lambda x: x[1::3, ::2],
    "even and odd tokens": lambda x: x[:, :-1:2] + x[:, 1::2],
    "a gate along time": lambda x: F.glu(torch.cat([x, x], 1), 1),
    "a grid of tokens, every second": lambda x: x.view(-1, 3, 3, 8)[:, ::2, ::2].flatten(1, 2),
    "every second row of a flat batch": lambda x: x.reshape(-1, 8)[::2],
    "repeated and cut": lambda x: x[:, ::2].repeat_interleave(2, 1)[:, : x.shape[1]],
    "parted": lambda x: x[:, ::2].chunk(2, 1)[0],
    "sections": lambda x: x.tensor_split(2, 1)[1],
}


class Between(nn.Module):
    """Two linears, and an op on the tokens between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.function, self.second = nn.Linear(6, 8), function, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(torch.relu(self.first(x))))


@pytest.mark.parametrize("function", DYNAMIC.values(), ids=DYNAMIC)
def test_an_op_on_a_dynamic_dim_leaves_the_others_alone(function: Callable[[Tensor], Tensor]) -> None:
    facts = infer_axes(capture(Between(function), (torch.randn(4, 9, 6),), {}))
    (columns,) = (set(atoms_of(facts.parameters["first.weight"][0])),)
    pinned = [fact for fact in facts.facts if fact.role == "pinned"]
    assert not columns & {atom for fact in pinned for atom in atoms_of(fact.expr)}
    assert not [fact.reason for fact in pinned if re.search(r"\bs\d+\b", fact.reason)]
