"""Sources: what a plan leaves of values that depend on no parameter, index-selected where they are used.

select_sources(graph, inference, kept, new)
-> index_select     a dim that keeps the same entries everywhere, or that carries its context itself
-> index            a dim that keeps other entries in each context: picked together with the context's dim,
which a source that lacks it (rotary tables know no heads) gets here
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, fx

from ecospa_fx.passes.axes.algebra import UNIT, Atom, Expr, atoms_of, size_of
from ecospa_fx.passes.axes.selection import PerContext, Selection, in_context, index_of, mask_of, static_end, touched
from ecospa_fx.passes.infer.contexts import covers
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Source

aten = torch.ops.aten


def select_sources(
    graph: fx.Graph, axis_facts: AxisFacts, kept: Selection, new: dict[fx.Node, fx.Node]
) -> dict[fx.Node, Any]:
    """Index-select every use of a source whose axes have lost entries.

    Args:
        graph: the copy of the captured graph to write into.
        axis_facts: axes of the captured graph.
        kept: what stays of each atom.
        new: node of the captured graph -> node of the copy.

    Returns:
        The placeholders that were added for index tensors, and those.
    """
    writing = _Selector(graph, axis_facts, kept)
    for source in axis_facts.sources:
        if not any(touched(expr, kept) for expr in source.exprs):
            continue
        user = new[source.user]
        with graph.inserting_before(user):
            node = writing.selected(source, new[source.node])
        places = itertools.count()
        swap = lambda old, node=node, places=places: node if next(places) == source.occurrence else old  # noqa: E731, B023
        user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), swap)
    return writing.constants


class _Selector:
    def __init__(self, graph: fx.Graph, axis_facts: AxisFacts, kept: Selection) -> None:
        self.graph, self.axis_facts, self.kept = graph, axis_facts, kept
        self.constants: dict[fx.Node, Any] = {}
        self._held: dict[tuple[Any, ...], fx.Node] = {}

    def selected(self, source: Source, node: fx.Node) -> fx.Node:
        """`node`, the value of a source, as one use of it needs it."""
        device = source.node.meta["val"].device
        exprs = list(source.exprs)
        varied = [dim for dim, expr in enumerate(exprs) if self._foreign(expr) is not None]
        for dim, expr in enumerate(exprs):
            if dim not in varied and touched(expr, self.kept):
                node = self._reduced(node, dim, expr, device)
        (result, *_) = self.axis_facts.values[source.user]
        if varied and source.aligned:
            # Contexts that the source knows nothing of may run along a dim that it does not even have.
            for _ in range(len(result) - len(exprs)):
                node = self._call(aten.unsqueeze.default, node, 0)
                exprs.insert(0, UNIT)
                varied = [dim + 1 for dim in varied]
        for dim in varied:
            context = self._foreign(exprs[dim])
            assert context is not None
            along = next((d for d, expr in enumerate(exprs) if context in atoms_of(expr)), None)
            repeated = along is None
            if along is None:
                along = next(d for d, expr in enumerate(result) if covers(expr, context))
                exprs[along] = result[along]
            left = index_of(exprs[along], context)[mask_of(exprs[along], self.kept)]
            rows = torch.zeros_like(left) if repeated else torch.arange(len(left))
            columns = [mask_of(exprs[dim], in_context(self.kept, context, entry)) for entry in left.tolist()]
            index = torch.stack([column.nonzero().flatten() for column in columns])
            held = [self._constant(rows[:, None], device), self._constant(index, device)]
            # Both dims to the front, where one index picks from them together, and back.
            order = [along, dim, *(d for d in range(len(exprs)) if d not in (along, dim))]
            node = self._call(aten.permute.default, node, order)
            node = self._call(aten.index.Tensor, node, held)
            node = self._call(aten.permute.default, node, [order.index(d) for d in range(len(exprs))])
        return node

    def _reduced(self, node: fx.Node, dim: int, expr: Expr, device: torch.device) -> fx.Node:
        """`node` with what is kept along one dim, which may be folded together with dynamic ones."""
        end = None if type(size_of(expr)) is int else static_end(expr)
        fastest, known = end or (False, expr)
        index = self._constant(mask_of(known, self.kept).nonzero().flatten(), device)
        if end is None:
            return self._call(aten.index_select.default, node, dim, index)
        sizes = [-1, size_of(known)] if fastest else [size_of(known), -1]
        node = self._call(aten.unflatten.int, node, dim, sizes)
        node = self._call(aten.index_select.default, node, dim + fastest, index)
        return self._call(aten.flatten.using_ints, node, dim, dim + 1)

    def _foreign(self, expr: Expr) -> Atom | None:
        """The context by which `expr` varies without carrying it."""
        for atom in atoms_of(expr):
            choice = self.kept.get(atom)
            if isinstance(choice, PerContext) and choice.context not in atoms_of(expr):
                return choice.context
        return None

    def _constant(self, index: Tensor, device: torch.device) -> fx.Node:
        """An index tensor as an argument of the program, one for all uses that need it."""
        key = (tuple(index.shape), tuple(index.flatten().tolist()), device)
        if key not in self._held:
            with self.graph.inserting_after(None):
                self._held[key] = self.graph.placeholder(f"kept_{len(self._held)}")
            self.constants[self._held[key]] = index.to(device)
        return self._held[key]

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)
