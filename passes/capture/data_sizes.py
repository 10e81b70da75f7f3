"""Data sizes: sizes in a graph that values decide (a mask, a number read with `item()`), as they are in one call."""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from ecospa_fx.passes.graph.isolate import isolated
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.ir.state_access import flattened, parted

from .compare_eager import run

_BINDINGS = "unbacked_bindings"  # in `node.meta`: symbol -> where in the value of the node it is found


def data_sizes(
    captured: RegionGraph, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[sympy.Symbol, int]:
    """Run a graph once, where it has such sizes, and return them; `module` is left as it is.

    Args:
        captured: the graph.
        module: the region that it was captured from, at original sizes.
        args: positional arguments of the call that was captured.
        kwargs: keyword arguments of it.
    """
    if not any(node.meta.get(_BINDINGS) for node in captured.graph.nodes):
        return {}
    found: dict[sympy.Symbol, int] = {}

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            for symbol, path in (n.meta.get(_BINDINGS) or {}).items():
                found[symbol] = int(pytree.key_get(value, path))
            return value

    leaves, objects = parted(flattened((args, kwargs))[0])
    inputs = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]
    inputs += [place.find(objects).detach().clone() for place in captured.carried.state]
    with isolated(module), torch.no_grad():
        run(captured, named_tensors(module), inputs, interpreter=Noting)
    return found
