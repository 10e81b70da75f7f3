"""Watch: a program that also returns values inside it, of which scores of activations are made.

    watch(program, kept, region, nodes, taps) -> a call of the region that returns the values of `nodes` as well

A `Tap` sees a value on its way to some ops only, and in backward the gradient that comes from these. The code is
generated anew with both, so a call that nobody watches costs nothing more.

A call that `computes_again` holds what goes in and no value inside it for backward, which computes them again
(activation checkpointing, Chen et al. 2016, arXiv 1604.06174). Taps then see values twice, and each gradient once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from ecospa_fx.passes.axes.selection import Selection
from ecospa_fx.passes.graph.nodes import memory_root, written_arguments

from .program import Program
from .rewrite import Tap, rewrite


class Watched(Protocol):
    """A call of a region that also returns values inside it."""

    def __call__(
        self, module: nn.Module, inputs: Sequence[Any], computes_again: bool = False
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """Run it."""


def watch(
    program: Program, kept: Selection, region: nn.Module, nodes: Sequence[fx.Node], taps: Sequence[Tap] = ()
) -> Watched:
    """Make a call of the region that also returns the values of `nodes` of its captured graph.

    Args:
        program: the program that serves the call.
        kept: the entries of each atom that the program keeps.
        region: the live region.
        nodes: nodes of `program.captured.graph`.
        taps: functions between its nodes.

    Returns:
        `call(region, inputs, computes_again)` -> the results of the program, and the values of `nodes`, detached. A
        graph that writes to what comes in does not compute anything again, nor does a call without gradients.
    """
    watching = rewrite(program.axis_facts, kept, region, watched=nodes, taps=taps)
    written = (memory_root(value) for node in program.captured.graph.nodes for value in written_arguments(node))
    repeatable = not program.captured.carried.calls and all(root.op == "call_function" for root in written)

    def call(module: nn.Module, inputs: Sequence[Any], computes_again: bool = False) -> tuple[Any, tuple[Tensor, ...]]:
        if computes_again and repeatable and torch.is_grad_enabled():
            given = module, *inputs, *watching.constants_now(module)
            tensors = checkpoint(watching.run, *given, use_reentrant=False)
        else:
            tensors = watching.tensors(module, inputs)
        count = len(tensors) - len(nodes)
        return watching.returned(module, inputs, tensors[:count]), tuple(value.detach() for value in tensors[count:])

    return call
