"""Inline: parts of a graph that run without gradients, as a subgraph behind one op, become part of the graph.

    inline(graph, root)
      -> wrap_with_set_grad_enabled(False, subgraph, *args)   becomes   the nodes of the subgraph, results detached

Weights may meet in there as anywhere else. Detaching what comes out blocks the gradients just as well.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .nodes import arguments

aten = torch.ops.aten


def inline(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite `graph` in place; `root` holds its subgraphs."""
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") != "wrap_with_set_grad_enabled" or arguments(node)[0] is not False:
            continue
        held = arguments(node)[1]
        inner: Any = getattr(root, held.target)
        if any(n.op in ("get_attr", "call_module") for n in inner.graph.nodes):
            continue
        _replace(graph, node, inner.graph)
        if not held.users:
            graph.erase_node(held)


def _replace(graph: fx.Graph, node: fx.Node, inner: fx.Graph) -> None:
    values: dict[fx.Node, Any] = {}
    for placeholder, value in zip(inner.find_nodes(op="placeholder"), arguments(node)[2:], strict=True):
        values[placeholder] = value
    with graph.inserting_before(node):
        results = graph.graph_copy(inner, values)
        outputs = [
            _detached(graph, result) for result in (results if isinstance(results, (tuple, list)) else [results])
        ]
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(outputs[arguments(user)[1]])
            graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(outputs[0])
    graph.erase_node(node)


def _detached(graph: fx.Graph, result: Any) -> Any:
    if not isinstance(result, fx.Node) or not isinstance(result.meta.get("val"), Tensor):
        return result
    detached = graph.call_function(aten.detach.default, (result,))
    detached.meta = dict(result.meta)
    return detached
