"""What each op does to axes: one file per class of op. Importing this package fills the table."""

from . import contraction, convolution, indexing, norm, pointwise, recurrent, reduction, shape, spectrum, window  # noqa: F401  (they register)
from .registry import RULES, Rule, axis_rule, rule_for

__all__ = ["RULES", "Rule", "axis_rule", "rule_for"]
