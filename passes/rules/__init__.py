"""What each op does to axes: one file per class of op. Importing this package fills the table."""

from . import (  # noqa: F401  (they register)
    contraction,
    convolution,
    indexing,
    norm,
    pointwise,
    recurrent,
    reduction,
    shape,
    spectrum,
    window,
)
from .registry import RULES, Rule, axis_rule, rule_for

__all__ = ["RULES", "Rule", "axis_rule", "rule_for"]
