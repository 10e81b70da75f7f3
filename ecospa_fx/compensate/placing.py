"""Placing: new values of weights, sharded as these are, and of all tensors that share their memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ecospa_fx.passes.graph.tensors import storage_key
from ecospa_fx.ranks.shards import is_sharded, split, whole_of


def has_values(tensor: Tensor | None) -> bool:
    """Return whether a tensor has values that can be read, on this rank or on several."""
    plain = type(tensor) in (Tensor, nn.Parameter) or is_sharded(tensor)
    return plain and tensor is not None and tensor.device.type != "meta"


def lie_alike(weight: Any, bias: Any, dim: int) -> bool:
    """Return whether this rank holds rows of a weight with all columns along `dim`, and the bias of the same rows.

    Each row takes over for itself, so that nothing need move then.
    """
    if not is_sharded(weight):
        return bias is None or not is_sharded(bias)
    by_rows = dim != 0 and all(not placement.is_shard() or placement.is_shard(0) for placement in weight.placements)
    return by_rows and (bias is None or (is_sharded(bias) and bias.placements == weight.placements))


def placed(value: Tensor, like: Any, by_rows: bool) -> Tensor:
    """Return the new value of a tensor, sharded as that is."""
    if not is_sharded(like):
        return value
    placed: Tensor = whole_of(value, like) if by_rows else split(value, like)
    return placed


def assign(values: dict[int, Tensor], tensors: Mapping[str, Tensor], tensor: Tensor, value: Tensor) -> None:
    """Set the new value of a tensor, and of those that share its memory."""
    for each in tensors.values():
        if each is tensor or (storage_key(each) == storage_key(tensor) and each.shape == tensor.shape):
            values[id(each)] = value
