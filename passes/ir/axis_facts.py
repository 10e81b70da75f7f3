"""Inference: what is known about the axes of one captured graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import sympy
from torch import fx

from ecospa_fx.passes.axes.algebra import UNIT, Atom, Axes, Expr
from ecospa_fx.passes.ir import relations as r

from .region_graph import RegionGraph
from .state_access import ObjectPath

Exprs: TypeAlias = tuple[Expr, ...]
Role = Literal["pinned", "contracted", "free", "batch", "expanded", "nonlinear", "gate", "merge"]


@dataclass(frozen=True, eq=False)
class Fact:
    """What one op does to one axis. `reason` says it in words where the axis is pinned."""

    role: Role
    expr: Expr
    node: fx.Node
    reason: str = ""
    operands: tuple[r.Operand, ...] = ()


@dataclass(frozen=True, eq=False)
class Source:
    """One use of a value that depends on no parameter: argument number `occurrence` of `user`.

    `aligned`: counted from the right, its dims are those of the result, as in any pointwise op.
    """

    user: fx.Node
    occurrence: int
    node: fx.Node
    exprs: Exprs
    aligned: bool = False


@dataclass(eq=False)
class AxisFacts:
    """All that is known about the axes of a captured graph.

    Attributes:
        captured: the graph it is about.
        values: axis expressions per output of each node that depends on a parameter.
        parameters: axis expressions per parameter and per buffer that shrinks with them, by name in the region.
        sources: uses of values that do not depend on a parameter.
        made: axes that an op made itself by repeating an operand.
        relations: relation of each op that a rule, or an experiment, describes rightly.
        facts: what ops do to axes.
        missing: ops met that have no rule, with the nodes where.
        contexts: atom -> the atom in each of whose entries it may keep other entries, see `passes.infer.contexts`.
        experiments: ops met that have a rule by experiment only, with the nodes where.
        stored: axis expressions of what objects hold after a call, or before one that does not change it.
        unsolved: dynamic sizes of operands whose axes did not fit the rule of an op.
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
    unsolved: set[sympy.Symbol] = field(default_factory=set)

    def __deepcopy__(self, memo: dict[int, Any]) -> AxisFacts:
        return self  # never changed once made

    def resolve(self, exprs: Exprs) -> Exprs:
        """`exprs` in normal form over final atoms."""
        return tuple(self.axes.resolve(expr) for expr in exprs)

    def pin(self, expr: Expr, node: fx.Node, reason: str) -> None:
        """Record that `expr` must stay whole."""
        if expr != UNIT:
            self.facts.append(Fact("pinned", expr, node, reason))
