"""Inlining: subgraphs behind one op, which run without gradients or autocast, become part of the graph around them.

    inline(graph, root)
      -> wrap_with_set_grad_enabled(False, subgraph, *args)   becomes   the nodes of the subgraph, results detached

      -> wrap_with_autocast(.., False, .., subgraph, *args)   becomes   enter, those nodes, exit: autocast that is on
         around the region stays off inside

Weights may meet inside as anywhere else. Detaching the results blocks the gradients just as well.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from ecospa_fx.passes.graph.nodes import arguments

aten = torch.ops.aten

# Op -> the number of arguments before the subgraph, and the index of the one that turns the setting on or off.
_SETTINGS = {"wrap_with_set_grad_enabled": (1, 0), "wrap_with_autocast": (4, 2)}


def inline(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite `graph` in place; `root` holds its subgraphs."""
    for node in list(graph.nodes):
        settings, flag = _SETTINGS.get(getattr(node.target, "__name__", ""), (0, 0))
        if not settings or arguments(node)[flag] is not False:
            continue
        subgraph = arguments(node)[settings]
        inner: Any = getattr(root, subgraph.target)
        if any(n.op in ("get_attr", "call_module") for n in inner.graph.nodes):
            continue
        _replace(graph, node, inner.graph, settings)
        if not subgraph.users:
            graph.erase_node(subgraph)


def _replace(graph: fx.Graph, node: fx.Node, inner: fx.Graph, settings: int) -> None:
    values: dict[fx.Node, Any] = {}
    for placeholder, value in zip(inner.find_nodes(op="placeholder"), arguments(node)[settings + 1 :], strict=True):
        values[placeholder] = value
    without_autocast = settings == _SETTINGS["wrap_with_autocast"][0]
    with graph.inserting_before(node):
        if without_autocast:
            entered = graph.call_function(_enter_autocast, arguments(node)[:settings])
        results = graph.graph_copy(inner, values)
        outputs: list[Any] = list(results) if isinstance(results, (tuple, list)) else [results]
        if without_autocast:
            graph.call_function(_exit_autocast, (entered,))
        else:
            outputs = [_detached(graph, result) for result in outputs]
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
