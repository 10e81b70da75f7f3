"""Uniform: tensors that the model's own Python makes between regions, equal along a dim, so that fewer entries follow.

A tensor of zeros into which something is scattered, an index repeated along channels: what is left of it after a shrink
has the values of a smaller one. `joints_tried.py` tries whether the Python makes it smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

FILLED = (aten.zeros, aten.ones, aten.full, aten.new_zeros, aten.new_ones, aten.new_full)
"""Ops that return a tensor of one value; their sizes are a list among the arguments."""


def is_filled(target: Any) -> bool:
    """Return whether an op makes a tensor of one value."""
    return isinstance(target, torch._ops.OpOverload) and target.overloadpacket in FILLED


def is_uniform(node: fx.Node, dim: int) -> bool:
    """Return whether the entries of a node's value along a dim are equal.

    A node with several users counts as not: one of them may write into it.
    """
    if node.op != "call_function" or len(node.users) > 1:
        return False
    if is_filled(node.target):
        return True
    return node.target is aten.expand.default and tuple(node.args[0].meta["val"].shape)[dim : dim + 1] == (1,)  # type: ignore[union-attr]


def with_sizes(node: fx.Node, before: Sequence[int], after: Sequence[int]) -> None:
    """Change the sizes in the arguments of such a node."""

    def changed(argument: Any) -> Any:
        is_sizes = isinstance(argument, (list, tuple)) and list(argument) == list(before)
        return list(after) if is_sizes else argument

    node.args = tuple(changed(argument) for argument in node.args)
