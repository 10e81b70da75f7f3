"""Watch: a program that also returns values inside it, of which scores of activations are made.

    watch(program, kept, region, nodes, taps) -> a call of the region that returns the values of `nodes` as well

A `Tap` sees a value on its way to some ops only, and in backward the gradient that comes from these. The code is
generated anew with both, so a call that nobody watches costs nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from ecospa_fx.passes.axes.selection import Selection

from .program import Program
from .rewrite import Tap, rewrite

Watched = Callable[[nn.Module, Sequence[Tensor]], tuple[Any, tuple[Tensor, ...]]]


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
        `call(region, inputs)` -> the results of the program, and the values of `nodes`, detached.
    """
    watching = rewrite(program.axis_facts, kept, region, watched=nodes, taps=taps)

    def call(module: nn.Module, inputs: Sequence[Any]) -> tuple[Any, tuple[Tensor, ...]]:
        tensors = watching.run(module, *inputs, *watching.constants_now(module))
        count = len(tensors) - len(nodes)
        return watching.returned(module, inputs, tensors[:count]), tuple(value.detach() for value in tensors[count:])

    return call
