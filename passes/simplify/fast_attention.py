"""Fast attention: attention calls with the arguments that its fast kernels take.

    fast_attention(graph)
      -> _causal       a mask that is causal at every size   becomes   is_causal=True
      -> _unrepeated   keys and values repeated per group    become    enable_gqa=True

A model that is exported as a whole makes its causal mask as a tensor and repeats key heads, where in eager mode it
would have done neither. A mask that depends on an input, or is not provably causal, stays.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from ecospa_fx.passes.axes.algebra import as_size
from ecospa_fx.passes.graph.nodes import arguments
from ecospa_fx.passes.ir.relations import Expanded, Pointwise, Regrouped, Repeated, Sliced
from ecospa_fx.passes.rules import relation_of

from .symbolic_entries import Select, SymbolicEntries

aten = torch.ops.aten


def fast_attention(graph: fx.Graph) -> None:
    """Rewrite the attention calls of `graph` in place; nodes that made masks and copies are left without users."""
    causal: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        defaults: list[Any] = [None, 0.0, False]
        q, k, v, mask, dropout, is_causal = [*arguments(node), *defaults[len(node.args) - 3 :]]
        if isinstance(mask, fx.Node) and not is_causal:
            if mask not in causal:
                causal[mask] = _causal(graph, mask)
            if causal[mask]:
                mask, is_causal = None, True
        # With a mask, few kernels take fewer key heads than query heads.
        if mask is None and not node.kwargs.get("enable_gqa", False):
            pair = _unrepeated(k), _unrepeated(v)
            if all(pair) and _heads(pair[0]) == _heads(pair[1]):
                k, v = pair
                node.kwargs = {**node.kwargs, "enable_gqa": True}
        if (k, v, mask) != (node.args[1], node.args[2], (*node.args, None)[3]):
            node.args = (q, k, v, mask, dropout, is_causal)


def _causal(graph: fx.Graph, mask: fx.Node) -> bool:
    """Return True if a mask lets query q see key k if and only if k <= q, whatever the sizes."""
    sizes = tuple(map(as_size, mask.meta["val"].shape))
    if len(sizes) < 2 or sizes[-1] != sizes[-2]:
        return False
    symbols = [sympy.Symbol(f"_{i}", integer=True) for i in range(len(sizes))]
    entries = SymbolicEntries(graph, dict(zip(symbols, sizes, strict=True)))
    entry = entries.at(mask, tuple(0 if size == 1 else symbol for symbol, size in zip(symbols, sizes, strict=True)))
    seen = entries.nonnegative(symbols[-2] - symbols[-1])
    if not isinstance(entry, Select):
        return bool(mask.meta["val"].dtype is torch.bool and entry == seen)
    # A mask of numbers is added to the scores: 0 where the key is seen, elsewhere so low that no score outweighs it.
    hidden = torch.finfo(mask.meta["val"].dtype).min
    shown, other = (entry.a, entry.b) if entry.condition == seen else (entry.b, entry.a)
    return entry.condition in (seen, sympy.Not(seen)) and shown == 0.0 and other <= hidden


def _unrepeated(node: Any) -> Any:
    """Return the keys or values that `node` repeats, each head several times in a row; None where it does not."""
    node = _uncopied(node)
    match relation_of(node):
        case Repeated(x, (1, times, 1, 1), interleaved=True) if x.ndim == 4 and type(times) is int:
            return x.node
        case Regrouped(copies):
            expanded = _uncopied(copies.node)
        case _:
            return None
    match relation_of(expanded):
        case Expanded(repeated):
            base = _uncopied(repeated.node)
        case _:
            return None
    match relation_of(base):
        case Regrouped(x) if x.ndim == 4 and repeated.ndim == 5:
            b, heads, s, d = x.shape
        case _:
            return None
    times = _shape(expanded)[2]
    if (_shape(base), _shape(expanded)) != ((b, heads, 1, s, d), (b, heads, times, s, d)):
        return None
    if type(heads) is int and type(times) is int and _shape(node) == (b, heads * times, s, d):
        return x.node
    return None


def _uncopied(node: fx.Node) -> fx.Node:
    """Return the value that `node` copies as it is, or slices without cutting anything off."""
    while True:
        match relation_of(node):
            case Pointwise((x,), "copy") if x.node.meta["val"].dtype is node.meta["val"].dtype:
                node = x.node
            case Sliced(x) if x.shape == _shape(node):
                node = x.node
            case _:
                return node


def _heads(node: fx.Node) -> Any:
    return _shape(node)[1]


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(map(as_size, node.meta["val"].shape))
