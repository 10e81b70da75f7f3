"""Owned: a value of a graph whose rows belong to entries of an axis, and how the entry of each row is told.

`contributions.py` finds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

from ecospa_fx.passes.axes.algebra import Atom, Expr
from ecospa_fx.passes.ir import relations as r
from ecospa_fx.passes.ir.patterns import DimKey, bind


@dataclass(frozen=True, eq=False)
class Along:
    """Positions of `dim` belong to the entries at them."""

    expr: Expr
    dim: int


@dataclass(frozen=True, eq=False)
class ChosenBy:
    """Positions belong to the entries that `index` names there; `at`: the dim of the value for each dim of it."""

    expr: Expr
    index: fx.Node
    at: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Grouped:
    """Positions of `dim` belong to entries in order; `ends` has the end of each."""

    expr: Expr
    ends: fx.Node
    dim: int


@dataclass(frozen=True, eq=False)
class Passed:
    """Positions belong to entries as those of `source` do, through an op; None where it is one of several results."""

    source: fx.Node
    relation: r.Relation | None


Origin: TypeAlias = Along | ChosenBy | Grouped | Passed


@dataclass(frozen=True, eq=False)
class Owned:
    """A value whose positions along `dims` belong to entries.

    Attributes:
        node: the value.
        dims: dims along which the entry differs.
        origin: how the entries are told.
        features: atoms that are axes of weights on the way here, the entries' own axis and its context left out.
        weights: parameters in which the value is linear, all of them together.
        made: an activation has entered; otherwise it is weights alone.
    """

    node: fx.Node
    dims: frozenset[int]
    origin: Origin
    features: frozenset[Atom]
    weights: frozenset[str]
    made: bool


@dataclass(frozen=True, eq=False)
class Sum:
    """A place where contributions of entries are added up, or where they can be told apart no longer.

    Attributes:
        owned: the contributions; where there are `factors`, these are its products with them.
        users: the op; several where the contributions go into several ops without being added up.
        factors: the other operands of a product that the op sums up; none if it adds.
        weights: parameters in which the contributions are linear, all of them together.
        features: atoms that are axes of weights, of what is added up.
    """

    owned: Owned
    users: tuple[fx.Node, ...]
    factors: tuple[r.Operand, ...]
    weights: frozenset[str]
    features: frozenset[Atom]


@dataclass(frozen=True, eq=False)
class Contributions:
    """The sums of one axis, and all owned values by node."""

    sums: tuple[Sum, ...]
    owned: dict[fx.Node, Owned]


def keys_of(relation: r.Pattern) -> tuple[list[list[DimKey]], list[DimKey]]:
    """Return the key of each dim of each operand of a pattern, and of its first output."""
    pattern = bind(relation.spec, len(relation.operands), tuple(relation.sizes))
    keys = [list(term.keys_of(o.shape)) for term, o in zip(pattern.operands, relation.operands, strict=True)]
    hidden = sorted({key for own in keys for key in own if isinstance(key, str) and key.startswith(".")},
                    key=lambda key: -int(key[1:]))  # fmt: skip
    result: list[DimKey] = []
    for key in pattern.outputs[0].keys_of((0,) * len(pattern.outputs[0].dims)):
        result += hidden if isinstance(key, str) and key.startswith(".") else [key]
    return keys, result
