"""Registry: the table of ops, one `OpInfo` each, which holds all that is known of an op.

A rule takes the arguments of its op (tensors as `Operand`s, the rest as they are), returns a *relation* and touches no
state; `passes.infer.solve` is the one solver that reads relations. The first line of a rule's docstring is a sentence
about the axis, which users read as the reason when the rule pins it.

Contractions are strings, `"b m k, b k n -> b m n"`, in the language of `passes.ir.patterns`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import fx

from ecospa_fx.errors import PatternError, RuleError
from ecospa_fx.passes.axes.algebra import UNIT, as_size
from ecospa_fx.passes.graph.nodes import is_tensor, op_name, place, tensor_meta, tensors_of
from ecospa_fx.passes.ir.patterns import bind
from ecospa_fx.passes.ir.relations import Created, Opaque, Operand, Pattern, Relation

from .formulas import Formula
from .operands import tensors

if TYPE_CHECKING:
    from ecospa_fx.passes.ir.op_site import OpSite


Resize: TypeAlias = "Callable[[OpSite], None]"


_AxisRule = TypeVar("_AxisRule", bound=Callable[..., Any])


@dataclass(frozen=True)
class OpInfo:
    """The knowledge about one op.

    Its relation (`passes.ir.relations`) tells if it moves entries, is linear, or hands a weight on; torch tells its
    spelling in Python (`passes.rewrite.spelling`). Neither is written down a second time.

    Attributes:
        axes: takes the arguments of the op and returns the relation between the axes of its operands and results.
        resize: rewrites the sizes among the op's arguments after a shrink.
        formula: gives an entry of the result, where it is an integer or a condition, from those of the operands at the
            same position; see `passes.simplify.symbolic_entries`.
        refused: every axis stays whole, on purpose; the rule says why.
    """

    axes: Callable[..., Relation | str]
    resize: Resize | None = None
    formula: Formula | None = None
    refused: bool = False

    @property
    def why(self) -> str:
        """The reason that users read when this rule pins an axis."""
        return (self.axes.__doc__ or "").strip().split("\n")[0].rstrip(".")


OPS: dict[Any, OpInfo] = {operator.getitem: OpInfo(lambda *_: Created())}


def axis_rule(
    *ops: Any, resize: Resize | None = None, formula: Formula | None = None
) -> Callable[[_AxisRule], _AxisRule]:
    """Register the axis rule of a class of ops, with what else is known of them.

    Variants of an op that write into their operand (`add_`) or copy what it shares (`view_copy`) have its rule, too.

    Args:
        ops: overloads (`aten.view.default`), packets (`aten.gelu`, meaning each of its overloads), or the
            qualified name of an op that another library may register later.
        resize: rewrites the sizes among the op's arguments after a shrink, see `passes.ir.op_site.OpSite`.
        formula: see `OpInfo`.

    Raises:
        ValueError: an op has a rule already.
    """

    def register(rule: _AxisRule) -> _AxisRule:
        for op in ops:
            for overload in overloads(op):
                _add(overload, OpInfo(rule, resize, formula))
            for overload in _variants(op):
                _add(overload, OpInfo(rule, resize))
        return rule

    return register


def refuse(reason: str, *ops: Any) -> None:
    """Register ops of which every axis stays whole, for a reason that users read."""

    def refused(*args: Any, **kwargs: Any) -> Opaque:
        return Opaque(tensors(*args, *kwargs.values()))

    refused.__doc__ = reason
    for op in ops:
        for overload in overloads(op):
            _add(overload, OpInfo(refused, refused=True))


def same_as(op: Any, *names: Any) -> None:
    """Register ops that torch also has under other names: `arccos` is `acos`."""
    info = next(OPS[overload] for overload in overloads(op) if overload in OPS)
    for name in names:
        for overload in (*overloads(name), *_variants(name)):
            _add(overload, info)


def _add(op: Any, info: OpInfo) -> None:
    if op in OPS:
        raise ValueError(f"{op} has an axis rule already: {OPS[op].axes.__name__}")
    OPS[op] = info


def _variants(op: Any) -> Sequence[Any]:
    """Return the overloads that do what `op` does in place or into a copy, but for those that reshape their operand."""
    whole = isinstance(op, torch._ops.OpOverloadPacket)
    if not whole and not isinstance(op, torch._ops.OpOverload):
        return []
    packet = op if whole else op.overloadpacket
    if packet._qualified_op_name.split("::")[0] != "aten":
        return []
    found = (getattr(torch.ops.aten, f"{packet.__name__}{ending}", None) for ending in ("_", "_copy"))
    every = [overload for variant in found if variant is not None for overload in overloads(variant)]
    return [
        overload
        for overload in every
        if torch.Tag.inplace_view not in overload.tags and (whole or overload._overloadname == op._overloadname)
    ]


def op_info(target: Any) -> OpInfo | None:
    """Return the entry of an op in the table, or None."""
    info = OPS.get(target)
    if info is None and isinstance(target, torch._ops.OpOverload):
        info = OPS.get(target.name())
    return info


def relation_of(node: fx.Node, operands: Sequence[Operand] | None = None, region: str = "") -> Relation | None:
    """Return the relation that the rule of an op gives for one of its calls; None where it has no rule.

    Args:
        node: the call.
        operands: its tensor arguments in order; without them, the operands of the relation have no known axes.
        region: name of the region, for messages.

    Raises:
        RuleError: the rule failed.
    """
    info = op_info(node.target)
    if info is None or not tensor_meta(node):
        return None
    operands = _operands_without_axes(node) if operands is None else operands
    waiting = iter(operands)

    def as_argument(value: Any) -> Any:
        if isinstance(value, fx.Node):
            val = value.meta["val"]
            return next(waiting) if is_tensor(value) else _number(val)
        if isinstance(value, (list, tuple)):
            return [as_argument(item) for item in value]
        return value

    try:
        args, kwargs = as_argument(node.args), {name: as_argument(value) for name, value in node.kwargs.items()}
        relation = info.axes(*args, **kwargs)
    except Exception as error:
        raise RuleError(
            f"the axis rule `{info.axes.__name__}` failed on {op_name(node)} ({place(node, region)}) with "
            f"{type(error).__name__}: {error}; this is a bug in the rule, nothing was changed"
        ) from error
    if isinstance(relation, str):
        relation = Pattern(relation, tuple(operands))
    if isinstance(relation, Pattern):
        try:
            bind(relation.spec, len(relation.operands), tuple(relation.sizes))
        except PatternError as error:
            raise PatternError(
                f"the axis rule `{info.axes.__name__}` gives {op_name(node)} ({place(node, region)}) a pattern that is "
                f"wrong: {error}\nthis is a bug in the rule, nothing was changed"
            ) from error
    return relation


def _number(value: Any) -> Any:
    """Return what a rule sees of a number that a graph computes: a size, or the expression of another number."""
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return value.node.expr
    return as_size(value) if isinstance(value, (int, torch.SymInt)) else value


def _operands_without_axes(node: fx.Node) -> tuple[Operand, ...]:
    """Return the tensor arguments of a call, with sizes but without known axes."""
    shapes = [(arg, tuple(map(as_size, arg.meta["val"].shape))) for arg in tensors_of(node)]
    return tuple(Operand(tuple(UNIT for _ in shape), shape, arg, False) for arg, shape in shapes)


def overloads(op: Any) -> Sequence[Any]:
    """Return the overloads that an op stands for."""
    if isinstance(op, torch._ops.OpOverloadPacket):
        every = [getattr(op, name) for name in op.overloads()]
        # `out` variants are told by their arguments, not by name: `dtype_layout` has an "out" in it too.
        return [overload for overload in every if not any(a.is_out for a in overload._schema.arguments)]
    return [op]
