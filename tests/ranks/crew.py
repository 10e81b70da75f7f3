"""Crew: processes with a gloo group between them, forked once for a file of tests, that run its cases.

    @pytest.fixture(scope="module")
    def two():
        with Crew(2) as crew:
            yield crew

    def test_sums(two):
        assert two.run(sums_of, 3) == [3, 3]     # `sums_of(rank, world, 3)`, a function of a module, on every rank

Starting processes and importing costs seconds, a case of a tiny model a fraction of one. After a case that failed on
some rank the group may be in the middle of something, so the processes are started again for the next one.
"""

import multiprocessing
import os
import socket
import tempfile
import traceback
import warnings
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops
from ecospa_fx.testing.beside_ranks import join_group, may_fork

LIMIT = 240  # seconds that a case may take: other work may hold the machine


class Crew:
    """Processes of one group, which run functions together.

    Args:
        world: how many.
        timeout: seconds that a collective waits for a rank.
    """

    def __init__(self, world, timeout=120):
        self.world, self.timeout, self.members = world, timeout, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def run(self, case, *args):
        """Run `case(rank, world, *args)` on every rank and return the results by rank; an error there is one here."""
        found = self.outcomes(case, *args)
        failed = [f"rank {rank}: {text}" for rank, (kind, text) in enumerate(found) if kind != "ok"]
        if failed:
            raise AssertionError(f"{case.__name__}{args}\n" + "\n".join(failed))
        return [value for _, value in found]

    def outcomes(self, case, *args):
        """Return by rank `("ok", result)`, `("error", traceback)` or `("died", exit code)`."""
        if not self.members:
            self._start()
        for _, pipe in self.members:
            pipe.send((case, args))
        found = [("died", "no answer in time")] * self.world
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self.members)}
        while waiting:
            ready = wait(list(waiting), LIMIT)
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    found[rank] = pipe.recv()
                except EOFError:
                    self.members[rank][0].join(10)
                    found[rank] = ("died", self.members[rank][0].exitcode)
        if any(kind != "ok" for kind, _ in found):
            self.stop()
        return found

    def _start(self):
        # A fork has what the test has imported; a GPU in use and the threads of autograd do not work in one.
        context = multiprocessing.get_context("fork" if may_fork() else "spawn")
        store, port = tempfile.mktemp(prefix="crew"), free_port()
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            others = [pipe for _, pipe in self.members] + [ours]
            process = context.Process(
                target=_serve, args=(rank, self.world, self.timeout, store, port, theirs, others), daemon=True
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, from Python 3.12 on
                process.start()
            theirs.close()
            self.members.append((process, ours))

    def stop(self):
        for _, pipe in self.members:
            pipe.close()
        for process, _ in self.members:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self.members = []


def _serve(rank, world, timeout, store, port, pipe, others):
    tolerate_missing_torchvision_ops()  # a process that starts anew has not called it yet
    for each in others:  # or the end of the test would not be seen here
        each.close()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    join_group(rank, world, store, timeout)
    while True:
        try:
            case, args = pipe.recv()
        except EOFError:
            os._exit(0)  # no destructors: a rank that went before would be waited for
        try:
            answer = ("ok", case(rank, world, *args))
        except BaseException:
            answer = ("error", traceback.format_exc())
        pipe.send(answer)


def free_port():
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return each.getsockname()[1]


def said(function, *args, **kwargs):
    """Return the error of a call as `Kind: text`, or None."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def differ(tensors):
    """Return the largest difference of tensors from those of rank 0, inf where shapes differ."""
    flat = torch.cat([each.detach().double().flatten().cpu() for each in tensors])
    shapes = [None] * dist.get_world_size()
    dist.all_gather_object(shapes, [tuple(each.shape) for each in tensors])
    if any(each != shapes[0] for each in shapes):
        return float("inf")
    first = flat.clone()
    dist.broadcast(first, 0)
    most = (flat - first).abs().max()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)
