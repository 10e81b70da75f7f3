"""Layout: ops that need their operand in a certain order in memory, freed from what one kernel happened to give.

    free_of_layout(graph, written)
      -> view, view_as                           become   reshape, reshape_as
      -> view_as_complex(x), as_strided(x, ..)   become   the same of `x` in order, which is `x` itself as a rule

Another kernel gives its result another layout: attention chooses its kernel by the sizes, which a shrink changes, and a
slice of a shrunk projection begins elsewhere. Neither does `x.contiguous()` leave a trace in a graph where `x` happened
to be contiguous. Memory that is written into through a view must stay one: its maker's result is put in order instead.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from ecospa_fx.passes.graph.nodes import arguments, is_tensor, memory_behind

aten = torch.ops.aten

_RESHAPES = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}
_ORDERED = (aten.view_as_complex.default, aten.view.dtype, aten.as_strided.default)


def free_of_layout(graph: fx.Graph, written: Collection[fx.Node]) -> None:
    """Rewrite `graph` in place.

    Args:
        graph: an ATen graph.
        written: nodes whose memory some op writes into.
    """
    in_order: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.target not in _RESHAPES and node.target not in _ORDERED:
            continue
        shared = node in written
        operand = [made for made in memory_behind(node) if is_tensor(made)][-1] if shared else arguments(node)[0]
        order = _order(operand)
        if shared and operand is not node and operand not in in_order and order is not None:
            copies = _in_order(graph, operand, order)
            for user in list(operand.users):
                if user is not copies[0]:
                    user.replace_input_with(operand, copies[-1])
            in_order |= {operand, *copies}
        elif node.target in _ORDERED and not shared:
            if order is None and node.target is aten.view_as_complex.default:
                order = list(range(len(operand.meta["val"].shape)))
            if order is not None:  # else memory with gaps or repetitions, which is read as it lies
                node.replace_input_with(operand, _in_order(graph, operand, order)[-1])
        node.target = _RESHAPES.get(node.target, node.target)


def _order(node: fx.Node) -> list[int] | None:
    """Return the dims from the outermost in memory to the innermost; None where entries do not lie side by side."""
    val = node.meta["val"]
    sizes, strides = (
        [getattr(getattr(n, "node", None), "hint", n) for n in numbers] for numbers in (val.shape, val.stride())
    )
    if None in sizes or None in strides:  # depends on data
        return None
    order = sorted(range(val.ndim), key=lambda dim: (-strides[dim], sizes[dim] == 1))
    step = 1
    for dim in reversed(order):
        if sizes[dim] != 1 and strides[dim] != step:
            return None
        step *= sizes[dim]
    return order


def _in_order(graph: fx.Graph, node: fx.Node, order: list[int]) -> list[fx.Node]:
    """Add copies of `node` behind it, the last one in this order; at a call that is `node` itself if it is."""
    val: Any = node.meta["val"]
    steps: list[tuple[Any, tuple[Any, ...]]] = [(aten.contiguous.default, ())]
    if order != sorted(order):
        back = sorted(range(len(order)), key=order.__getitem__)
        steps = [(aten.permute.default, (order,)), *steps, (aten.permute.default, (back,))]
    made = [node]
    for target, rest in steps:
        with graph.inserting_after(made[-1]), val.fake_mode:
            copy = graph.call_function(target, (made[-1], *rest))
            copy.meta = {**node.meta, "val": target(made[-1].meta["val"], *rest)}
        made.append(copy)
    return made[1:]
