"""Formulas: an entry of a result, an integer or a condition, as a function of the operands' entries at its position.

Masks are made of such ops. `passes.simplify.symbolic_entries` computes with them at a symbolic index, so that its
result holds at every size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import sympy


@dataclass(frozen=True)
class Formula:
    """An op as arithmetic on entries.

    Attributes:
        takes: the kind of its operands; there is no formula for others. Of `"arguments"`, every entry is one number.
        entry: function of `nonnegative`, which makes the condition that an integer expression is at least 0, and of the
            operands' entries, or of the op's arguments.
    """

    takes: Literal["integers", "conditions", "arguments"]
    entry: Callable[..., Any]


SUM = Formula("integers", lambda _, a, b: a + b)
DIFFERENCE = Formula("integers", lambda _, a, b: a - b)
AT_LEAST = Formula("integers", lambda nonnegative, a, b: nonnegative(a - b))
AT_MOST = Formula("integers", lambda nonnegative, a, b: nonnegative(b - a))
MORE = Formula("integers", lambda nonnegative, a, b: nonnegative(a - b - 1))
LESS = Formula("integers", lambda nonnegative, a, b: nonnegative(b - a - 1))
EQUAL = Formula("integers", lambda nonnegative, a, b: sympy.And(nonnegative(a - b), nonnegative(b - a)))
UNEQUAL = Formula("integers", lambda nonnegative, a, b: sympy.Not(sympy.And(nonnegative(a - b), nonnegative(b - a))))
BOTH = Formula("conditions", lambda _, a, b: sympy.And(a, b))
EITHER = Formula("conditions", lambda _, a, b: sympy.Or(a, b))
NOT = Formula("conditions", lambda _, a: sympy.Not(a))
ZEROS = Formula("arguments", lambda _, *arguments: 0)
ONES = Formula("arguments", lambda _, *arguments: 1)
FIRST = Formula("arguments", lambda _, *arguments: arguments[0])
SECOND = Formula("arguments", lambda _, *arguments: arguments[1])
THIRD = Formula("arguments", lambda _, *arguments: arguments[2])
