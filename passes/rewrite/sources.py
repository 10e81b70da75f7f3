"""Sources: values that depend on no parameter, index-selected where they are used to what a plan leaves.

    select_sources(graph, axis_facts, kept, new)
      -> index_select     a dim that keeps the same entries everywhere, or that carries its context itself
      -> index            a dim that keeps other entries in each context: picked together with the context's dim,
                          which a source that lacks it (a rotary table has no heads) gets here

Each use is selected on its own: a table that all layers share does not tie their axes. An `arange` that positions along
an axis are compared with counts what is left.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from ecospa_fx.passes.axes.algebra import UNIT, Atom, Expr, atoms_of, size_of
from ecospa_fx.passes.axes.selection import PerContext, Selection, in_context, index_of, mask_of, static_end, touched
from ecospa_fx.passes.infer.contexts import covers
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Source

aten = torch.ops.aten


def select_sources(
    graph: fx.Graph,
    axis_facts: AxisFacts,
    kept: Selection,
    new: dict[fx.Node, fx.Node],
    left_out: Collection[fx.Node] = (),
) -> dict[fx.Node, Any]:
    """Index-select every use of a source whose axes have lost entries.

    Args:
        graph: the copy of the captured graph to write into.
        axis_facts: axes of the captured graph.
        kept: the entries of each atom that stay.
        new: node of the captured graph -> node of the copy.
        left_out: nodes whose results are known without the ops.

    Returns:
        Placeholder that was added -> its index tensor.
    """
    selector = _Selector(graph, axis_facts, kept)
    for source in axis_facts.sources:
        if source.user in left_out or not any(touched(expr, kept) for expr in source.exprs):
            continue
        user = new[source.user]
        with graph.inserting_before(user):
            node = selector.select(source, new[source.node])
        numbers = itertools.count()
        swap = lambda old, node=node, numbers=numbers: node if next(numbers) == source.occurrence else old  # noqa: E731, B023
        user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), swap)
    return selector.constants


class _Selector:
    def __init__(self, graph: fx.Graph, axis_facts: AxisFacts, kept: Selection) -> None:
        self.graph, self.axis_facts, self.kept = graph, axis_facts, kept
        self.constants: dict[fx.Node, Any] = {}
        self._placeholders: dict[tuple[Any, ...], fx.Node] = {}

    def select(self, source: Source, node: fx.Node) -> fx.Node:
        """Select from `node`, the value of a source, the entries that one use of it needs."""
        device = source.node.meta["val"].device
        exprs = list(source.exprs)
        per_context = [dim for dim, expr in enumerate(exprs) if self._foreign(expr) is not None]
        for dim, expr in enumerate(exprs):
            if dim not in per_context and touched(expr, self.kept):
                node = self._select_dim(node, dim, expr, device)
        if source.places is not None and touched(source.places, self.kept):
            node = self._renumbered(node, source.places, device)
        (result, *_) = self.axis_facts.values[source.user]
        if per_context and source.aligned:
            # A context that the source does not depend on may run along a dim that the source does not even have.
            for _ in range(len(result) - len(exprs)):
                node = self._call(aten.unsqueeze.default, node, 0)
                exprs.insert(0, UNIT)
                per_context = [dim + 1 for dim in per_context]
        for dim in per_context:
            context = self._foreign(exprs[dim])
            assert context is not None
            along = next((d for d, expr in enumerate(exprs) if context in atoms_of(expr)), None)
            repeated = along is None
            if along is None:
                along = next(d for d, expr in enumerate(result) if covers(expr, context))
                exprs[along] = result[along]
            contexts = index_of(exprs[along], context)[mask_of(exprs[along], self.kept)]
            rows = torch.zeros_like(contexts) if repeated else torch.arange(len(contexts))
            columns = [mask_of(exprs[dim], in_context(self.kept, context, entry)) for entry in contexts.tolist()]
            index = torch.stack([column.nonzero().flatten() for column in columns])
            indices = [self._constant(rows[:, None], device), self._constant(index, device)]
            # Both dims move to the front, where one index picks from them together, and back.
            order = [along, dim, *(d for d in range(len(exprs)) if d not in (along, dim))]
            node = self._call(aten.permute.default, node, order)
            node = self._call(aten.index.Tensor, node, indices)
            node = self._call(aten.permute.default, node, [order.index(d) for d in range(len(exprs))])
        return node

    def _select_dim(self, node: fx.Node, dim: int, expr: Expr, device: torch.device) -> fx.Node:
        """Select the kept entries along one dim, which may be a static axis folded together with dynamic ones."""
        end = None if type(size_of(expr)) is int else static_end(expr)
        fastest, static = end or (False, expr)
        index = self._constant(mask_of(static, self.kept).nonzero().flatten(), device)
        if end is None:
            return self._call(aten.index_select.default, node, dim, index)
        sizes = [-1, size_of(static)] if fastest else [size_of(static), -1]
        node = self._call(aten.unflatten.int, node, dim, sizes)
        node = self._call(aten.index_select.default, node, dim + fastest, index)
        return self._call(aten.flatten.using_ints, node, dim, dim + 1)

    def _renumbered(self, node: fx.Node, axis: Expr, device: torch.device) -> fx.Node:
        """Turn positions among all entries of an axis into those among the entries that stay."""
        mask = mask_of(axis, self.kept)
        return self._call(aten.index.Tensor, self._constant(mask.cumsum(0) - mask.long(), device), [node])

    def _foreign(self, expr: Expr) -> Atom | None:
        """Return the context that decides which entries of `expr` stay, if `expr` does not run along it itself."""
        for atom in atoms_of(expr):
            selected = self.kept.get(atom)
            if isinstance(selected, PerContext) and selected.context not in atoms_of(expr):
                return selected.context
        return None

    def _constant(self, index: Tensor, device: torch.device) -> fx.Node:
        """Make an index tensor an argument of the program, one for all uses that need it."""
        key = (tuple(index.shape), tuple(index.flatten().tolist()), device)
        if key not in self._placeholders:
            with self.graph.inserting_after(None):
                self._placeholders[key] = self.graph.placeholder(f"kept_{len(self._placeholders)}")
            self.constants[self._placeholders[key]] = index.to(device)
        return self._placeholders[key]

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)
