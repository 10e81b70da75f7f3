"""Pointwise ops: they act entry by entry, and operands that meet at one position share their axes."""

from __future__ import annotations

from typing import Any

import torch

from ecospa_fx.passes.graph.boundary_op import edge
from ecospa_fx.passes.ir.relations import Operand, Pattern, Pointwise, SameDims

from . import formulas as f
from .operands import letters, tensors
from .registry import axis_rule

aten = torch.ops.aten
SPECIAL = (  # functions, called `special_` and this
    "airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 spherical_bessel_j0 modified_bessel_i0 modified_bessel_i1 "
    "modified_bessel_k0 modified_bessel_k1 scaled_modified_bessel_k0 scaled_modified_bessel_k1 i0e i1 i1e entr "
    "erfcx ndtr ndtri log_ndtr xlog1py zeta polygamma chebyshev_polynomial_t chebyshev_polynomial_u "
    "chebyshev_polynomial_v chebyshev_polynomial_w shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u "
    "shifted_chebyshev_polynomial_v shifted_chebyshev_polynomial_w hermite_polynomial_h hermite_polynomial_he "
    "laguerre_polynomial_l legendre_polynomial_p"
)


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


def compared(*args: Any, **_: Any) -> Pointwise:
    """Entries are compared with entries at the same position."""
    return Pointwise(tensors(*args), "nonlinear", compares=True)


@axis_rule(aten.broadcast_tensors.default)
def broadcast_tensors(xs: list[Operand]) -> Pointwise:
    """The operands are repeated to one shape."""
    return Pointwise(tuple(xs), "linear")


@axis_rule(aten.dropout, aten.native_dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout)
def dropout(x: Operand, p: float, train: bool | None) -> Pointwise:
    """Entries are dropped one by one."""
    return Pointwise((x,), "nonlinear" if train is not False and p > 0 else "copy")


def copied(x: Operand, *_: Any, **__: Any) -> Pointwise:
    """Entries stay at their positions, at most in another dtype, device or memory layout."""
    return Pointwise((x,), "copy")


def component(x: Operand) -> Pointwise:
    """One component of each complex number is taken."""
    return Pointwise((x,), "linear" if x.node.meta["val"].is_complex() else "copy")


@axis_rule(aten.conj, aten._conj, aten.conj_physical, aten._conj_physical, aten.resolve_conj)
def conjugated(x: Operand) -> Pointwise:
    """Each complex number is conjugated."""
    return Pointwise((x,), "nonlinear" if x.node.meta["val"].is_complex() else "copy")


def shaped_like(x: Operand, *_: Any, **__: Any) -> SameDims:
    """New values are made, in the shape of the operand."""
    return SameDims(x, empty=True)


@axis_rule(aten.fake_quantize_per_channel_affine.default, aten.quantize_per_channel.default)
def per_channel(x: Operand, scale: Operand, zero: Operand, axis: int, *_: Any) -> Pattern:
    """Each channel is rounded by a scale of its own."""
    return Pattern(f"{letters(x, axis, 'c')}, +c, +c -> {letters(x, axis, 'c')}", (x, scale, zero), apart=True)


axis_rule(aten.complex.default)(linear)
axis_rule(aten.add, formula=f.SUM)(linear)
axis_rule(aten.sub, formula=f.DIFFERENCE)(linear)
axis_rule(aten.rsub, aten.neg, aten.copy, aten.deg2rad, aten.rad2deg, aten._neg_view)(linear)
axis_rule(aten.mul)(multiplied)
axis_rule(aten.div)(divided)
axis_rule(
    aten.to, aten._to_copy, aten.type_as, aten.clone, aten.contiguous, aten.alias, aten.detach, aten.detach_,
    aten.lift_fresh, aten.positive, aten.resolve_neg,
)(copied)  # fmt: skip
axis_rule(edge)(copied)
axis_rule(aten.real, aten.imag)(component)
axis_rule(aten.empty_like, aten.rand_like, aten.randn_like, aten.randint_like)(shaped_like)
axis_rule(aten.normal_, aten.uniform_, aten.random_, aten.exponential_, aten.cauchy_, aten.log_normal_,
          aten.geometric_)(shaped_like)  # fmt: skip
axis_rule(aten.zeros_like, formula=f.ZEROS)(shaped_like)
axis_rule(aten.ones_like, formula=f.ONES)(shaped_like)
axis_rule(aten.full_like, formula=f.SECOND)(shaped_like)
for _op, _formula in (
    (aten.ge, f.AT_LEAST), (aten.le, f.AT_MOST), (aten.gt, f.MORE), (aten.lt, f.LESS), (aten.eq, f.EQUAL),
    (aten.ne, f.UNEQUAL),
):  # fmt: skip
    axis_rule(_op, formula=_formula)(compared)
for _op, _formula in (
    (aten.logical_and, f.BOTH), (aten.bitwise_and, f.BOTH), (aten.__and__, f.BOTH),
    (aten.logical_or, f.EITHER), (aten.bitwise_or, f.EITHER), (aten.__or__, f.EITHER),
    (aten.logical_not, f.NOT), (aten.bitwise_not, f.NOT),
):  # fmt: skip
    axis_rule(_op, formula=_formula)(nonlinear)
axis_rule(
    # activations
    aten.relu, aten.gelu, aten.silu, aten.mish, aten.elu, aten.celu, aten.selu, aten.leaky_relu, aten.hardtanh,
    aten.relu6, aten.hardswish, aten.hardsigmoid, aten.softplus, aten.sigmoid, aten.log_sigmoid, aten.tanh, aten.rrelu,
    aten.hardshrink, aten.softshrink, aten.threshold,
    # elementary functions
    aten.exp, aten.expm1, aten.log, aten.log1p, aten.sin, aten.cos, aten.erf, aten.sqrt, aten.rsqrt, aten.square,
    aten.pow, aten.float_power, aten.abs, aten.sign, aten.sgn, aten.reciprocal, aten.floor, aten.ceil, aten.round,
    aten.frac, aten.trunc, aten.sinh, aten.cosh, aten.tan, aten.atan, aten.acos, aten.asin, aten.asinh, aten.acosh,
    aten.atanh, aten.atan2, aten.hypot, aten.exp2, aten.log2, aten.log10, aten.fmod, aten.remainder, aten.floor_divide,
    aten.logaddexp, aten.logaddexp2, aten.polar, aten.angle, aten.ldexp, aten.frexp, aten.nan_to_num, aten.copysign,
    aten.nextafter, aten.gcd, aten.lcm,
    # special functions
    aten.erfc, aten.erfinv, aten.sinc, aten.i0, aten.lgamma, aten.digamma, aten.polygamma, aten.mvlgamma, aten.igamma,
    aten.igammac, aten.logit, aten.xlogy, aten.heaviside,
    *(getattr(aten, f"special_{name}") for name in SPECIAL.split()),
    # choosing and comparing
    aten.maximum, aten.minimum, aten.min.other, aten.max.other, aten.fmax, aten.fmin, aten.clamp, aten.clamp_min,
    aten.clamp_max, aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar,
    aten.masked_fill, aten.fill, aten.zero, aten.addcmul, aten.addcdiv, aten.lerp, aten.isclose,
    aten.isnan, aten.isinf, aten.isfinite, aten.isneginf, aten.isposinf, aten.isreal, aten.signbit,
    # bits
    aten.__xor__, aten.bitwise_xor, aten.logical_xor, aten.bitwise_left_shift, aten.bitwise_right_shift,
    aten.__lshift__, aten.__rshift__, aten.__iand__, aten.__ior__, aten.__ixor__, aten.__ilshift__, aten.__irshift__,
    # random values
    aten.bernoulli, aten.poisson, aten.binomial, aten.normal.Tensor_Tensor, aten.normal.Tensor_float,
    aten.normal.float_Tensor,
    # numbers of few bits
    aten.fake_quantize_per_tensor_affine, aten.quantize_per_tensor.default, aten.quantize_per_tensor.tensor_qparams,
    aten.dequantize.self, aten.chalf,
    # gradients
    aten.sigmoid_backward, aten.tanh_backward, aten.silu_backward, aten.gelu_backward, aten.threshold_backward,
    aten.native_dropout_backward,
)(nonlinear)  # fmt: skip
