"""Infer: give every dim of every tensor in a captured graph its axis expression.

    infer(captured)
      -> weighted_nodes   which values depend on a parameter; only ops on those need a rule
      -> per node: the relation its rule gives -> Solver -> Axes.unify / split / cut
      -> facts            who contracts, produces or pins which axis, and where
      -> contexts         which axes may be selected differently along others

A value that depends on no parameter (an input, a mask, RoPE's cos and sin) is a *source*: each use gets axes of its own
and is index-selected where it enters, so that one table shared by all layers does not tie them together. What leaves
the region is pinned. What no rule is known for is pinned and counted. Sizes never decide: axes meet by position.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from ecospa_fx.errors import PatternError, RuleError
from ecospa_fx.passes.axes.algebra import Expr, Mismatch, Size, as_size, size_of
from ecospa_fx.passes.axes.selection import on_diagonal, static_end
from ecospa_fx.passes.graph.nodes import (
    PARTS,
    VIEWS,
    argument_nodes,
    arguments,
    op_name,
    place,
    tensor_meta,
    written_arguments,
)
from ecospa_fx.passes.ir import relations as r
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Fact, Source
from ecospa_fx.passes.ir.captured import RegionGraph
from ecospa_fx.passes.ir.patterns import bind
from ecospa_fx.passes.ir.state_access import ObjectPath
from ecospa_fx.passes.rules import Rule, rule_for

from .contexts import contexts
from .probe import probe
from .solve import Solver
from .taint import weighted_nodes


def infer_axes(
    captured: RegionGraph,
    experiments: bool = False,
    distrusted: Collection[str] = (),
    apart: Collection[fx.Node] = (),
) -> AxisFacts:
    """Infer the axes of `captured`.

    Args:
        captured: the graph.
        experiments: try ops that have no rule, see `passes.infer.probe`.
        distrusted: names of ops that are not to be tried.
        apart: products of which it is not taken for known that what they sum over is one axis, see
            `passes.transform.rotate`.

    Returns:
        An `AxisFacts` with every expression in normal form.

    Raises:
        RuleError: a registered rule fails on an op.
    """
    walk = _Walk(captured, experiments, distrusted, apart)
    for node in captured.graph.nodes:
        walk.visit(node)
    return walk.finish()


class _Walk:
    def __init__(
        self, captured: RegionGraph, experiments: bool, distrusted: Collection[str], apart: Collection[fx.Node]
    ) -> None:
        self.experiments, self.distrusted = experiments, distrusted
        self.captured = captured
        self.known = AxisFacts(captured)
        self.axes = self.known.axes
        self.weighted = weighted_nodes(captured)
        self.solver = Solver(self.known, apart)

    def visit(self, node: fx.Node) -> None:
        if node not in self.weighted:
            return
        if node.op == "placeholder" and node.name in self.captured.state:
            self.known.values[node] = (tuple(self.axes.fresh(size) for size in _shape(node.meta["val"])),)
        elif node.op == "placeholder":
            self._enter(node)
        elif node.op == "output":
            # Those after what the region returns go to hooks, which look at what is there.
            operands = self._operands(node)
            for i, operand in enumerate(operands[: self.captured.returned]):
                for expr in operand.exprs:
                    self.known.pin(expr, node, f"it leaves the region as output {i}")
            self._store(node)
        elif node.op == "call_function" and tensor_meta(node):
            self._call(node)
        elif node.op == "call_function" and isinstance(node.meta.get("val"), (tuple, list)):
            self._several(node)

    def _store(self, output: fx.Node) -> None:
        """What objects hold after a call lies along the axes of what they held before it."""
        carried = self.captured.carried
        held: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        after = dict(zip(carried.stored, held[len(held) - len(carried.stored) :], strict=True))
        before = {node.name: node for node in self.weighted if node.op == "placeholder"}
        for name, at in self.captured.state.items():
            if name not in before:
                continue
            (exprs,) = self.known.values[before[name]]
            if at in after and after[at] in self.weighted:
                (others,) = self.known.values[after[at]]
                for a, b in zip(exprs, others, strict=True) if len(exprs) == len(others) else ():
                    self._same(a, b, output, at)
            if at in self.captured.strangers or (at in after and after[at] not in self.weighted):
                of = carried.types[at.number].__name__
                for expr in exprs:
                    self.known.pin(expr, before[name], f"it meets `{at}` of a {of}, which something else fills")
        for at, node in after.items():
            if node in self.weighted:
                self.known.stored[at] = self.known.values[node][0]
        for name, at in self.captured.state.items():
            if name in before:
                self.known.stored.setdefault(at, self.known.values[before[name]][0])

    def _same(self, a: Expr, b: Expr, output: fx.Node, at: ObjectPath) -> None:
        """One dim of a tensor in an object before and after a call. One that grows belongs to no parameter."""
        try:
            if size_of(a) == size_of(b):
                self.axes.unify(a, b)
                return
        except Mismatch:
            pass
        for expr in (a, b):
            self.known.pin(expr, output, f"it is a dim of `{at}`, which has other sizes before and after a call")

    def finish(self) -> AxisFacts:
        known = self.known
        for axis_set in known.parameters.values():
            for expr in axis_set:
                for atom in on_diagonal(known.axes.resolve(expr)):
                    known.pin(atom, self._last, "it runs along two factors of one axis, a diagonal")
        for source in known.sources:
            for expr in known.resolve(source.exprs):
                if type(size_of(expr)) is not int and static_end(expr) is None:
                    known.pin(expr, source.user, "an input has it folded into a dynamic dim")
        known.values = {
            node: tuple(known.resolve(exprs) for exprs in outputs) for node, outputs in known.values.items()
        }
        known.stored = {place: known.resolve(exprs) for place, exprs in known.stored.items()}
        known.parameters = {name: known.resolve(exprs) for name, exprs in known.parameters.items()}
        known.made = {node: known.resolve(exprs) for node, exprs in known.made.items()}
        known.sources = [replace(s, exprs=known.resolve(s.exprs)) for s in known.sources]
        known.operands = {
            node: tuple(r.Operand(known.resolve(o.exprs), o.shape, o.node, o.weighted, o.parameter) for o in operands)
            for node, operands in known.operands.items()
        }
        known.facts = [Fact(f.role, known.axes.resolve(f.expr), f.node, f.reason, f.operands) for f in known.facts]
        known.contexts = contexts(known)
        return known

    @property
    def _last(self) -> fx.Node:
        last: fx.Node = next(iter(reversed(self.captured.graph.nodes)))
        return last

    def _enter(self, node: fx.Node) -> None:
        """A parameter, or a buffer that shrinks with them."""
        name = self.captured.tensors[node.name]
        first = self.captured.same_storage.get(name, name)
        shape = _shape(node.meta["val"])
        if first in self.known.parameters and tuple(map(size_of, self.known.parameters[first])) == shape:
            exprs = self.known.parameters[first]
        else:
            exprs = tuple(self.axes.fresh(size) for size in shape)
        if first != name and exprs is not self.known.parameters.get(first):
            for expr in (*exprs, *self.known.parameters.get(first, ())):
                self.known.pin(expr, node, f"`{name}` and `{first}` are different views of one storage")
        if name in self.captured.shared_outside:
            for expr in exprs:
                self.known.pin(
                    expr, node, f"`{name}` is used outside the region too, {self.captured.shared_outside[name]}"
                )
        self.known.parameters[name] = exprs
        self.known.values[node] = (exprs,)

    def _call(self, node: fx.Node) -> None:
        before = len(self.known.sources)
        operands = self._operands(node)
        if node.target is operator.getitem:
            source, i = arguments(node)
            self.known.values[node] = (self.known.values[source][i],)
            return
        self.known.operands[node] = operands
        shapes = [_shape(meta) for meta in tensor_meta(node)]
        if not any(shapes) and not any(operand.exprs for operand in operands):
            self.known.values[node] = tuple(() for _ in shapes)  # numbers have no axes
            return
        rule = rule_for(node.target)
        name = op_name(node)
        if rule is None and self.experiments and name not in self.distrusted:
            found = probe(node, operands)
            if found is not None:
                self.known.experiments.setdefault(name, []).append(node)
                self._carry_out(found, node, operands, shapes, "In experiments, its entries depend on others along it")
                return
        if rule is None:
            self.known.missing.setdefault(name, []).append(node)
            self.solver.opaque(node, operands, shapes, f"no axis rule for {name}")
            return
        relation = self._apply(rule, node, operands)
        if isinstance(relation, r.Pointwise):
            self.known.sources[before:] = [replace(s, aligned=True) for s in self.known.sources[before:]]
        self._carry_out(relation, node, operands, shapes, rule.why)

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
                    f"the rule gives dims of {[tuple(map(size_of, o)) for o in outputs]}, the op has {shapes}"
                )
            self.known.values[node] = tuple(outputs)
        except Mismatch as mismatch:
            for size in (size for operand in operands for size in operand.shape if isinstance(size, sympy.Expr)):
                self.known.unsolved |= size.free_symbols
            self.solver.opaque(node, operands, shapes, f"{op_name(node)}: {mismatch}")

    def _differ(self, expr: Expr, size: Size, node: fx.Node) -> bool:
        """Whether an axis has another size than the op's output; one that nothing proves equal stays whole."""
        own = size_of(expr)
        if own != size and not (type(own) is int and type(size) is int):
            self.known.pin(expr, node, f"{op_name(node)}: nothing proves that {own} is {size}")
            return False
        return bool(own != size)

    def _several(self, node: fx.Node) -> None:
        """An op that gives tensors and numbers: one that runs a graph of its own, of which nothing is known."""
        operands = self.known.operands[node] = self._operands(node)
        name = op_name(node)
        self.known.missing.setdefault(name, []).append(node)
        shapes = [_shape(val) if isinstance(val, torch.Tensor) else () for val in node.meta["val"]]
        self.solver.opaque(node, operands, shapes, f"no axis rule for {name}")

    def _apply(self, rule: Rule, node: fx.Node, operands: tuple[r.Operand, ...]) -> r.Relation:
        waiting = iter(operands)

        def as_argument(value: Any) -> Any:
            if isinstance(value, fx.Node):
                if tensor_meta(value):
                    return next(waiting)
                return as_size(value.meta["val"])
            if isinstance(value, (list, tuple)):
                return [as_argument(item) for item in value]
            return value

        try:
            args, kwargs = as_argument(node.args), {name: as_argument(value) for name, value in node.kwargs.items()}
            relation = rule.axes(*args, **kwargs)
        except Exception as error:
            raise RuleError(
                f"the axis rule `{rule.axes.__name__}` failed on {op_name(node)} "
                f"({place(node, self.captured.region)}) with {type(error).__name__}: {error}; this is a bug in the "
                "rule, nothing was changed"
            ) from error
        if isinstance(relation, str):
            relation = r.Pattern(relation, operands)
        if isinstance(relation, r.Pattern):
            try:
                bind(relation.spec, len(relation.operands), tuple(relation.sizes))
            except PatternError as error:
                raise PatternError(
                    f"the axis rule `{rule.axes.__name__}` gives {op_name(node)} ({place(node, self.captured.region)}) "
                    f"a pattern that is wrong: {error}\nthis is a bug in the rule, nothing was changed"
                ) from error
        return relation

    def _operands(self, node: fx.Node) -> tuple[r.Operand, ...]:
        """The tensor arguments of `node` in order; sources get fresh axes for this use."""
        operands = []
        written = set(written_arguments(node))
        for occurrence, arg in enumerate(argument_nodes(node)):
            if not tensor_meta(arg) or isinstance(arg.meta["val"], (tuple, list)):
                continue
            shape = _shape(arg.meta["val"])
            if arg in self.weighted:
                operand = r.Operand(self.known.values[arg][0], shape, arg, True, self.parameter_behind(arg))
            else:
                operand = r.Operand(tuple(self.axes.fresh(size) for size in shape), shape, arg, False)
                self.known.sources.append(Source(node, occurrence, arg, operand.exprs))
                if arg in written:
                    for expr in operand.exprs:
                        self.known.pin(expr, node, f"{op_name(node)} writes into memory that does not shrink")
            operands.append(operand)
        return tuple(operands)

    def parameter_behind(self, node: fx.Node) -> str | None:
        """The parameter (of tied ones the first) that `node` is, or is a view or a cast of."""
        while node.op == "call_function" and (node.target in VIEWS or node.target in PARTS or _picks_matrices(node)):
            node = arguments(node)[0]
        name = self.captured.tensors.get(node.name) if node.op == "placeholder" else None
        return self.captured.same_storage.get(name, name) if name is not None else None


def _picks_matrices(node: fx.Node) -> bool:
    """Whether a row of matrices is picked from by an index: those of experts, say."""
    return node.target is torch.ops.aten.index.Tensor and arguments(node)[0].meta["val"].ndim > 2


def _shape(meta: torch.Tensor) -> tuple[Size, ...]:
    return tuple(map(as_size, meta.shape))
