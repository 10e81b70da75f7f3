"""The table of axis rules, and the vocabulary in which a rule says what its op does to axes.

A rule takes the arguments of its op (tensors as `Operand`s, the rest as they are), returns a *relation* and touches no
state; `passes.infer.solve` is the one solver that reads relations. The first line of a rule's docstring is what a user
reads as the reason when the rule pins an axis.

Contractions are strings, `"b m k, b k n -> b m n"`, in the language of `passes.ir.patterns`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

from ecospa_fx.passes.ir.relations import Created, Relation

if TYPE_CHECKING:
    from ecospa_fx.passes.ir.op_site import OpSite


Resize: TypeAlias = "Callable[[OpSite], None]"


Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rule:
    """An axis rule and, where the op holds sizes as arguments, how those follow a shrink."""

    axes: Callable[..., Relation | str]
    resize: Resize | None

    @property
    def why(self) -> str:
        """The reason given when this rule pins an axis."""
        return (self.axes.__doc__ or "").strip().split("\n")[0].rstrip(".")


RULES: dict[Any, Rule] = {operator.getitem: Rule(lambda *_: Created(), None)}


def axis_rule(*ops: Any, resize: Resize | None = None) -> Callable[[Function], Function]:
    """Register what a class of ops does to axes.

    Args:
        ops: overloads (`aten.view.default`), packets (`aten.gelu`, meaning each of its overloads), or the
            qualified name of an op that another library may register later.
        resize: writes new sizes into the op's arguments after a shrink, see `passes.ir.op_site.OpSite`.

    Raises:
        ValueError: an op has a rule already.
    """

    def register(rule: Function) -> Function:
        for op in ops:
            for overload in overloads(op):
                if overload in RULES:
                    raise ValueError(f"{overload} has an axis rule already: {RULES[overload].axes.__name__}")
                RULES[overload] = Rule(rule, resize)
        return rule

    return register


def rule_for(target: Any) -> Rule | None:
    """The rule of an op, if there is one."""
    rule = RULES.get(target)
    if rule is None and isinstance(target, torch._ops.OpOverload):
        rule = RULES.get(target.name())
    return rule


def overloads(op: Any) -> Sequence[Any]:
    """The overloads an op stands for."""
    if isinstance(op, torch._ops.OpOverloadPacket):
        every = [getattr(op, name) for name in op.overloads()]
        # By their arguments, not by name: `dtype_layout` has an "out" in it too.
        return [overload for overload in every if not any(a.is_out for a in overload._schema.arguments)]
    return [op]
