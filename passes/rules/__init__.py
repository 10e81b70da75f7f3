"""What each op does to axes: one file per class of op. Importing this package fills the table."""

from . import contraction, convolution, indexing, norm, pointwise, reduction, shape  # noqa: F401  (they register)
from .registry import RULES, Rule, axis_rule

__all__ = ["RULES", "Rule", "axis_rule"]
