"""Collectives: sums over the processes of a distributed run; every process of the group must take part."""

from __future__ import annotations

import atexit
import contextlib
import time
from pathlib import Path

from torch import Tensor, distributed

SETTLE, LONGEST = 0.1, 5.0
"""Seconds that a process with threads of gloo waits at its end, and at most where one of them runs."""


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


@atexit.register
def await_gloo() -> None:
    """Let gloo's threads come to rest before the interpreter ends.

    A worker of gloo gives back what its last collective held after that has returned, for which it needs Python's
    lock; where the interpreter ends meanwhile, the process aborts ("terminate called without an active exception",
    pytorch issue 190489). Neither a barrier, whose worker is as late, nor `destroy_process_group` helps: a group that
    DTensor has used keeps its threads. A sleep does, as it lets go of the lock.
    """
    began = time.monotonic()
    while states := gloo_threads():
        if time.monotonic() - began > (LONGEST if "R" in states else SETTLE):
            break
        time.sleep(SETTLE / 10)


def gloo_threads() -> str:
    """Return the states of gloo's threads, a letter each, as Linux names them; none where there is no `/proc`."""
    states = ""
    for task in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # a thread may end at any time
            name, _, rest = task.read_text().partition("(")[2].rpartition(")")
            states += rest.split()[0] if name.startswith("pt_gloo") else ""
    return states
