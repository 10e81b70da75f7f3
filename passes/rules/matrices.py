"""Matrices: factors, inverses and solutions, in which every entry of a matrix counts; those of a batch stay apart."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ecospa_fx.passes.ir.relations import Opaque, Operand, Pattern, Relation

from .operands import letters, spaced
from .registry import axis_rule

if TYPE_CHECKING:
    from ecospa_fx.passes.ir.op_site import OpSite

aten = torch.ops.aten


def _of_matrices(spec: str, *ops: Any) -> None:
    """Register ops that take matrices, and numbers or tensors that say how."""
    given = spec.split("->")[0].count(",") + 1

    def of_matrices(*args: Any, **how: Any) -> Relation:
        """Every entry of a matrix counts in every entry of the result."""
        operands = tuple(arg for arg in (*args, *how.values()) if isinstance(arg, Operand))
        return Pattern(spec, operands, apart=True) if len(operands) == given else Opaque(operands)

    axis_rule(*ops)(of_matrices)


for _spec, _ops in {
    "... m! n! -> ... k! l!": (
        aten.linalg_cholesky, aten.cholesky_inverse, aten.linalg_inv, aten.linalg_pinv, aten.linalg_matrix_exp,
        aten.linalg_matrix_power,
    ),
    "... m! n! -> ...": (aten.linalg_det, aten.logdet, aten.linalg_cond, aten.linalg_matrix_rank),
    "... m! n! -> ... k!": (aten.linalg_eigvals, aten.linalg_eigvalsh, aten.linalg_svdvals),
    "... m! n! -> ..., ...": (aten.linalg_slogdet,),
    "... m! n! -> ... k! l!, ...": (aten.linalg_cholesky_ex, aten.linalg_inv_ex),
    "... m! n! -> ... k!, ... l! o!": (aten.linalg_eig, aten.linalg_eigh),
    "... m! n! -> ... k! l!, ... o! p!": (aten.linalg_qr,),
    "... m! n! -> ... k! l!, ... o!": (aten.geqrf, aten.linalg_lu_factor, aten.linalg_ldl_factor),
    "... m! n! -> ... k! l!, ... o!, ...": (
        aten.linalg_lu_factor_ex, aten.linalg_ldl_factor_ex, aten._lu_with_info,
    ),
    "... m! n! -> ... k! l!, ... o!, ... p! q!": (aten.linalg_svd,),
    "... m! n! -> ... k! l!, ... o! p!, ... q! r!": (aten.linalg_lu,),
    "... m! n!, +... k! -> ... o! p!, ... q! r!, ... s! u!": (aten.lu_unpack,),
    "... m! n!, ... k! -> ... o! p!": (aten.linalg_householder_product,),
    # Each column that is solved for has a solution of its own.
    "... n! k, ... m! n! -> ... m! k": (aten.cholesky_solve,),
    "... n! k, ... m! n! -> ... m! k, ... o! p!": (aten.triangular_solve,),
    "... n! k, ... m! n!, ... p! -> ... m! k": (aten.lu_solve,),
    "... m! n!, ... p!, ... n! k -> ... m! k": (aten.linalg_ldl_solve,),
}.items():  # fmt: skip
    _of_matrices(_spec, *_ops)


@axis_rule(aten.linalg_solve_triangular)
def solve_triangular(a: Operand, b: Operand, *, left: bool = True, **_: Any) -> Pattern:
    """Every entry of a matrix counts in every entry of the result."""
    return Pattern(_solved(left), (a, b), apart=True)


@axis_rule(aten.linalg_lu_solve)
def lu_solve(a: Operand, pivots: Operand, b: Operand, *, left: bool = True, **_: Any) -> Pattern:
    """Every entry of a matrix counts in every entry of the result."""
    return Pattern(_solved(left).replace(",", ", ... p!,", 1), (a, pivots, b), apart=True)


@axis_rule(aten.linalg_solve)
def solve(a: Operand, b: Operand, *, left: bool = True, **_: Any) -> Pattern:
    """Every entry of a matrix counts in every entry of the result."""
    vectors = b.ndim == 1 or (a.ndim - 1 == b.ndim and b.shape == a.shape[:-1])
    return Pattern("... m! n!, ... n! -> ... m!" if vectors else _solved(left), (a, b), apart=True)


@axis_rule(aten.linalg_solve_ex)
def solve_ex(a: Operand, b: Operand, *, left: bool = True, **_: Any) -> Pattern:
    """Every entry of a matrix counts in every entry of the result."""
    found = solve(a, b, left=left)
    return replace(found, spec=f"{found.spec}, ...")


@axis_rule(aten.ormqr.default)
def ormqr(a: Operand, factors: Operand, b: Operand, left: bool = True, *_: Any) -> Pattern:
    """Every entry of a matrix counts in every entry of the result."""
    return Pattern(_solved(left).replace(",", ", ... p!,", 1).replace("m! n!", "o! q!", 1), (a, factors, b), apart=True)


def _solved(left: bool) -> str:
    return "... m! n!, ... n! k -> ... m! k" if left else "... m! n!, ... k n! -> ... k m!"


def keep_powers(site: OpSite) -> None:
    """Write the number of powers: without one, there are as many as the axis has entries."""
    if site.args["N"] is None:
        site.args["N"] = site.operands[0].shape[-1]


@axis_rule(aten.linalg_vander.default, resize=keep_powers)
def powers(x: Operand, **_: Any) -> Pattern:
    """Each entry becomes a row of its powers."""
    return Pattern("... n -> ... n powers!", (x,), apart=True)


@axis_rule(aten.cov.default, aten.corrcoef.default)
def covariance(x: Operand, *, correction: int = 1, fweights: Operand | None = None,
               aweights: Operand | None = None) -> Pattern:  # fmt: skip
    """Every row has a covariance with every other."""
    weights = tuple(w for w in (fweights, aweights) if w is not None)
    spec = "k~" if x.ndim == 1 else "m! k~" if x.ndim else ""
    return Pattern(f"{spec}{', +k~' * len(weights)} -> {'a! b!' if x.ndim > 1 else ''}", (x, *weights), apart=True)


@axis_rule(aten.pdist.default)
def pairs(x: Operand, *_: Any) -> Pattern:
    """Each entry of the result is the distance of a pair."""
    return Pattern("n! d~ -> pairs!", (x,), apart=True)


@axis_rule(aten.cosine_similarity.default)
def cosine_similarity(a: Operand, b: Operand, dim: int = 1, *_: Any) -> Pattern | Opaque:
    """Every entry along the axis counts in the angle."""
    if a.ndim != b.ndim or a.ndim == 0:
        return Opaque((a, b))
    own = letters(a, dim, "along~")
    return Pattern(f"{own}, {own} -> {own.replace('along~', '')}", (a, b), apart=True)


@axis_rule(aten.pairwise_distance.default)
def pairwise_distance(a: Operand, b: Operand, p: float = 2.0, eps: float = 0.0, keepdim: bool = False) -> Pattern:
    """Every entry along the axis counts in the distance."""
    return Pattern(f"... along~, ... along~ -> ...{' one!' * keepdim}", (a, b), apart=True)


@axis_rule(aten.renorm.default, aten.embedding_renorm_.default)
def renorm(x: Operand, how: Any, dim: int | float = 0, *_: Any) -> Pattern:
    """Every entry counts in the norm that is brought down to a largest one."""
    if isinstance(how, Operand):
        return Pattern(f"v! e!, {spaced('i', how.ndim)} -> v! e!", (x, how), apart=True)
    own = " ".join(f"d{d}" if d == dim % x.ndim else f"d{d}~" for d in range(x.ndim))
    return Pattern(f"{own} -> {own}", (x,), apart=True)
