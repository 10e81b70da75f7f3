"""Inlining: subgraphs behind one op, which run without gradients or in autocast of their own, become part of the graph.

    inline(graph, root)
      -> wrap_with_set_grad_enabled(False, subgraph, *args)   becomes   its nodes, on detached arguments

      -> wrap_with_autocast(.., subgraph, *args)   becomes   enter, those nodes, exit: autocast inside is as the forward
         says, whatever it is around the region

Weights may meet inside as anywhere else. Detached arguments block the gradients just as well, of results and of what is
written into: a leaf takes it, and a tensor that goes on afterwards has the gradients that it had.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from ecospa_fx.passes.graph.nodes import arguments, written_arguments

aten = torch.ops.aten

_SETTINGS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}  # op -> arguments before the subgraph


def inline(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite `graph` in place; `root` holds its subgraphs."""
    for node in list(graph.nodes):
        settings = _SETTINGS.get(getattr(node.target, "__name__", ""), 0)
        with_gradients = settings == 1 and arguments(node)[0] is not False
        if not settings or with_gradients:
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
    given = dict(zip(inner.find_nodes(op="placeholder"), arguments(node)[settings + 1 :], strict=True))
    of_autocast = settings == _SETTINGS["wrap_with_autocast"]
    with graph.inserting_before(node):
        if of_autocast:
            entered = graph.call_function(_enter_autocast, arguments(node)[:settings])
            values |= given
        else:
            values |= {placeholder: _detached(graph, value) for placeholder, value in given.items()}
        results = graph.graph_copy(inner, values)
        outputs: list[Any] = list(results) if isinstance(results, (tuple, list)) else [results]
        if of_autocast:
            graph.call_function(_exit_autocast, (entered,))
    if not of_autocast:
        (returned,) = inner.find_nodes(op="output")[0].args
        made = returned if isinstance(returned, (tuple, list)) else [returned]
        same = [_written(result) for result in made]
        outputs = [given.get(origin, output) for origin, output in zip(same, outputs, strict=True)]
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(outputs[arguments(user)[1]])
            graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(outputs[0])
    graph.erase_node(node)


def _written(result: Any) -> Any:
    """Return the tensor that `result` is, not only a view of: ops that write into a tensor return that."""
    while isinstance(result, fx.Node) and isinstance(result.target, torch._ops.OpOverload):
        returned = [each.alias_info for each in result.target._schema.returns]
        if len(returned) != 1 or returned[0] is None or not returned[0].is_write:
            break
        (result,) = written_arguments(result)
    return result


def _detached(graph: fx.Graph, value: Any) -> Any:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
        return value
    detached = graph.call_function(aten.detach.default, (value,))
    detached.meta = dict(value.meta)
    return detached
