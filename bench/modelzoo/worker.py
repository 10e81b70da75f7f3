"""Worker processes: many models are measured, each in a forked process with limits of time and memory.

Forking after the libraries are imported makes a process cheap; a model that crashes, leaks or hangs affects no other
model, and its earlier results stay.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from modelzoo.build import build
from modelzoo.measure import Row, measure

Parts = Callable[[str, float], Iterator[Row]]
"""Takes the name of a model and seconds for verification, and yields parts of its row."""


def measured(name: str, budget: float) -> Iterator[Row]:
    """Parts of the row of a model of the zoo."""
    yield from measure(lambda: build(name), budget)


def measure_all(names: Iterable[str], jobs: int, seconds: float, memory: int, parts: Parts = measured) -> Iterator[Row]:
    """A row per model, in the order in which they finish."""
    torch.set_num_threads(1)
    _warm()
    waiting = list(reversed(list(names)))
    running: dict[int, _Child] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            child = _Child(waiting.pop(), seconds, memory, parts)
            running[child.pipe] = child
        ready, _, _ = select.select(list(running), [], [], 1.0)
        for pipe in list(running):
            child = running[pipe]
            if (pipe in ready and child.read()) or child.overdue():
                del running[pipe]
                yield child.close()


def _warm() -> None:
    """Have in memory before forking what every model would load again: it takes longer than a small model itself."""
    for _ in measure(lambda: build("transformers/llama"), budget=1.0):
        pass
    # Freeze the objects so far. A garbage collection over all of them would be charged to the pass in which it
    # happens: 0.6 s, often ten times the analysis of a small model.
    gc.collect()
    gc.freeze()


class _Child:
    """One model being measured."""

    def __init__(self, name: str, seconds: float, memory: int, parts: Parts) -> None:
        self.name, self.seconds, self.start, self.text = name, seconds, time.perf_counter(), b""
        self.pipe, end = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.close(self.pipe)
            _serve(name, end, memory, seconds, parts)
        os.close(end)

    def read(self) -> bool:
        """Take what is there; whether that was the end."""
        chunk = os.read(self.pipe, 1 << 16)
        self.text += chunk
        return not chunk

    def overdue(self) -> bool:
        """Check whether the time limit has passed, and kill the process then."""
        if time.perf_counter() - self.start < 4 * self.seconds:
            return False
        os.kill(self.process, signal.SIGKILL)
        return True

    def close(self) -> Row:
        """The row, as far as it got."""
        _, status = os.waitpid(self.process, 0)
        os.close(self.pipe)
        library, _, name = self.name.partition("/")
        row: Row = {"library": library, "name": name, "stage": "started"}
        for line in self.text.decode().splitlines():
            try:
                row |= json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off
        if os.WIFSIGNALED(status):
            late = os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU)
            row["error"] = f"over {self.seconds:.0f} s" if late else f"killed by signal {os.WTERMSIG(status)}"
        row["total_s"] = round(time.perf_counter() - self.start, 1)
        return row


def _serve(name: str, pipe: int, memory: int, seconds: float, parts: Parts) -> None:
    """In the child: measure, report, and leave without running anything of the parent's."""
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        # Seconds of computing, which other work on the machine does not count in.
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        for part in parts(name, seconds / 10):
            os.write(pipe, (json.dumps(part) + "\n").encode())
    except BaseException as error:
        os.write(pipe, (json.dumps({"error": _said(error)}) + "\n").encode())
    finally:
        os._exit(0)


def _said(error: BaseException) -> Any:
    """An error in a line, with where it arose."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    told = re.sub(r"[^'\s]*/site-packages/", "", " ".join(str(error).split()))  # where packages lie is of no account
    return f"{type(error).__name__}: {told[:200]} ({where})"
