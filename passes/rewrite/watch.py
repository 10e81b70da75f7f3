"""Watch: run a program and look at values inside it, which is what scores of activations are made of.

    watch(program, kept, region, nodes) -> a function like `program.run` that returns the values of `nodes` as well

The code is generated anew with these values among its outputs, so that nothing is paid for where nobody watches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from ecospa_fx.passes.axes.selection import Selection

from .program import Program
from .rewrite import rewrite

Watched = Callable[[nn.Module, Sequence[Tensor]], tuple[Any, tuple[Tensor, ...]]]


def watch(program: Program, kept: Selection, region: nn.Module, nodes: Sequence[fx.Node]) -> Watched:
    """A call of the region that also returns what `nodes` of its captured graph came to.

    Args:
        program: what serves the call.
        kept: what the program keeps of each atom.
        region: the live region.
        nodes: of `program.captured.graph`.

    Returns:
        `call(region, inputs)` -> what the program returns, and the values of `nodes`, detached.
    """
    seeing = rewrite(program.axis_facts, kept, region, watched=nodes)

    def call(module: nn.Module, inputs: Sequence[Any]) -> tuple[Any, tuple[Tensor, ...]]:
        tensors = seeing.run(module, *inputs, *seeing.constants)
        count = len(tensors) - len(nodes)
        return seeing.returned(module, inputs, tensors[:count]), tuple(value.detach() for value in tensors[count:])

    return call
