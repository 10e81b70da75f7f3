"""Canonicalise: write what means the same in the same way, before axes are inferred.

    canonicalise(graph)
      -> view becomes reshape, which needs no particular layout in memory
      -> _unstack     view(x, .., n, h, d), permute, unbind   becomes   split x in n, unflatten each, permute each

What a kernel lays out so that a view of it works, another lays out in another way: attention chooses its kernel by the
sizes, which a shrink changes. And `x.contiguous()` leaves no trace in a graph where `x` happened to be.

A stacked projection keeps its n parts in one tensor until they are picked apart, so the parts would share their axes:
what is removed from the queries would have to go from the values too. Cut apart first, they are axes of their own. The
entries, their order in memory and the one matrix product that made them stay the same.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from .axes import as_size
from .nodes import arguments

aten = torch.ops.aten


def canonicalise(graph: fx.Graph) -> None:
    """Rewrite `graph` in place; every node keeps or gets its `meta["val"]`."""
    for node in list(graph.nodes):
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        if node.target in _SPLITS:
            stack = _stack(node)
            if stack is not None:
                _unstack(graph, stack)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and node.target in _REMOVABLE:
            graph.erase_node(node)


@dataclass(frozen=True, eq=False)
class _Stack:
    """A view that stacks `parts` tensors along its dim `at`, and where they are picked apart again.

    Attributes:
        view: the view node; its last `view.ndim - lead` dims come from the last dim of its argument.
        lead: dims that the view leaves as they are.
        at: the dim of the view that numbers the parts.
        order: dim `i` of the picked-apart tensor, counting `at`, is dim `order[i]` of the view.
        packed: a copy in memory order lies between; what follows may rely on it.
        picks: (node, number of the part it picks).
    """

    view: fx.Node
    lead: int
    at: int
    order: tuple[int, ...]
    packed: bool
    picks: tuple[tuple[fx.Node, int], ...]


_SPLITS = (aten.view.default, aten.reshape.default, aten.unflatten.int)
_REMOVABLE = (
    aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.unbind.int,
    aten.select.int, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim, aten.contiguous.default,
    operator.getitem,
)  # fmt: skip


def _stack(view: fx.Node) -> _Stack | None:
    before, after = _shape(arguments(view)[0]), _shape(view)
    lead = len(before) - 1
    if len(after) < lead + 2 or before[:lead] != after[:lead] or not all(type(n) is int for n in after[lead:]):
        return None
    node, packed = view, False
    order: list[int | None] = list(range(len(after)))  # None: a dim of one entry that came in between
    while len(node.users) == 1:
        (user,) = node.users
        if not _moves(user, order):
            break
        packed |= user.target is aten.contiguous.default
        node = user
    picked = _picks(node)
    if picked is None:
        return None
    dim, picks = picked
    at = order[dim % len(order)]
    # One part, or parts of single entries, have nothing to come apart.
    if at is None or None in order or at < lead or after[at] < 2 or prod(after[at + 1 :]) == 1:
        return None
    return _Stack(view, lead, at, tuple(d for d in order if d is not None), packed, picks)


def _moves(node: fx.Node, order: list[int | None]) -> bool:
    """Whether `node` only moves dims about; if so, `order` follows it."""
    match node.target:
        case aten.permute.default:
            order[:] = [order[d] for d in arguments(node)[1]]
        case aten.transpose.int:
            a, b = arguments(node)[1:]
            order[a], order[b] = order[b], order[a]
        case aten.unsqueeze.default:
            order.insert(arguments(node)[1] % (len(order) + 1), None)
        case aten.squeeze.dim if order[arguments(node)[1]] is None:
            order.pop(arguments(node)[1])
        case aten.contiguous.default:
            pass
        case _:
            return False
    return True


def _picks(node: fx.Node) -> tuple[int, tuple[tuple[fx.Node, int], ...]] | None:
    """The dim along which all users of `node` pick entries by position, and what each picks."""
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.unbind.int:
        items = list(users[0].users)
        return (*arguments(users[0]), 0)[1], tuple((item, arguments(item)[1]) for item in items)
    dims = {arguments(user)[1] for user in users if user.target is aten.select.int}
    if len(dims) != 1 or not all(user.target is aten.select.int and type(arguments(user)[2]) is int for user in users):
        return None
    (dim,) = dims
    size = _shape(node)[dim]
    return dim, tuple((user, arguments(user)[2] % size) for user in users)


def _unstack(graph: fx.Graph, stack: _Stack) -> None:
    view, at, lead = stack.view, stack.at, stack.lead
    sizes = _shape(view)
    parts, rows = sizes[at], prod(sizes[at + 1 :])
    with graph.inserting_before(view):
        base = arguments(view)[0]
        if at > lead:
            base = _call(graph, aten.unflatten.int, (base, -1, [*sizes[lead:at], parts * rows]), view)
        split = _call(graph, aten.split_with_sizes.default, (base, [rows] * parts, base.meta["val"].ndim - 1), view)
        order = [d - (d > at) for d in stack.order if d != at]
        made: dict[int, fx.Node] = {}
        for number in dict.fromkeys(number for _, number in stack.picks):
            part = _call(graph, operator.getitem, (split, number), view)
            if len(sizes) - at > 2:
                part = _call(graph, aten.unflatten.int, (part, -1, list(sizes[at + 1 :])), view)
            if order != sorted(order):
                part = _call(graph, aten.permute.default, (part, order), view)
            made[number] = _call(graph, aten.contiguous.default, (part,), view) if stack.packed else part
    for pick, number in stack.picks:
        pick.replace_all_uses_with(made[number])


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], origin: fx.Node) -> fx.Node:
    """A new node that says where it comes from and what it makes."""
    node = graph.call_function(target, args)
    node.meta = {key: value for key, value in origin.meta.items() if key in ("nn_module_stack", "stack_trace")}
    values = fx.node.map_arg(args, lambda arg: arg.meta["val"])
    mode = origin.meta["val"].fake_mode
    with mode:
        node.meta["val"] = target(*values)
    return node


def _shape(node: fx.Node) -> Sequence[Any]:
    return tuple(map(as_size, node.meta["val"].shape))
