"""Fast attention: give attention in a graph the arguments that its fast kernels take.

    fast_attention(graph)
      -> _causal       a mask that is causal at every size   becomes   is_causal=True
      -> _unrepeated   keys and values repeated per group    become    enable_gqa=True

A model that is exported whole makes its causal mask as a tensor and repeats key heads, where eagerly it would have done
neither. A mask that depends on an input, or is not provably causal, stays.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from ecospa_fx.passes.axes.algebra import as_size

from .nodes import arguments
from .symbolic_entries import Select, SymbolicEntries

aten = torch.ops.aten


def fast_attention(graph: fx.Graph) -> None:
    """Rewrite the attentions of `graph` in place; what made masks and copies is left without users."""
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
    """Whether a mask lets query q see key k if and only if k <= q, whatever the sizes."""
    sizes = tuple(map(as_size, mask.meta["val"].shape))
    if len(sizes) < 2 or sizes[-1] != sizes[-2]:
        return False
    symbols = [sympy.Symbol(f"_{i}", integer=True) for i in range(len(sizes))]
    entries = SymbolicEntries(graph, dict(zip(symbols, sizes, strict=True)))
    entry = entries.at(mask, tuple(0 if size == 1 else symbol for symbol, size in zip(symbols, sizes, strict=True)))
    seen = entries.nonnegative(symbols[-2] - symbols[-1])
    if not isinstance(entry, Select):
        return bool(mask.meta["val"].dtype is torch.bool and entry == seen)
    # Added to a score: nothing where the key is seen, and what no score can outweigh where not.
    hidden = torch.finfo(mask.meta["val"].dtype).min
    shown, other = (entry.a, entry.b) if entry.condition == seen else (entry.b, entry.a)
    return entry.condition in (seen, sympy.Not(seen)) and shown == 0.0 and other <= hidden


def _unrepeated(node: Any) -> Any:
    """The keys or values that `node` is copies of, each head several times in a row; None where it is not."""
    while node.target in (aten.clone.default, aten.contiguous.default, aten.alias.default):
        node = arguments(node)[0]
    if node.target is aten.repeat_interleave.self_int:
        x, times, dim = (*arguments(node), None)[:3]
        fits = type(times) is int and dim in (1, -3) and x.meta["val"].ndim == 4 and not node.kwargs
        return x if fits else None
    if node.target not in (aten.reshape.default, aten.view.default):
        return None
    expanded = arguments(node)[0]
    while expanded.target in (aten.clone.default, aten.contiguous.default, aten.alias.default):
        expanded = arguments(expanded)[0]
    if expanded.target is not aten.expand.default:
        return None
    base = arguments(expanded)[0]
    while base.target in (aten.alias.default, aten.slice.Tensor) and _shape(base) == _shape(arguments(base)[0]):
        base = arguments(base)[0]
    if base.target is not aten.unsqueeze.default or arguments(base)[1] not in (2, -3):
        return None
    x = arguments(base)[0]
    if x.meta["val"].ndim != 4:
        return None
    (b, heads, s, d), copies = _shape(x), _shape(expanded)[2]
    if type(heads) is int and type(copies) is int and _shape(expanded) == (b, heads, copies, s, d):
        return x if _shape(node) == (b, heads * copies, s, d) else None
    return None


def _heads(node: fx.Node) -> Any:
    return _shape(node)[1]


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(map(as_size, node.meta["val"].shape))
