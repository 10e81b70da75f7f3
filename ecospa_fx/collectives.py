"""Collectives: sums over the processes of a distributed run; every process of the group must take part."""

from __future__ import annotations

from torch import Tensor, distributed


def is_distributed() -> bool:
    """Return whether this process is one of a `torch.distributed` group."""
    return distributed.is_available() and distributed.is_initialized()


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
