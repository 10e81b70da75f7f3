"""Out arguments: ops that write results into tensors that they are given become the op itself, and a copy of these.

div.out(x, 2, out=n)   becomes   copy_(n, div(x, 2))
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ecospa_fx.passes.axes.algebra import as_size
from ecospa_fx.passes.graph.nodes import may_draw

aten = torch.ops.aten


def free_of_out(graph: fx.Graph, call: Callable[..., fx.Node]) -> None:
    """Rewrite `graph` in place.

    Args:
        graph: an ATen graph.
        call: adds a node, see `canonicalise`.
    """
    for node in list(graph.nodes):
        names = _out_names(node.target)
        plain = _without_out(node.target, names) if names else None
        if plain is not None:
            _replace(graph, node, plain, names, call)


def _out_names(op: Any) -> list[str]:
    """Return the names of the out arguments of an op, which may only be given by name."""
    if not isinstance(op, torch._ops.OpOverload) or may_draw(op):
        return []
    return [argument.name for argument in op._schema.arguments if argument.is_out]


def _without_out(op: Any, names: list[str]) -> Any:
    """Find the op that takes the same arguments but for these; None if there is none."""
    packet = op.overloadpacket
    wanted = _arguments(op, names)
    for overload in (getattr(packet, name) for name in packet.overloads()):
        if not overload._schema.is_mutable and _arguments(overload) == wanted:
            return overload
    return None


def _arguments(op: Any, without: list[str] | tuple[()] = ()) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in op._schema.arguments if a.name not in without]


def _replace(graph: fx.Graph, node: fx.Node, plain: Any, names: list[str], call: Callable[..., fx.Node]) -> None:
    outs: list[Any] = [node.kwargs[name] for name in names]
    kwargs = {key: value for key, value in node.kwargs.items() if key not in names}
    with graph.inserting_before(node):
        results = call(graph, plain, node.args, node, kwargs)
        made = [results]
        if len(names) > 1:
            made = [call(graph, operator.getitem, (results, i), node) for i in range(len(names))]
        if any(_shape(out) != _shape(result) for out, result in zip(outs, made, strict=True)):
            for each in (*reversed(made), results) if len(names) > 1 else made:  # it gives its tensor another size
                graph.erase_node(each)
            return
        copies = [call(graph, aten.copy_.default, (out, result), node) for out, result in zip(outs, made, strict=True)]
    if len(names) > 1:
        for user in list(node.users):
            number: Any = user.args[1]
            user.replace_all_uses_with(copies[number])
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(copies[0])
    graph.erase_node(node)


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(map(as_size, node.meta["val"].shape))
