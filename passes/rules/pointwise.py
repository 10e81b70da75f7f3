"""Pointwise ops: they act entry by entry, and operands that meet at one position share their axes."""

from __future__ import annotations

from typing import Any

import torch

from ecospa_fx.passes.graph.boundary_op import edge
from ecospa_fx.passes.ir.relations import Operand, Pointwise, SameDims

from . import formulas as f
from .operands import tensors
from .registry import axis_rule

aten = torch.ops.aten


def linear(*args: Any, **_: Any) -> Pointwise:
    """Entries of a sum meet only entries at the same position."""
    operands = tensors(*args)
    return Pointwise(operands, "linear" if len(operands) == len(args) else "affine")


def multiplied(*args: Any, **_: Any) -> Pointwise:
    """Entries of a product meet only entries at the same position."""
    return Pointwise(tensors(*args), "product")


def divided(*args: Any, rounding_mode: str | None = None, **_: Any) -> Pointwise:
    """Entries of a quotient meet only entries at the same position."""
    return Pointwise(tensors(*args), "quotient" if rounding_mode is None else "nonlinear")


def nonlinear(*args: Any, **_: Any) -> Pointwise:
    """Entries meet only entries at the same position."""
    return Pointwise(tensors(*args), "nonlinear")


@axis_rule(aten.broadcast_tensors.default)
def broadcast_tensors(xs: list[Operand]) -> Pointwise:
    """The operands are repeated to one shape."""
    return Pointwise(tuple(xs), "linear")


@axis_rule(aten.dropout, aten.dropout_, aten.feature_dropout)
def dropout(x: Operand, p: float, train: bool) -> Pointwise:
    """Entries are dropped one by one."""
    return Pointwise((x,), "nonlinear" if train and p > 0 else "copy")


def copied(x: Operand, *_: Any, **__: Any) -> Pointwise:
    """Entries stay at their positions, at most in another dtype, device or memory layout."""
    return Pointwise((x,), "copy")


def component(x: Operand) -> Pointwise:
    """One component of each complex number is taken."""
    return Pointwise((x,), "linear" if x.node.meta["val"].is_complex() else "copy")


def shaped_like(x: Operand, *_: Any, **__: Any) -> SameDims:
    """New values are made, in the shape of the operand."""
    return SameDims(x)


axis_rule(aten.complex.default)(linear)
axis_rule(aten.add, formula=f.SUM)(linear)
axis_rule(aten.sub, formula=f.DIFFERENCE)(linear)
axis_rule(aten.add_, aten.sub_, aten.rsub, aten.neg, aten.neg_, aten.copy_)(linear)
axis_rule(aten.mul, aten.mul_, aten.multiply)(multiplied)
axis_rule(aten.div, aten.div_, aten.divide, aten.true_divide)(divided)
axis_rule(
    aten.to, aten._to_copy, aten.type_as, aten.clone, aten.contiguous, aten.alias, aten.detach, aten.detach_,
    aten.lift_fresh, aten.lift_fresh_copy, aten.positive,
)(copied)  # fmt: skip
axis_rule(edge)(copied)
axis_rule(aten.real, aten.imag)(component)
axis_rule(aten.empty_like, aten.rand_like, aten.randn_like)(shaped_like)
axis_rule(aten.zeros_like, formula=f.ZEROS)(shaped_like)
axis_rule(aten.ones_like, formula=f.ONES)(shaped_like)
axis_rule(aten.full_like, formula=f.SECOND)(shaped_like)
for _op, _formula in (
    (aten.ge, f.AT_LEAST), (aten.le, f.AT_MOST), (aten.gt, f.MORE), (aten.lt, f.LESS), (aten.eq, f.EQUAL),
    (aten.ne, f.UNEQUAL),
    (aten.logical_and, f.BOTH), (aten.bitwise_and, f.BOTH), (aten.__and__, f.BOTH),
    (aten.logical_or, f.EITHER), (aten.bitwise_or, f.EITHER), (aten.__or__, f.EITHER),
    (aten.logical_not, f.NOT), (aten.bitwise_not, f.NOT),
):  # fmt: skip
    axis_rule(_op, formula=_formula)(nonlinear)
axis_rule(
    # activations
    aten.relu, aten.relu_, aten.gelu, aten.gelu_, aten.silu, aten.silu_, aten.mish, aten.mish_, aten.elu, aten.elu_,
    aten.celu, aten.selu, aten.leaky_relu, aten.leaky_relu_, aten.hardtanh, aten.hardtanh_, aten.relu6, aten.relu6_,
    aten.hardswish, aten.hardswish_, aten.hardsigmoid, aten.hardsigmoid_, aten.softplus, aten.sigmoid, aten.sigmoid_,
    aten.log_sigmoid, aten.tanh, aten.tanh_,
    # elementary functions
    aten.exp, aten.expm1, aten.log, aten.log1p, aten.sin, aten.cos, aten.erf, aten.sqrt, aten.rsqrt, aten.square,
    aten.pow, aten.abs, aten.sign, aten.reciprocal, aten.floor, aten.ceil, aten.round, aten.sinh, aten.cosh, aten.tan,
    aten.atan, aten.acos, aten.asin, aten.atan2, aten.exp2, aten.log2, aten.log10, aten.trunc, aten.fmod,
    aten.logaddexp, aten.polar, aten.angle, aten.remainder, aten.floor_divide, aten.nan_to_num,
    # choosing and comparing
    aten.maximum, aten.minimum, aten.min.other, aten.max.other, aten.clamp, aten.clamp_, aten.clamp_min,
    aten.clamp_max, aten.clip, aten.where.self, aten.where.ScalarSelf,
    aten.where.ScalarOther, aten.where.Scalar, aten.masked_fill, aten.masked_fill_, aten.fill, aten.fill_, aten.zero_,
    aten.__xor__, aten.bitwise_xor, aten.logical_xor,
    aten.isnan, aten.isinf, aten.isfinite, aten.addcmul, aten.addcdiv, aten.lerp,
    # random masks
    aten.bernoulli, aten.bernoulli_,
)(nonlinear)  # fmt: skip
