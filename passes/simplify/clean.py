"""Clean-up: removal of nodes that compute nothing: asserts, aliases, slices of everything."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx

from ecospa_fx.passes.axes.algebra import as_size
from ecospa_fx.passes.graph.boundary_op import edge

aten = torch.ops.aten


def settle(graph: fx.Graph, names: Collection[str]) -> None:
    """Write specialised sizes of inputs as numbers: tensors in objects may shrink, and would give other sizes.

    Args:
        graph: the graph to write into.
        names: the placeholders of those inputs.
    """
    for node in list(graph.nodes):
        if node.target is not aten.sym_size.int or node.args[0].name not in names:
            continue
        size = as_size(node.args[0].meta["val"].shape[node.args[1]])
        if type(size) is int:
            for user in list(node.users):
                swap = lambda arg, node=node, size=size: size if arg is node else arg  # noqa: E731
                user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), swap)
            graph.erase_node(node)


def clean(graph: fx.Graph) -> None:
    """Remove nodes that guard and record but do not compute: they cost time and would fail after a shrink."""
    for node in reversed(graph.nodes):
        name = str(node.target)
        if name.startswith(("aten._assert", "aten.sym_constrain")) or node.target is torch._check:
            graph.erase_node(node)
    for node in list(graph.nodes):
        # A view of a whole tensor only costs a dispatch. A cast to the dtype that a tensor has already stays: under
        # autocast it does cast.
        same = node.target is aten.alias.default or (node.target is aten.slice.Tensor and _whole(node))
        if same and not _written_to(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    erase_unused(graph)


def erase_unused(graph: fx.Graph) -> None:
    """Erase the ops whose results are not used, and that do nothing else."""
    for node in reversed(graph.nodes):
        if not node.users and node.op == "call_function" and _pure(node):
            graph.erase_node(node)


def _whole(node: fx.Node) -> bool:
    """Return True if a slice takes all of its dim, whatever the size."""
    start, end, step = (*node.args, *([None] * 4))[2:5]
    return start in (0, None) and end in (None, torch.iinfo(torch.int64).max) and step in (1, None)


def _written_to(node: fx.Node) -> bool:
    """Return True if an in-place op writes to this very node; then its identity matters."""
    return any(
        isinstance(user.target, torch._ops.OpOverload) and user.target._schema.is_mutable and user.args[:1] == (node,)
        for user in node.users
    )


def _pure(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return (
            node.target is not edge
            and not node.target._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in node.target.tags
        )
    return node.target is operator.getitem
