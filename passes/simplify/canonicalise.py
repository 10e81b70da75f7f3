"""Canonical form: one spelling for ops that mean the same, before axes are inferred.

    canonicalise(graph, constants)
      -> free_of_out     `out_arguments.py`: results are copied into the tensors that are given for them
      -> free_of_layout  `layout.py`: view becomes reshape, which needs no particular layout in memory
      -> _as_slice    x[..., [-2], :] with constants   becomes   a slice, copied
      -> _unstack     view(x, .., n, h, d), permute, unbind   becomes   split x in n, unflatten each, permute each

A stacked projection keeps its n parts in one tensor until they are picked apart, so the parts would share their axes:
entries removed from the queries would have to go from the values too. Split first, the parts have axes of their own.
The entries, their order in memory and the one matrix product that made them stay the same. Parts may be several entries
wide, too: all heads of the queries, then one of the keys, then one of the values.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ecospa_fx.passes.axes.algebra import as_size
from ecospa_fx.passes.graph.nodes import arguments, is_tensor, memory_behind, tensors_of, written_arguments
from ecospa_fx.passes.ir.relations import Permuted, Picked, Regrouped, Sliced, copied_operand
from ecospa_fx.passes.rules import relation_of

from .clean import erase_unused
from .layout import free_of_layout
from .out_arguments import free_of_out
from .unit_dims import dims_before

aten = torch.ops.aten


def canonicalise(graph: fx.Graph, constants: Mapping[str, Any]) -> None:
    """Rewrite `graph` in place; every node keeps or gets its `meta["val"]`.

    Args:
        graph: an ATen graph.
        constants: the tensors that are part of it, by the name of the node that stands for each.
    """
    free_of_out(graph, _call)
    for node in list(graph.nodes):
        if node.target is aten.index.Tensor:
            _as_slice(graph, node, constants)
    # Parts of a split may not be written into: what someone writes into stays as it is.
    written = {made for node in graph.nodes for arg in written_arguments(node) for made in memory_behind(arg)}
    free_of_layout(graph, written)
    for node in list(graph.nodes):
        stack = _stack(node) if node not in written else None
        if stack is not None:
            _unstack(graph, stack)
    erase_unused(graph)


def _as_slice(graph: fx.Graph, node: fx.Node, constants: Mapping[str, Any]) -> None:
    """Turn an index by consecutive constants into a slice, copied as an index is: an op may write to the result."""
    x, indices = arguments(node)
    chosen = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(chosen) != 1:
        return
    dim, index = chosen[0]
    values, size = _constant(index, constants), _shape(x)[dim]
    if values is None or type(size) is not int or not 0 < values.numel() <= size:
        return
    places = [value % size for value in values.tolist()]
    if places != list(range(places[0], places[0] + len(places))):
        return
    with graph.inserting_before(node):
        part = _call(graph, aten.slice.Tensor, (x, dim, places[0], places[0] + len(places)), node)
        copy = _call(graph, aten.clone.default, (part,), node)
    node.replace_all_uses_with(copy)
    graph.erase_node(node)


def _constant(node: fx.Node, constants: Mapping[str, Any]) -> Tensor | None:
    """Return the row of integers that `node` always is, or None."""
    while True:
        if any(node in written_arguments(user) for user in node.users):
            return None
        copied = copied_operand(relation_of(node))
        if copied is None:
            break
        node = copied.node
    value = constants.get(node.name)
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor) or value.is_meta:
        return None
    return value if value.ndim == 1 and value.dtype in (torch.int32, torch.int64) else None


@dataclass(frozen=True, eq=False)
class _Pick:
    """A pick from a stack by `node`: entries `start` to `stop`; `one`: a single entry, without the dim for it."""

    node: fx.Node
    start: int
    stop: int
    one: bool


@dataclass(frozen=True, eq=False)
class _Stack:
    """A view that stacks tensors along its dim `at`, and the picks that take them apart again.

    Attributes:
        view: the view node; its last `view.ndim - lead` dims come from the last dim of its argument.
        lead: dims that the view leaves as they are.
        at: the dim of the view that numbers the parts.
        order: dim `i` of the tensor that is picked apart, counting `at`, is dim `order[i]` of the view.
        packed: a copy in memory order lies between; later ops may rely on it.
        picks: the ops that pick the parts.
    """

    view: fx.Node
    lead: int
    at: int
    order: tuple[int, ...]
    packed: bool
    picks: tuple[_Pick, ...]


def _stack(view: fx.Node) -> _Stack | None:
    if view.op != "call_function" or not is_tensor(view) or len(tensors_of(view)) != 1:
        return None
    (x,) = tensors_of(view)
    before, after = _shape(x), _shape(view)
    lead = len(before) - 1
    if len(after) < lead + 2 or before[:lead] != after[:lead] or not all(type(n) is int for n in after[lead:]):
        return None
    if not isinstance(relation_of(view), Regrouped):
        return None
    node, packed = view, False
    order: list[int | None] = list(range(len(after)))  # None: a dim of one entry that was inserted in between
    while len(node.users) == 1:
        (user,) = node.users
        if not _moves(user, order):
            break
        packed |= user.target is aten.contiguous.default
        node = user
    dim_and_picks = _picks(node)
    if dim_and_picks is None:
        return None
    dim, picks = dim_and_picks
    at = order[dim % len(order)]
    # One part, or parts of single entries, need no split.
    undivided = all(pick.stop - pick.start == after[at] for pick in picks) if at is not None else True
    if at is None or undivided or None in order or at < lead or after[at] < 2 or prod(after[at + 1 :]) == 1:
        return None
    return _Stack(view, lead, at, tuple(d for d in order if d is not None), packed, picks)


def _moves(node: fx.Node, order: list[int | None]) -> bool:
    """Return True if `node` only moves dims, after applying its move to `order`."""
    match relation_of(node):
        case Permuted(order=places):
            order[:] = [order[d] for d in places]
        case Regrouped(x):
            before = dims_before(x.shape, _shape(node))
            if before is None:
                return False
            after = [None if d is None else order[d] for d in before]
            # Dims of one entry are interchangeable: one of the view's own takes the place of one that came in.
            for d in sorted({*range(x.ndim)} - {*before}):
                if order[d] is not None:
                    if None not in after:
                        return False
                    after[after.index(None)] = order[d]
            order[:] = after
        case _:
            return node.target is aten.contiguous.default
    return True


def _picks(node: fx.Node) -> tuple[int, tuple[_Pick, ...]] | None:
    """Return the dim along which all users of `node` pick entries by position, and their picks, or None."""
    users = [(user, relation_of(user)) for user in node.users]
    match users:
        case [(user, Picked(dim=dim, index=None))]:
            numbers = [(item, arguments(item)[1]) for item in user.users]
            return dim, tuple(_Pick(item, i, i + 1, True) for item, i in numbers)
    picks, dims = [], set()
    for user, relation in users:
        match relation:
            case Picked(x, dim, int(index)):
                picks.append(_Pick(user, index % x.shape[dim], index % x.shape[dim] + 1, True))
            case Sliced(_, dim, int(start), int(stop), 1) if start < stop:
                picks.append(_Pick(user, start, stop, False))
            case _:
                return None
        dims.add(dim)
    if len(dims) != 1 or type(_shape(node)[min(dims)]) is not int:
        return None
    return (min(dims), tuple(picks)) if _apart(picks) else None


def _apart(picks: Sequence[_Pick]) -> bool:
    """Return True if any two picks share either none of their entries or all of them."""
    spans = sorted({(pick.start, pick.stop) for pick in picks})
    return all(stop <= start for (_, stop), (start, _) in pairwise(spans))


def _pieces(spans: set[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Yield pieces of `size` entries, cut where one of the `spans` starts or stops."""
    yield from pairwise(sorted({0, size, *(bound for span in spans for bound in span)}))


def _unstack(graph: fx.Graph, stack: _Stack) -> None:
    view, at, lead = stack.view, stack.at, stack.lead
    sizes = _shape(view)
    parts, rows = sizes[at], prod(sizes[at + 1 :])
    pieces = list(_pieces({(pick.start, pick.stop) for pick in stack.picks}, parts))
    with graph.inserting_before(view):
        base = arguments(view)[0]
        if at > lead:
            base = _call(graph, aten.unflatten.int, (base, -1, [*sizes[lead:at], parts * rows]), view)
        widths = [rows * (stop - start) for start, stop in pieces]
        split = _call(graph, aten.split_with_sizes.default, (base, widths, base.meta["val"].ndim - 1), view)
        results: dict[tuple[int, int, bool], fx.Node] = {}
        for pick in stack.picks:
            key = pick.start, pick.stop, pick.one
            if key in results:
                continue
            part = _call(graph, operator.getitem, (split, pieces.index(key[:2])), view)
            inner = [*([] if pick.one else [pick.stop - pick.start]), *sizes[at + 1 :]]
            if len(inner) > 1:
                part = _call(graph, aten.unflatten.int, (part, -1, inner), view)
            order = [d - (pick.one and d > at) for d in stack.order if not (pick.one and d == at)]
            if order != sorted(order):
                part = _call(graph, aten.permute.default, (part, order), view)
            results[key] = _call(graph, aten.contiguous.default, (part,), view) if stack.packed else part
    for pick in stack.picks:
        pick.node.replace_all_uses_with(results[pick.start, pick.stop, pick.one])


def _call(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], origin: fx.Node, kwargs: Mapping[str, Any] | None = None
) -> fx.Node:
    """Add a call to the graph, with the source line of `origin` and its own `meta["val"]`."""
    node = graph.call_function(target, args, dict(kwargs or {}))
    node.meta = {key: value for key, value in origin.meta.items() if key in ("nn_module_stack", "stack_trace")}
    values, named = fx.node.map_arg((args, dict(kwargs or {})), lambda arg: arg.meta["val"])
    val = origin.meta["val"]
    with (val[0] if isinstance(val, (tuple, list)) else val).fake_mode:
        node.meta["val"] = target(*values, **named)
    return node


def _shape(node: fx.Node) -> Sequence[Any]:
    return tuple(map(as_size, node.meta["val"].shape))
