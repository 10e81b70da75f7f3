"""Clean: what a traced graph holds that is no computation, out of it."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx

from ecospa_fx.passes.axes.algebra import as_size
from ecospa_fx.passes.graph.boundary_op import edge

aten = torch.ops.aten


def settle(graph: fx.Graph, names: Collection[str]) -> None:
    """Sizes of inputs that were specialised become numbers: what objects hold may shrink, and would give others."""
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
    """Remove what guards and records but does not compute: it costs time and would fail after a shrink."""
    for node in reversed(graph.nodes):
        name = str(node.target)
        if name.startswith(("aten._assert", "aten.sym_constrain")) or node.target is torch._check:
            graph.erase_node(node)
    for node in list(graph.nodes):
        # A view of the whole only costs a dispatch. A cast to what a tensor is already stays: under autocast it is one.
        same = node.target is aten.alias.default or (node.target is aten.slice.Tensor and _whole(node))
        if same and not _written_to(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    erase_unused(graph)


def erase_unused(graph: fx.Graph) -> None:
    """Erase the ops whose results nothing takes, and that do nothing else."""
    for node in reversed(graph.nodes):
        if not node.users and node.op == "call_function" and _pure(node):
            graph.erase_node(node)


def _whole(node: fx.Node) -> bool:
    """Whether a slice takes all of its dim, whatever the size."""
    start, end, step = (*node.args, *([None] * 4))[2:5]
    return start in (0, None) and end in (None, torch.iinfo(torch.int64).max) and step in (1, None)


def _written_to(node: fx.Node) -> bool:
    """Whether an in-place op writes into this node's memory by name; then its identity matters."""
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
