"""Contractions: ops in which axes are multiplied together and summed over, where weights meet."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ecospa_fx.passes.ir.relations import Opaque, Operand, Pattern, Pointwise

from .operands import letters, spaced
from .registry import axis_rule

if TYPE_CHECKING:
    from ecospa_fx.passes.ir.op_site import OpSite

aten = torch.ops.aten


@axis_rule(aten.linear.default)
def linear(x: Operand, weight: Operand, bias: Operand | None = None) -> str:
    """`k` is contracted with the weight, whose `n` stays free."""
    return "... k, n k, +n -> ... n"


@axis_rule(aten.addmm.default)
def addmm(bias: Operand, x: Operand, weight: Operand, **_: Any) -> str:
    """`k` is contracted, `m` and `n` stay free; the bias is added to the product."""
    return f"+{' '.join('mn'[2 - bias.ndim :])}, m k, k n -> m n"


@axis_rule(aten.mm.default)
def mm(a: Operand, b: Operand) -> str:
    """`k` is contracted, `m` and `n` stay free."""
    return "m k, k n -> m n"


@axis_rule(aten.bmm.default)
def bmm(a: Operand, b: Operand) -> str:
    """Batched product: `k` is contracted, `b` is shared, `m` and `n` stay free."""
    return "b m k, b k n -> b m n"


@axis_rule(aten.baddbmm.default)
def baddbmm(bias: Operand, a: Operand, b: Operand, **_: Any) -> str:
    """`k` is contracted, `b` is shared, `m` and `n` stay free; the bias is added to the product."""
    return f"+{' '.join('bmn'[3 - bias.ndim :])}, b m k, b k n -> b m n"


@axis_rule(aten.addmv.default)
def addmv(bias: Operand, matrix: Operand, vector: Operand, **_: Any) -> str:
    """`k` is contracted, `m` stays free; the bias is added to the product."""
    return f"+{'m' * bias.ndim}, m k, k -> m"


@axis_rule(aten.addbmm.default)
def addbmm(bias: Operand, a: Operand, b: Operand, **_: Any) -> str:
    """`k` and the batch `b` are contracted, `m` and `n` stay free; the bias is added to the product."""
    return f"+{' '.join('mn'[2 - bias.ndim :])}, b m k, b k n -> m n"


@axis_rule(aten.outer.default)
def outer(a: Operand, b: Operand) -> str:
    """Every entry is multiplied with every other."""
    return "m, n -> m n"


@axis_rule(aten.addr.default)
def addr(bias: Operand, a: Operand, b: Operand, **_: Any) -> str:
    """Every entry is multiplied with every other; the bias is added to the product."""
    return f"+{' '.join('mn'[2 - bias.ndim :])}, m, n -> m n"


@axis_rule(aten.inner.default)
def inner(a: Operand, b: Operand) -> Pattern | Pointwise:
    """The last dims are multiplied and summed over."""
    if a.ndim == 0 or b.ndim == 0:
        return Pointwise((a, b), "product")
    left, right = spaced("m", a.ndim - 1), spaced("n", b.ndim - 1)
    return Pattern(f"{left} k, {right} k -> {left} {right}", (a, b))


@axis_rule(aten.linalg_vecdot.default)
def vecdot(a: Operand, b: Operand, *, dim: int = -1) -> Pattern | Opaque:
    """The entries along the axis are multiplied and summed over."""
    if dim == -1:
        return Pattern("... k, ... k -> ...", (a, b))
    if a.ndim != b.ndim:
        return Opaque((a, b))
    own = letters(a, dim, "along")
    return Pattern(f"{own}, {own} -> {own.replace('along', '')}", (a, b))


@axis_rule(aten.tensordot.default)
def tensordot(a: Operand, b: Operand, dims: list[int], others: list[int]) -> Pattern:
    """The dims that are named are multiplied and summed over."""
    left, right = [f"m{i}" for i in range(a.ndim)], [f"n{i}" for i in range(b.ndim)]
    for i, (d, e) in enumerate(zip(dims, others, strict=True)):
        left[d], right[e] = f"k{i}", f"k{i}"
    out = " ".join(letter for letter in (*left, *right) if letter[0] != "k")
    return Pattern(f"{' '.join(left)}, {' '.join(right)} -> {out}", (a, b))


@axis_rule(aten.bilinear.default)
def bilinear(a: Operand, b: Operand, weight: Operand, bias: Operand | None = None) -> str:
    """`i` and `j` are contracted with the weight, whose `o` stays free."""
    return "... i, ... j, o i j, +o -> ... o"


@axis_rule(aten.kron.default)
def kron(a: Operand, b: Operand) -> Pattern:
    """Every entry is multiplied with every other."""
    both = max(a.ndim, b.ndim)
    left, right = ([f"{name}{i}" for i in range(both - x.ndim, both)] for name, x in (("m", a), ("n", b)))
    missing = both - min(a.ndim, b.ndim)
    out = [*(left if a.ndim > b.ndim else right)[:missing], *(f"(m{i} n{i})" for i in range(missing, both))]
    return Pattern(f"{' '.join(left)}, {' '.join(right)} -> {' '.join(out)}", (a, b))


@axis_rule(aten.linalg_multi_dot.default)
def multi_dot(matrices: list[Operand]) -> Pattern:
    """Each matrix is multiplied with the next; the dims where they meet are contracted."""
    terms = [f"k{i} k{i + 1}" for i in range(len(matrices))]
    first, last = matrices[0].ndim == 1, matrices[-1].ndim == 1
    terms[0], terms[-1] = "k1" if first else terms[0], f"k{len(terms) - 1}" if last else terms[-1]
    return Pattern(f"{', '.join(terms)} -> {'' if first else 'k0'} {'' if last else f'k{len(terms)}'}", tuple(matrices))


@axis_rule(aten.trace.default)
def trace(x: Operand) -> Pattern | Opaque:
    """The entries on the diagonal are added up."""
    return Pattern("n n ->", (x,)) if x.shape[0] == x.shape[1] else Opaque((x,))


@axis_rule(aten.cross.default)
def cross(a: Operand, b: Operand, dim: int | None = None) -> Pattern | Opaque:
    """The three entries along the axis are multiplied with each other."""
    if dim is None:
        dim = next((d for d, sizes in enumerate(zip(a.shape, b.shape, strict=False)) if sizes == (3, 3)), 0)
    return linalg_cross(a, b, dim=dim)


@axis_rule(aten.linalg_cross.default)
def linalg_cross(a: Operand, b: Operand, *, dim: int = -1) -> Pattern | Opaque:
    """The three entries along the axis are multiplied with each other."""
    if a.ndim != b.ndim:
        return Opaque((a, b))
    own = letters(a, dim, "along!")
    return Pattern(f"{own}, {own} -> {own}", (a, b), apart=True)


@axis_rule(aten.matmul.default, aten.vdot.default, aten.mv.default, aten.dot.default)
def matmul(a: Operand, b: Operand) -> str:
    """`k` is contracted; leading dims broadcast."""
    if a.ndim == 1:
        return "k, k ->" if b.ndim == 1 else "k, ... k n -> ... n"
    return "... m k, k -> ... m" if b.ndim == 1 else "... m k, ... k n -> ... m n"


@axis_rule(aten.einsum.default)
def einsum(equation: str, operands: list[Operand], **_: Any) -> Pattern:
    """Letters that the output does not have are summed over."""
    equation = equation.replace(" ", "")
    if "->" not in equation:
        letters = sorted(set(equation) - set(".,"))
        once = "".join(letter for letter in letters if equation.count(letter) == 1)
        equation += f"->{'...' if '...' in equation else ''}{once}"
    terms, out = equation.split("->")
    return Pattern(f"{', '.join(map(_spaced, terms.split(',')))} -> {_spaced(out)}", tuple(operands))


def _spaced(term: str) -> str:
    """Write `...ij` as `... i j`."""
    return " ".join(term.replace("...", ".")).replace(".", "...")


@axis_rule("transformers::grouped_mm_fallback", aten._grouped_mm.default)
def grouped_mm(x: Operand, weight: Operand, groups: Operand | None = None, bias: Operand | None = None,
               *_: Any) -> Pattern | Opaque:  # fmt: skip
    """The position of a row decides which matrix it is multiplied with."""
    if groups is None or bias is not None or (x.ndim, weight.ndim) != (2, 3):
        return Opaque(tuple(operand for operand in (x, weight, groups, bias) if operand is not None))
    if not groups.counted:
        return Pattern("s! k, e! k n, +e! -> s! n", (x, weight, groups))
    return Pattern("s! k, e~ k n, +e~ -> s! n", (x, weight, groups), chosen={"e": groups})


@axis_rule(aten.cdist.default)
def cdist(a: Operand, b: Operand, *_: Any) -> Pattern:
    """Every entry along the axis counts in the distance."""
    return Pattern("... m k~, ... n k~ -> ... m n", (a, b), apart=True)


def write_scale(site: OpSite) -> None:
    """Write in the scale of the original `d`: without one, attention takes 1/sqrt(d) from the shape it sees."""
    query = site.operands[0]
    if site.args["scale"] is None and site.touched(query.exprs[-1]):
        site.args["scale"] = 1.0 / math.sqrt(query.shape[-1])


@axis_rule(aten.scaled_dot_product_attention.default, resize=write_scale)
def attention(q: Operand, k: Operand, v: Operand, mask: Operand | None = None, dropout: float = 0.0,
              causal: bool = False, *, enable_gqa: bool = False, **_: Any) -> Pattern:  # fmt: skip
    """The softmax runs over all key positions, and a causal mask counts positions."""
    s = "s!" if causal else "s"
    heads = "(h g) " if enable_gqa else ""
    shared = "h " if enable_gqa else ""
    spec = f"... {heads}{s} d, ... {shared}t! d, ... {shared}t! e, +... {heads}{s} t! -> ... {heads}{s} e"
    return Pattern(spec, (q, k, v) if mask is None else (q, k, v, mask), attention=True)
