"""Taint: the values of a graph that depend on a parameter, and on a call. Only ops on the former need an axis rule."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ecospa_fx.passes.graph.nodes import memory_behind, written_arguments
from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.ir.relations import Pointwise
from ecospa_fx.passes.rules import relation_of


def weighted_nodes(captured: RegionGraph) -> set[fx.Node]:
    """Return the nodes that depend on a parameter, by data flow or by a write into memory that they are a view of."""
    weighted: set[fx.Node] = set()
    given = given_nodes(captured)

    def direct(node: fx.Node) -> bool:
        return any(arg in weighted for arg in node.all_input_nodes)

    output = next(node for node in reversed(captured.graph.nodes) if node.op == "output")
    assigned = {
        place.full_name: node
        for place, node in zip(captured.assigned, captured.assigned_among(output.args[0]), strict=True)
    }
    before = -1
    while before != len(weighted):
        before = len(weighted)
        for node in captured.graph.nodes:
            if node.op == "placeholder":
                if (
                    node.name in captured.parameters
                    or bool(captured.border.dims_of(captured.arguments.get(node.name, "")))
                    or _is_state(node, captured)
                    or assigned.get(captured.tensors.get(node.name, "")) in weighted
                    or (node.users and captured.tensors.get(node.name) in captured.moving)
                    or (node.name in captured.tensors and _follows_parameters(node, weighted, given))
                ):
                    weighted.add(node)
            # The size of a tensor that depends on parameters does not itself depend on them.
            elif node.op != "get_attr" and node.target is not torch.ops.aten.sym_size.int and direct(node):
                weighted.add(node)
                weighted.update(made for value in written_arguments(node) for made in memory_behind(value))
    return weighted


def _is_state(node: fx.Node, captured: RegionGraph) -> bool:
    """Return whether a placeholder is a tensor in an object, made of parameters in an earlier call."""
    return node.name in captured.state and node.meta["val"].is_floating_point() and node.meta["val"].ndim > 0


def _follows_parameters(buffer: fx.Node, weighted: set[fx.Node], given: set[fx.Node]) -> bool:
    """Return whether a buffer is used like a parameter (a batch norm's statistics) and so shrinks with them."""
    val = buffer.meta["val"]
    if not val.ndim or not buffer.users:
        return False
    if val.is_floating_point() and all(user in weighted for user in buffer.users):
        return True
    # A mask of weights may be one of booleans, or be cast or compared first.
    uses = list(_uses(buffer, weighted))
    of_weights = all(user in weighted and not any(arg in given for arg in user.all_input_nodes) for user in uses)
    return bool(of_weights and (val.is_floating_point() or val.dtype is torch.bool))


def _uses(node: fx.Node, weighted: set[fx.Node]) -> Iterator[fx.Node]:
    """Yield the ops that take a value, or what others that see no weight make of it entry by entry."""
    for user in node.users:
        if user.op == "call_function" and user not in weighted and isinstance(relation_of(user), Pointwise):
            yield from _uses(user, weighted)
        else:
            yield user


def given_nodes(captured: RegionGraph) -> set[fx.Node]:
    """Return the nodes whose values depend on the tensors of a call."""
    given: set[fx.Node] = set()
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            if node.name in captured.inputs:
                given.add(node)
        elif node.target is not torch.ops.aten.sym_size.int and any(arg in given for arg in node.all_input_nodes):
            given.add(node)
            given.update(made for value in written_arguments(node) for made in memory_behind(value))
    return given
