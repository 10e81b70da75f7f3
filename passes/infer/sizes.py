"""Called sizes: the dynamic sizes of a graph in the call that it was captured from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sympy

from ecospa_fx.passes.graph.nodes import tensor_meta
from ecospa_fx.passes.ir.axis_facts import AxisFacts


def symbols_of(axis_facts: AxisFacts, called: Sequence[Sequence[int]] | None = None) -> dict[sympy.Symbol, int]:
    """Map each dynamic size of a graph to its value in the call that the graph was captured from.

    Args:
        axis_facts: of the graph.
        called: the result of `called_sizes` for the same graph in an earlier process, read in place of the graph's own.
    """
    shapes = list(_dynamic_shapes(axis_facts))
    here = [[_hint(size) for size in shape] for shape in shapes]
    if called is not None and list(map(len, called)) == list(map(len, here)):
        here = [list(sizes) for sizes in called]
    return {
        size.node.expr: hint
        for shape, hints in zip(shapes, here, strict=True)
        for size, hint in zip(shape, hints, strict=True)
        if _is_symbol(size)
    }


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
