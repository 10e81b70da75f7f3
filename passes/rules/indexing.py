"""Ops that choose entries by the values of an index tensor."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Created, Indexed, Opaque, Operand, axis_rule

aten = torch.ops.aten


@axis_rule(aten.embedding.default)
def embedding(weight: Operand, index: Operand, *_: Any) -> str:
    """Rows are chosen by the values of an index."""
    return "v! e, ... -> ... e"


@axis_rule(aten.index_select.default)
def index_select(x: Operand, dim: int, index: Operand) -> Indexed | Opaque:
    """Entries are chosen by the values of an index."""
    if x.ndim == 0:
        return Opaque((x, index))
    return Indexed(x, dim % x.ndim, index)


@axis_rule(aten.index.Tensor)
def index(x: Operand, indices: list[Operand | None]) -> Indexed | Opaque:
    """Entries are chosen by the values of an index."""
    chosen = [(dim, i) for dim, i in enumerate(indices) if i is not None]
    if len(chosen) != 1 or chosen[0][1].node.meta["val"].dtype == torch.bool:
        return Opaque((x, *(i for _, i in chosen)))
    return Indexed(x, *chosen[0])


@axis_rule(
    aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.zeros, aten.ones, aten.empty, aten.full,
    follow=lambda site: site.resize_output("size"),
)  # fmt: skip
def created(*_: Any, **__: Any) -> Created:
    """A new tensor of a given size."""
    return Created()
