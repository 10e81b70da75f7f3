"""Names: ops that torch has twice or more, told once."""

from __future__ import annotations

import torch

from . import contraction, matrices, norm, parts, pointwise, reduction, shape, window  # noqa: F401  (they register)
from .registry import same_as

aten = torch.ops.aten

REMOVED = ("cholesky", "qr")  # from torch 2.14 on

for _op, _names in {
    aten.abs: "absolute", aten.acos: "arccos", aten.acosh: "arccosh", aten.asin: "arcsin", aten.asinh: "arcsinh",
    aten.atan: "arctan", aten.atan2: "arctan2", aten.atanh: "arctanh", aten.trunc: "fix", aten.neg: "negative",
    aten.gt: "greater", aten.ge: "greater_equal", aten.lt: "less", aten.le: "less_equal", aten.ne: "not_equal",
    aten.sub: "subtract", aten.mul: "multiply", aten.div: "divide true_divide", aten.clamp: "clip",
    aten.digamma: "special_digamma special_psi", aten.erf: "special_erf", aten.erfc: "special_erfc",
    aten.erfinv: "special_erfinv", aten.exp2: "special_exp2", aten.sigmoid: "special_expit",
    aten.expm1: "special_expm1", aten.igamma: "special_gammainc", aten.igammac: "special_gammaincc",
    aten.lgamma: "special_gammaln", aten.i0: "special_i0", aten.log1p: "special_log1p", aten.logit: "special_logit",
    aten.mvlgamma: "special_multigammaln", aten.round: "special_round", aten.sinc: "special_sinc",
    aten.xlogy: "special_xlogy", aten.softmax: "special_softmax", aten.log_softmax: "special_log_softmax",
    aten.logsumexp: "special_logsumexp",
    aten.matmul: "linalg_matmul", aten.outer: "ger", aten.linalg_det: "det", aten.linalg_inv: "inverse",
    aten.linalg_householder_product: "orgqr", aten.linalg_matrix_exp: "matrix_exp",
    aten.linalg_matrix_power: "matrix_power", aten.linalg_pinv: "pinverse", aten.linalg_cholesky: "cholesky",
    aten.linalg_svd: "svd", aten.linalg_qr: "qr", aten.linalg_slogdet: "slogdet",
    aten.grid_sampler: "grid_sampler_2d grid_sampler_3d", aten.vstack: "row_stack", aten.transpose: "swapaxes swapdims",
    aten.movedim: "moveaxis", aten.cat: "concat concatenate", aten.trapezoid: "trapz",
    aten.channel_shuffle: "native_channel_shuffle",
}.items():  # fmt: skip
    _there = [name for name in _names.split() if name not in REMOVED or hasattr(aten, name)]
    same_as(_op, *(getattr(aten, name) for name in _there))
