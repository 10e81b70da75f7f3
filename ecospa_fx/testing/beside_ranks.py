"""BesideRanks: both worlds of `Beside` under DistributedDataParallel, on each of some processes with its own batches.

    with RankCrew(2) as crew:
        crew.check(program)      started once; each program goes to all of them
          each rank: the plain model in DDP, the compiled one in DDP, compared after every step
          after every step: has one rank found a difference, or come to the end? then all stop

The judge is DDP of the plain model: what ranks keep on their own (counters, running means, generators) is each rank's.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .beside import Beside
from .sandbox import Sandbox

TIMEOUT = 60.0
"""Seconds that a collective waits for a rank."""

LIMIT = 240.0
"""Seconds that a program may take."""


class BesideRanks(Beside):
    """Two worlds of one file on one of several ranks, each trained under DistributedDataParallel."""

    goes_on_after_errors = False  # no reducer does

    def __init__(self, *given: Any, **options: Any) -> None:
        self._wrappers: dict[str, DistributedDataParallel] = {}
        super().__init__(*given, **options)

    def called(self, world: Sandbox) -> nn.Module:
        """Return the wrapper, made when a model is trained for the first time, or again after `compile`."""
        wrapper = self._wrappers.get(world.name)
        if wrapper is None or wrapper.module is not world.model:
            # A forward may leave parts of the model out, and ranks differ in which.
            wrapper = DistributedDataParallel(world.model, find_unused_parameters=True)
            self._wrappers[world.name] = wrapper
        return wrapper

    def compile(self, batch: int = 0) -> None:
        """Compile the model, which is wrapped afterwards."""
        self._wrappers.clear()
        super().compile(batch)

    def shrink(self, seed: int, line: int = 0) -> None:
        """Remove the same entries on every rank; nobody presses Ctrl-C."""
        super().shrink(seed)

    def save_and_load(self) -> None:
        """Do nothing: a save is of one rank, and each has state of its own."""

    def _input(self, batch: int) -> Tensor:
        self._inputs += 1
        generator = torch.Generator().manual_seed(self._inputs * 100 + distributed.get_rank())
        shape = (batch, 3, 3) if self.tokens else (batch, 3)
        return torch.randn(shape, dtype=torch.float64, generator=generator)


def any_rank(value: bool) -> bool:
    """Return whether something is so on some rank."""
    told = torch.tensor([float(value)])
    distributed.all_reduce(told, distributed.ReduceOp.MAX)
    return bool(told[0])


class RankCrew:
    """Processes of one group, which check programs together.

    Args:
        ranks: how many.
        check: of a program, `(result, whether the processes can go on)` on one rank.
    """

    def __init__(self, ranks: int, check: Callable[[Any], tuple[Any, bool]]) -> None:
        self.ranks, self._check = ranks, check
        self._members: list[tuple[Any, Any]] = []

    def __enter__(self) -> RankCrew:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def results(self, program: Any) -> list[Any]:
        """Return what each rank has found; the text of an error where it has failed, or given no answer."""
        if not self._members:
            self._start()
        for _, pipe in self._members:
            pipe.send(program)
        found: list[Any] = ["no answer"] * self.ranks
        pipes = [pipe for _, pipe in self._members]
        waiting, sound = list(pipes), True
        while waiting and (ready := wait(waiting, LIMIT)):
            for pipe in [each for each in waiting if each in ready]:
                waiting.remove(pipe)
                try:
                    found[pipes.index(pipe)], goes_on = pipe.recv()
                except EOFError:
                    found[pipes.index(pipe)], goes_on = "died", False
                sound = sound and goes_on
        if waiting or not sound:
            self.stop()
        return found

    def stop(self) -> None:
        """End the processes."""
        for process, pipe in self._members:
            pipe.close()
            process.kill()
            process.join()
        self._members = []

    def _start(self) -> None:
        context: Any = multiprocessing.get_context("fork" if may_fork() else "spawn")
        store = tempfile.mktemp(prefix="ranks")
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            given = (self._check, rank, self.ranks, store, theirs)
            process = context.Process(target=_serve, args=given, daemon=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
                process.start()
            theirs.close()
            self._members.append((process, ours))


def _serve(check: Callable[[Any], tuple[Any, bool]], rank: int, ranks: int, store: str, pipe: Any) -> None:
    join_group(rank, ranks, store, TIMEOUT)
    while True:
        try:
            program = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = check(program)
        except BaseException:
            answer = traceback.format_exc(), False
        pipe.send(answer)


def join_group(rank: int, ranks: int, store: str, timeout: float) -> None:
    """Make this process, with one thread, a rank of a group of gloo on this machine.

    Args:
        rank: its number.
        ranks: how many there are.
        store: file by which they find each other; it may not exist before.
        timeout: seconds that a collective waits for a rank.
    """
    if "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )


def may_fork() -> bool:
    """Return whether a fork of this process can compute gradients.

    Not once a backward in a backward took threads: then every step would end in the same error in both worlds.
    """
    if torch.cuda.is_initialized():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, from Python 3.12 on
        child = os.fork()
    if not child:
        try:
            torch.ones(1, requires_grad=True).sum().backward()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


__all__ = ["BesideRanks", "RankCrew", "any_rank", "join_group", "may_fork"]
