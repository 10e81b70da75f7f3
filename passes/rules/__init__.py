"""Rules: the effect of each op on axes, one file per class of op. Importing this package fills the table."""

from . import (  # noqa: F401  (they register)
    contraction,
    convolution,
    indexing,
    loss,
    matrices,
    names,
    norm,
    parts,
    pointwise,
    recurrent,
    reduction,
    refused,
    shape,
    spectrum,
    window,
)
from .formulas import Formula
from .registry import OPS, OpInfo, axis_rule, op_info, relation_of

__all__ = ["OPS", "Formula", "OpInfo", "axis_rule", "op_info", "relation_of"]
