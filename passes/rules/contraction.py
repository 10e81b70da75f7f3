"""Contractions: ops in which axes are multiplied together and summed over, where weights meet."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ecospa_fx.passes.ir.relations import Opaque, Operand, Pattern

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


@axis_rule(aten.matmul.default, aten.mv.default, aten.dot.default)
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
    return Pattern("s! k, e! k n, +e! -> s! n", (x, weight, groups))


@axis_rule(aten.cdist.default)
def cdist(a: Operand, b: Operand, *_: Any) -> Pattern:
    """Every entry along the axis counts in the distance."""
    return Pattern("... m k!, ... n k! -> ... m n", (a, b), apart=True)


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
