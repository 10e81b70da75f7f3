"""Collectives: sums over the processes of a distributed run; every process of the group must take part."""

from __future__ import annotations

from torch import Tensor, distributed


def is_distributed() -> bool:
    """Return whether this process is one of a `torch.distributed` group."""
    return distributed.is_available() and distributed.is_initialized()


def ranks() -> int:
    """Count the processes of the `torch.distributed` group; 1 where there is none."""
    return distributed.get_world_size() if is_distributed() else 1


def all_reduce_sum(*tensors: Tensor, group: distributed.ProcessGroup | None = None) -> tuple[Tensor, ...]:
    """Add tensors up over the processes of a group, into new tensors.

    Args:
        tensors: of the same shapes in every process.
        group: by default all processes.

    Returns:
        The sums; the tensors themselves where there is no group.
    """
    if not is_distributed():
        return tensors
    sums = tuple(tensor.clone() for tensor in tensors)
    for each in sums:
        distributed.all_reduce(each, group=group)
    return sums
