"""Placed: the ranks of a device mesh that hold each position along a dim of a sharded tensor.

Shard(d)                  the positions in equal runs, one per rank
_StridedShard(d, n)       n runs first, and of each an equal part per rank: so FSDP2 shards what tensor parallelism has
                          sharded along the same dim, and so packed weights are sharded
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def shards_of(tensor: Any) -> dict[int, list[tuple[int, int]]] | None:
    """Return dim of a tensor -> (dim of the device mesh, runs before it) of each placement that shards it, in order.

    Args:
        tensor: a DTensor, or something else with `placements` and `ndim`.

    Returns:
        None where a rank cannot tell which entries it has. Sums that are not added up yet have all entries on each.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement.is_replicate() or placement.is_partial():
            continue
        runs = _runs(placement)
        if runs is None:
            return None
        found.setdefault(placement.dim % max(1, tensor.ndim), []).append((mesh_dim, runs))
    return found


def _runs(placement: Any) -> int | None:
    """Return the runs into which a placement that shards cuts a dim before it gives each rank a part of each."""
    kind = type(placement).__name__
    return {"Shard": 1, "_StridedShard": int(getattr(placement, "split_factor", 1))}.get(kind)


def coordinates(size: int, mesh: Any, shards: Sequence[tuple[int, int]]) -> dict[int, Tensor]:
    """Return dim of the device mesh -> LongTensor `[size]`, where along it the ranks are that hold each position.

    Args:
        size: of the dim of the tensor.
        mesh: the device mesh.
        shards: of that dim, see `shards_of`.
    """
    found = {mesh_dim: torch.zeros(size, dtype=torch.long, device="cpu") for mesh_dim, _ in shards}
    groups = [torch.arange(size, device="cpu")]
    for mesh_dim, runs in shards:
        count, inside = mesh.size(mesh_dim), []
        for positions in groups:
            for rank in range(count):
                mine = torch.cat([_chunk(run, count, rank) for run in _chunks(positions, runs)])
                found[mesh_dim][mine] = rank
                inside.append(mine)
        groups = inside
    return found


def positions_here(size: int, mesh: Any, shards: Sequence[tuple[int, int]]) -> Tensor:
    """Return the positions of a dim that this rank holds, ascending; see `coordinates`."""
    here = torch.ones(size, dtype=torch.bool, device="cpu")
    for mesh_dim, ranks in coordinates(size, mesh, shards).items():
        here &= ranks == mesh.get_local_rank(mesh_dim)
    return here.nonzero().flatten()


def _chunks(positions: Tensor, count: int) -> list[Tensor]:
    return [_chunk(positions, count, number) for number in range(count)]


def _chunk(positions: Tensor, count: int, number: int) -> Tensor:
    """Return one of so many runs of positions, all but the last of which are equally long."""
    length = -(-len(positions) // count)
    return positions[number * length : (number + 1) * length]
