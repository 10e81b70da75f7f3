"""Axis facts: the axis expressions of one captured graph, and the role of each axis in each op."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import sympy
from torch import fx

from ecospa_fx.passes.axes.algebra import UNIT, Atom, Axes, Expr
from ecospa_fx.passes.ir import relations as r

from .border import Edge
from .region_graph import RegionGraph
from .state_access import ObjectPath

Exprs: TypeAlias = tuple[Expr, ...]
Role = Literal["pinned", "contracted", "reduced", "free", "batch", "expanded", "nonlinear", "gate", "merge", "chosen"]


@dataclass(frozen=True, eq=False)
class Fact:
    """The role of one axis in one op. If the axis is pinned, `reason` says why.

    Entries that go count as zero where the axis is contracted. Where it is reduced, they are absent: the op takes what
    is left, see `passes.rewrite.masked`. Where it is chosen, values say which of its entries each token, say, meets.
    """

    role: Role
    expr: Expr
    node: fx.Node
    reason: str = ""
    operands: tuple[r.Operand, ...] = ()


@dataclass(frozen=True, eq=False)
class Source:
    """One use of a value that depends on no parameter: argument number `occurrence` of `user`.

    `aligned`: its dims are those of the result, counted from the right, as in any pointwise op.
    `places`: the axis of its own that its entries are positions along, where they are compared with other positions.
    """

    user: fx.Node
    occurrence: int
    node: fx.Node
    exprs: Exprs
    aligned: bool = False
    places: Expr | None = None


@dataclass(eq=False)
class AxisFacts:
    """The axes of a captured graph, as inferred from its ops.

    Attributes:
        captured: the graph.
        axes: the equalities between axes.
        values: axis expressions per output of each node that depends on a parameter.
        operands: the tensor arguments of each op on such values.
        parameters: axis expressions of each parameter and each buffer that shrinks with them, by name in the region.
        sources: uses of values that do not depend on a parameter.
        made: new axes along which an op repeats its operand.
        relations: the relation of each op, where its rule or an experiment fits its operands.
        facts: the role of each axis in each op.
        missing: ops without a rule, and their nodes.
        contexts: atom -> the atom in each of whose entries it may keep different entries, see `passes.infer.contexts`.
        experiments: ops that have a rule by experiment only, and their nodes.
        stored: axis expressions of tensors in objects after a call, or before it if the call does not change them.
        results: axis expressions of the tensors that it returns.
        crossing: axis expressions of the dims that shrink with the model around, see `RegionGraph.border`.
        unsolved: dynamic sizes of operands whose axes did not fit the rule of an op.
        derivations: ops that make weights out of parameters, before an activation comes in.
        places: tensors whose entries are positions, and the axis that these lie along.
        counted: values that depend on parameters by places only.
        least: axes of which ops need some number of entries, with that number and the op.
    """

    captured: RegionGraph
    axes: Axes = field(default_factory=Axes)
    values: dict[fx.Node, tuple[Exprs, ...]] = field(default_factory=dict)
    operands: dict[fx.Node, tuple[r.Operand, ...]] = field(default_factory=dict)
    parameters: dict[str, Exprs] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    made: dict[fx.Node, Exprs] = field(default_factory=dict)
    relations: dict[fx.Node, r.Relation] = field(default_factory=dict)
    facts: list[Fact] = field(default_factory=list)
    missing: dict[str, list[fx.Node]] = field(default_factory=dict)
    contexts: dict[Atom, Atom] = field(default_factory=dict)
    experiments: dict[str, list[fx.Node]] = field(default_factory=dict)
    stored: dict[ObjectPath, Exprs] = field(default_factory=dict)
    results: tuple[Exprs, ...] = ()
    crossing: dict[Edge, Expr] = field(default_factory=dict)
    unsolved: set[sympy.Symbol] = field(default_factory=set)
    derivations: set[fx.Node] = field(default_factory=set)
    places: dict[fx.Node, Expr] = field(default_factory=dict)
    counted: set[fx.Node] = field(default_factory=set)
    least: list[tuple[Expr, int, fx.Node]] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> AxisFacts:
        return self  # not changed after inference

    def resolve(self, exprs: Exprs) -> Exprs:
        """Return `exprs` in normal form over atoms that are not refined further."""
        return tuple(self.axes.resolve(expr) for expr in exprs)

    def pin(self, expr: Expr, node: fx.Node, reason: str) -> None:
        """Record that `expr` must stay at its full size."""
        if expr != UNIT:
            self.facts.append(Fact("pinned", expr, node, reason))
