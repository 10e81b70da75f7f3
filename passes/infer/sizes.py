"""Called sizes: the sizes of a graph that differ from call to call, in the call that it was captured from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy

from ecospa_fx.errors import EcoSpaError
from ecospa_fx.passes.axes.algebra import Size, as_size
from ecospa_fx.passes.graph.nodes import tensor_meta
from ecospa_fx.passes.ir.axis_facts import AxisFacts


def symbols_of(axis_facts: AxisFacts, called: Sequence[Sequence[int]] | None = None) -> dict[sympy.Symbol, int]:
    """Map each dynamic size of a graph, and each that data decide, to its value in the call it was captured from.

    Args:
        axis_facts: of the graph.
        called: the result of `called_sizes` for the same graph in an earlier process, read in place of the graph's own.
    """
    shapes = list(_dynamic_shapes(axis_facts))
    here = [[_hint(size) for size in shape] for shape in shapes]
    if called is not None and list(map(len, called)) == list(map(len, here)):
        here = [list(sizes) for sizes in called]
    return dict(axis_facts.captured.data_sizes) | {
        size.node.expr: hint
        for shape, hints in zip(shapes, here, strict=True)
        for size, hint in zip(shape, hints, strict=True)
        if _is_symbol(size)
    }


def size_in_call(size: Size, symbols: Mapping[sympy.Symbol, int]) -> int:
    """Return a size in a call where the dynamic ones are `symbols`.

    Raises:
        EcoSpaError: data decide it, and they were not seen.
    """
    now = as_size(sympy.sympify(size).subs(symbols))
    if type(now) is int:
        return now
    raise EcoSpaError(
        "a size in the graph depends on values in tensors (a mask, a number read with item()), and the call that was "
        "captured had none, so FLOPs cannot be counted: use a device other than meta, or count parameters"
    )


def called_sizes(axis_facts: AxisFacts) -> list[list[int]]:
    """Return the shapes of the inputs with dynamic dims in the call that a graph was captured from."""
    return [[_hint(size) for size in shape] for shape in _dynamic_shapes(axis_facts)]


def _dynamic_shapes(axis_facts: AxisFacts) -> Iterator[Sequence[Any]]:
    for node in axis_facts.captured.graph.nodes:
        if node.op == "placeholder":
            for meta in tensor_meta(node):
                if any(map(_is_symbol, meta.shape)):
                    yield meta.shape


def _is_symbol(size: Any) -> bool:
    return isinstance(getattr(getattr(size, "node", None), "expr", None), sympy.Symbol)


def _hint(size: Any) -> int:
    return int(size.node.hint) if hasattr(size, "node") else int(size)
