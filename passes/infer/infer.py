"""Inference: an axis expression for every dim of every tensor in a captured graph.

    infer_axes(captured)
      -> weighted_nodes   the values that depend on a parameter; only ops on these need a rule
      -> per node: the relation its rule gives -> Solver -> Axes.unify / split / cut
      -> facts            which op contracts, produces or pins an axis
      -> contexts         the axes that may be selected differently along others

A value that depends on no parameter (an input, a mask, RoPE's cos and sin) is a *source*: each use gets axes of its own
and is index-selected where it enters, so that one table shared by all layers does not tie them together. The axes of
tensors that leave the region are pinned. So are those of an op without a rule, which is counted. Equal sizes prove
nothing: axes are unified because of their position in an op.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from ecospa_fx.passes.axes.algebra import Expr, Mismatch, Size, as_size, in_words, size_of
from ecospa_fx.passes.axes.selection import on_diagonal, static_end
from ecospa_fx.passes.graph.nodes import (
    argument_nodes,
    arguments,
    memory_root,
    op_name,
    tensor_meta,
    written_arguments,
)
from ecospa_fx.passes.ir import relations as r
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Source
from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.ir.state_access import ObjectPath
from ecospa_fx.passes.rules import op_info, relation_of

from .contexts import contexts
from .places import Places, counting_dim, read_as_places
from .probe import probe
from .solve import Solver
from .taint import weighted_nodes
from .weights import Weights


def infer_axes(
    captured: RegionGraph,
    experiments: bool = False,
    unconfirmed_ops: Collection[str] = (),
    apart: Collection[fx.Node] = (),
) -> AxisFacts:
    """Infer the axes of `captured`.

    Args:
        captured: the graph.
        experiments: probe ops that have no rule, see `passes.infer.probe`.
        unconfirmed_ops: names of ops that are not probed.
        apart: products whose contracted dims are not unified, see `passes.transform.rotate`.

    Returns:
        An `AxisFacts` with every expression in normal form.

    Raises:
        RuleError: a registered rule fails on an op, or its pattern is malformed or does not fit (`PatternError`).
    """
    walk = _Walk(captured, experiments, unconfirmed_ops, apart)
    for node in captured.graph.nodes:
        walk.visit(node)
    return walk.finish()


def inferred_again(
    axis_facts: AxisFacts, captured: RegionGraph, experiments: bool, apart: Collection[fx.Node] = ()
) -> AxisFacts:
    """Infer the axes of a graph of which something else is known now, without the experiments that have failed.

    Args:
        axis_facts: its axes as they were inferred before.
        captured: the graph as it is known now.
        experiments: see `infer_axes`.
        apart: see `infer_axes`.
    """
    refuted = axis_facts.missing.keys() - axis_facts.experiments.keys()
    return infer_axes(captured, experiments, refuted, apart)


_BESIDE = "positions along it go to a hook, or into state that is kept"


class _Walk:
    def __init__(
        self, captured: RegionGraph, experiments: bool, unconfirmed_ops: Collection[str], apart: Collection[fx.Node]
    ) -> None:
        self.experiments, self.unconfirmed_ops = experiments, unconfirmed_ops
        self.captured = captured
        self.axis_facts = AxisFacts(captured)
        self.axes = self.axis_facts.axes
        self.weighted = weighted_nodes(captured)
        self.writers = {
            memory_root(value): node
            for node in captured.graph.nodes
            if node in self.weighted
            for value in written_arguments(node)
        }
        self.weights = Weights(captured)
        self.places = Places(self.axis_facts)
        self.solver = Solver(self.axis_facts, apart)

    def visit(self, node: fx.Node) -> None:
        if node not in self.weighted:
            return
        self._axes_of(node)
        self.weights.visit(node, self.axis_facts.relations.get(node))

    def _axes_of(self, node: fx.Node) -> None:
        if node.op == "placeholder" and node.name in self.captured.state:
            self.axis_facts.values[node] = (tuple(self.axes.fresh(size) for size in _shape(node.meta["val"])),)
        elif node.op == "placeholder" and node.name in self.captured.arguments:
            self._come_in(node, self.captured.arguments[node.name])
        elif node.op == "placeholder":
            self._enter(node)
        elif node.op == "output":
            # Outputs after those that the region returns go to hooks, which take any size.
            operands = self._operands(node)
            self.axis_facts.results = tuple(operand.exprs for operand in operands[: self.captured.returned])
            for i, operand in enumerate(operands):
                why = f"positions along it leave the {self._whole} as output {i}"
                self.places.pin(operand.node, node, why=why if i < self.captured.returned else _BESIDE)
            for i, operand in enumerate(operands[: self.captured.returned]):
                for dim, expr in enumerate(operand.exprs):
                    if (i, dim) in self.captured.border.results:
                        self.axis_facts.crossing["result", i, dim] = expr
                    else:
                        self.axis_facts.pin(expr, node, f"it leaves the {self._whole} as output {i}")
            self._assign(node)
            self._store(node)
        elif node.op == "call_function" and tensor_meta(node):
            self._call(node)
        elif node.op == "call_function" and isinstance(node.meta.get("val"), (tuple, list)):
            self._several(node)
        elif node.op == "call_function":
            for arg in node.all_input_nodes:  # a number is read out of it
                self.places.pin(arg, node)

    @property
    def _whole(self) -> str:
        return "model" if self.captured.between else "region"

    def _come_in(self, node: fx.Node, name: str) -> None:
        """Give axes to an argument that shrinks with the model around; its other dims stay whole."""
        exprs = tuple(self.axes.fresh(size) for size in _shape(node.meta["val"]))
        self.axis_facts.values[node] = (exprs,)
        shrinking = self.captured.border.dims_of(name)
        for dim, expr in enumerate(exprs):
            if dim in shrinking:
                self.axis_facts.crossing["argument", name, dim] = expr
            else:
                self.axis_facts.pin(expr, node, f"it is dim {dim} of the argument `{name}`")

    def _assign(self, output: fx.Node) -> None:
        """Unify the axes of a buffer with those of the tensor that is assigned to it; pin those of other attributes."""
        results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        for place, node in zip(self.captured.assigned, self.captured.assigned_among(results), strict=True):
            if node not in self.weighted:
                continue
            (exprs,) = self.axis_facts.values[node]
            name = place.full_name
            before = self.axis_facts.parameters.get(name, ())
            if place.buffer and tuple(map(size_of, before)) == tuple(map(size_of, exprs)):
                for a, b in zip(exprs, before, strict=True):
                    self.axes.unify(a, b)
                continue
            for expr in (*exprs, *before):
                self.axis_facts.pin(expr, output, f"it is kept as `{name}`, whose other uses are unknown")

    def _store(self, output: fx.Node) -> None:
        """Unify the axes of tensors in objects after a call with those before it."""
        carried = self.captured.carried
        results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        after = dict(zip(carried.stored, results[len(results) - len(carried.stored) :], strict=True))
        before = {node.name: node for node in self.weighted if node.op == "placeholder"}
        for name, at in self.captured.state.items():
            if name not in before:
                continue
            (exprs,) = self.axis_facts.values[before[name]]
            if at in after and after[at] in self.weighted:
                (others,) = self.axis_facts.values[after[at]]
                for a, b in zip(exprs, others, strict=True) if len(exprs) == len(others) else ():
                    self._same(a, b, output, at)
            if at in self.captured.strangers or (at in after and after[at] not in self.weighted):
                of = carried.types[at.number].__name__
                for expr in exprs:
                    self.axis_facts.pin(expr, before[name], f"it meets `{at}` of a {of}, which something else fills")
        for at, node in after.items():
            if node in self.weighted:
                self.axis_facts.stored[at] = self.axis_facts.values[node][0]
        for name, at in self.captured.state.items():
            if name in before:
                self.axis_facts.stored.setdefault(at, self.axis_facts.values[before[name]][0])

    def _same(self, a: Expr, b: Expr, output: fx.Node, at: ObjectPath) -> None:
        """Unify one dim of a tensor in an object before and after a call. A dim that grows belongs to no parameter."""
        try:
            if size_of(a) == size_of(b):
                self.axes.unify(a, b)
                return
        except Mismatch:
            pass
        for expr in (a, b):
            self.axis_facts.pin(expr, output, f"it is a dim of `{at}`, which has other sizes before and after a call")

    def finish(self) -> AxisFacts:
        axis_facts = self.axis_facts
        for axis_set in axis_facts.parameters.values():
            for expr in axis_set:
                for atom in on_diagonal(axis_facts.axes.resolve(expr)):
                    axis_facts.pin(atom, self._last, "it runs along two factors of one axis, a diagonal")
        for source in axis_facts.sources:
            for expr in axis_facts.resolve(source.exprs):
                if type(size_of(expr)) is not int and static_end(expr) is None:
                    axis_facts.pin(expr, source.user, "an input has it folded into a dynamic dim")
        axis_facts.values = {
            node: tuple(axis_facts.resolve(exprs) for exprs in outputs) for node, outputs in axis_facts.values.items()
        }
        axis_facts.stored = {place: axis_facts.resolve(exprs) for place, exprs in axis_facts.stored.items()}
        axis_facts.parameters = {name: axis_facts.resolve(exprs) for name, exprs in axis_facts.parameters.items()}
        axis_facts.results = tuple(map(axis_facts.resolve, axis_facts.results))
        axis_facts.crossing = {edge: axis_facts.axes.resolve(expr) for edge, expr in axis_facts.crossing.items()}
        axis_facts.made = {node: axis_facts.resolve(exprs) for node, exprs in axis_facts.made.items()}
        axis_facts.sources = [
            replace(s, exprs=axis_facts.resolve(s.exprs), places=s.places and axis_facts.axes.resolve(s.places))
            for s in axis_facts.sources
        ]
        axis_facts.places = {node: axis_facts.axes.resolve(expr) for node, expr in axis_facts.places.items()}
        axis_facts.least = [(axis_facts.axes.resolve(expr), n, node) for expr, n, node in axis_facts.least]
        axis_facts.operands = {
            node: tuple(
                replace(o, exprs=axis_facts.resolve(o.exprs), places=o.places and axis_facts.axes.resolve(o.places))
                for o in operands
            )
            for node, operands in axis_facts.operands.items()
        }
        axis_facts.derivations = self.weights.derivations(axis_facts)
        axis_facts.facts = [replace(fact, expr=axis_facts.axes.resolve(fact.expr)) for fact in axis_facts.facts]
        axis_facts.contexts = contexts(axis_facts)
        return axis_facts

    @property
    def _last(self) -> fx.Node:
        last: fx.Node = next(iter(reversed(self.captured.graph.nodes)))
        return last

    def _enter(self, node: fx.Node) -> None:
        """Give axes to a parameter, or to a buffer that shrinks with them."""
        name = self.captured.tensors[node.name]
        first = self.captured.same_storage.get(name, name)
        shape = _shape(node.meta["val"])
        if first in self.axis_facts.parameters and tuple(map(size_of, self.axis_facts.parameters[first])) == shape:
            exprs = self.axis_facts.parameters[first]
        else:
            exprs = tuple(self.axes.fresh(size) for size in shape)
        if first != name and exprs is not self.axis_facts.parameters.get(first):
            for expr in (*exprs, *self.axis_facts.parameters.get(first, ())):
                self.axis_facts.pin(expr, node, f"`{name}` and `{first}` are different views of one storage")
        if name in self.captured.shared_outside:
            for dim, expr in enumerate(exprs):
                if (name, dim) in self.captured.border.tied:
                    self.axis_facts.crossing["tied", name, dim] = expr
                    continue
                self.axis_facts.pin(
                    expr, node, f"`{name}` is used outside the region too, {self.captured.shared_outside[name]}"
                )
        self.axis_facts.parameters[name] = exprs
        self.axis_facts.values[node] = (exprs,)

    def _call(self, node: fx.Node) -> None:
        before = len(self.axis_facts.sources)
        operands = self._operands(node)
        if node.target is operator.getitem:
            source, i = arguments(node)
            if not isinstance(source.meta["val"][i], torch.Tensor) or not tensor_meta(source):
                self._several(node)  # one of a list among the results, say
            else:
                self.axis_facts.values[node] = (self.axis_facts.values[source][i],)
                self.places.take(node, source, i)
            return
        self.axis_facts.operands[node] = operands
        shapes = [_shape(meta) for meta in tensor_meta(node)]
        if not any(shapes) and not any(operand.exprs for operand in operands):
            self.axis_facts.values[node] = tuple(() for _ in shapes)  # numbers have no axes
            for operand in operands:
                self.places.pin(operand.node, node)
            return
        info = op_info(node.target)
        name = op_name(node)
        if info is None and self.experiments and name not in self.unconfirmed_ops:
            probed = probe(node, operands)
            if probed is not None:
                self.axis_facts.experiments.setdefault(name, []).append(node)
                why = "In experiments, its entries depend on others along it"
                self._carry_out(probed, node, operands, shapes, why)
                return
        if info is None:
            self.axis_facts.missing.setdefault(name, []).append(node)
            self._opaque(node, operands, shapes, f"no axis rule for {name}")
            return
        relation = relation_of(node, operands, self.captured.region)
        assert relation is not None
        if isinstance(relation, r.Pointwise) or (isinstance(relation, r.Expanded) and relation.like is not None):
            self.axis_facts.sources[before:] = [replace(s, aligned=True) for s in self.axis_facts.sources[before:]]
        counting = {x.node: x.places for x in read_as_places(relation)}
        self.axis_facts.sources[before:] = [
            replace(s, places=counting.get(s.node)) for s in self.axis_facts.sources[before:]
        ]
        self._carry_out(relation, node, operands, shapes, info.why)

    def _carry_out(
        self, relation: r.Relation, node: fx.Node, operands: tuple[r.Operand, ...], shapes: list[Any], why: str
    ) -> None:
        try:
            outputs = self.solver.solve(relation, node, operands, shapes, why)
            if len(outputs) != len(shapes) or any(
                len(o) != len(s) or any(self._differ(e, n, node) for e, n in zip(o, s, strict=True))
                for o, s in zip(outputs, shapes, strict=True)
            ):
                raise Mismatch(
                    f"the rule gives dims of {in_words([[*map(size_of, o)] for o in outputs])}, "
                    f"the op has {in_words(shapes)}"
                )
            self.axis_facts.values[node] = tuple(outputs)
            self.axis_facts.relations[node] = relation
            self.places.visit(node, relation, operands)
        except Mismatch as mismatch:
            for size in (size for operand in operands for size in operand.shape if isinstance(size, sympy.Expr)):
                self.axis_facts.unsolved |= size.free_symbols
            self._opaque(node, operands, shapes, f"{op_name(node)}: {mismatch}")

    def _opaque(self, node: fx.Node, operands: tuple[r.Operand, ...], shapes: list[Any], reason: str) -> None:
        """Pin all that goes into an op and comes out of it, and what positions among its operands lie along."""
        self.solver.opaque(node, operands, shapes, reason)
        for operand in operands:
            self.places.pin(operand.node, node, why=reason)

    def _differ(self, expr: Expr, size: Size, node: fx.Node) -> bool:
        """Return whether an axis has another size than the output; pin it if nothing proves the sizes equal."""
        extent = size_of(expr)
        if extent != size and not (type(extent) is int and type(size) is int):
            reason = f"nothing proves that a dim of {in_words(extent)} comes out as one of {in_words(size)}"
            self.axis_facts.pin(expr, node, f"{op_name(node)}: {reason}")
            return False
        return bool(extent != size)

    def _several(self, node: fx.Node) -> None:
        """Pin the axes of an op that returns tensors and numbers: it runs a graph of its own, which is not inferred."""
        operands = self.axis_facts.operands[node] = self._operands(node)
        name = op_name(node)
        self.axis_facts.missing.setdefault(name, []).append(node)
        shapes = [_shape(val) if isinstance(val, torch.Tensor) else () for val in node.meta["val"]]
        self._opaque(node, operands, shapes, f"no axis rule for {name}")

    def _operands(self, node: fx.Node) -> tuple[r.Operand, ...]:
        """Return the tensor arguments of `node` in order; sources get fresh axes for this use."""
        operands = []
        for occurrence, arg in enumerate(argument_nodes(node)):
            if not tensor_meta(arg) or isinstance(arg.meta["val"], (tuple, list)):
                continue
            shape = _shape(arg.meta["val"])
            if arg in self.weighted:
                operand = r.Operand(
                    self.axis_facts.values[arg][0], shape, arg, True, self.weights.of(arg), self.places.axis_of(arg),
                    self.places.is_counted(arg),
                )  # fmt: skip
            else:
                exprs = tuple(self.axes.fresh(size) for size in shape)
                own = counting_dim(arg)
                operand = r.Operand(exprs, shape, arg, False, places=None if own is None else exprs[own])
                self.axis_facts.sources.append(Source(node, occurrence, arg, exprs))
                if memory_root(arg) in self.writers:
                    writer = self.writers[memory_root(arg)]
                    for expr in operand.exprs:
                        self.axis_facts.pin(expr, node, f"{op_name(writer)} writes into memory that does not shrink")
            operands.append(operand)
        return tuple(operands)


def _shape(meta: torch.Tensor) -> tuple[Size, ...]:
    return tuple(map(as_size, meta.shape))
