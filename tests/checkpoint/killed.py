"""Processes that are killed while they save.

python killed.py everywhere DIRECTORY          a save is killed at each of its file operations in turn
python killed.py anywhen DIRECTORY TIMES SEED   a run that saves all the time is killed at random moments
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.checkpoint import directory as saves
from ecospa_fx.errors import CheckpointError

END = 40


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(6, 24), nn.Dropout(0.1), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(nn.functional.gelu(self.up(x))))


class Run:
    """A short training run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        saved = (directory / "checkpoint.json").exists()
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
        self.model = ecospa_fx.load(directory, Net) if saved else ecospa_fx.compile(Net())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.trainer = ecospa_fx.EcoSpaTrainer(self.model, self.optimizer, target=0.5, interval=3, end=END - 5)
        if saved:
            ecospa_fx.resume(directory, self.model, optimizer=self.optimizer, trainer=self.trainer)

    def step(self) -> None:
        x = torch.randn(5, 6)
        (self.model(x) - x.flip(-1)).square().mean().backward()
        self.optimizer.step()
        self.trainer.step()
        self.optimizer.zero_grad()

    def save(self) -> None:
        ecospa_fx.save(self.model, self.directory, optimizer=self.optimizer, trainer=self.trainer)


def forked(work: Callable[[], None]) -> int:
    """Run something in a child process; returns its number."""
    state = random.getstate()
    child = os.fork()
    if child:
        return child
    try:
        random.setstate(state)  # Python seeds it anew in a child
        work()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def killed(child: int) -> bool:
    """Wait for a child: was it killed? It must not have failed."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def files(directory: Path) -> dict[str, Any]:
    """What the save that counts holds, by hash, once it has been found whole."""
    ecospa_fx.load(directory, Net)
    return json.loads((directory / "checkpoint.json").read_text())["files"]


def deadly(n: int) -> None:
    """Kill this process at its n-th file operation, before it, or in the middle of it where it writes."""
    left = [n]

    def point() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            point()
            return operation(*args, **kwargs)

        return run

    def torn(write: Callable[..., Any], place: int) -> Callable[..., Any]:
        def run(*args: Any) -> None:
            point()
            if left[0] == 1:
                write(*args)
                os.truncate(args[place], os.path.getsize(args[place]) // 2)
            point()
            write(*args)

        return run

    for name in ("mkdir", "fsync", "replace", "unlink", "rmdir"):
        setattr(os, name, before(getattr(os, name)))
    saves.save_file, saves.write_text = torn(saves.save_file, 1), torn(saves.write_text, 0)


def everywhere(directory: Path) -> None:
    """A save over an old one, and a first save."""
    run = Run(directory / "old")
    for _ in range(4):
        run.step()
    run.save()
    old = files(directory / "old")
    run.step()
    run.directory = directory / "new"
    run.save()
    new = files(directory / "new")
    assert old != new
    outcomes: dict[bool, list[str]] = {True: [], False: []}
    for over in outcomes:
        for n in range(1, 1000):
            run.directory = directory / f"{over} {n}"
            if over:
                shutil.copytree(directory / "old", run.directory)
            if not killed(forked(lambda n=n: (deadly(n), run.save()))):
                break
            try:
                found = files(run.directory)
                outcomes[over].append("old" if found == old else "new" if found == new else "neither")
            except CheckpointError as error:
                none = str(error).endswith("is not a saved model: it has no checkpoint.json")
                outcomes[over].append("none" if none else str(error))
            if over and n == 1:  # a reader in another process does not mind
                assert not killed(forked(lambda: Run(run.directory) and None))
            run.save()
            assert files(run.directory) == new
            left = sorted(path.name for path in run.directory.iterdir() if path.name != ".lock")
            assert len(left) == 2 and left[0] == "checkpoint.json", left
            shutil.rmtree(run.directory)
    print(json.dumps({"over": outcomes[True], "first": outcomes[False]}))


def anywhen(directory: Path, times: int, seed: int) -> None:
    """Every process is killed soon after its first save, and the next one goes on."""
    dice = random.Random(seed)
    states = directory / "states"

    def reference() -> None:
        run, found = Run(directory / "whole"), []
        for _ in range(END):
            run.step()
            run.save()
            found.append(files(run.directory))
        states.write_text(json.dumps(found))

    assert not killed(forked(reference))
    expected = json.loads(states.read_text())
    steps: list[int] = []
    while len(steps) < times:
        run_directory = directory / f"run {len(steps)}"
        kept = run_directory / "checkpoint.json"
        if steps and steps[-1] < END:
            os.rename(directory / f"run {len(steps) - 1}", run_directory)
        read, write = os.pipe()

        def work(write: int = write, where: Path = run_directory) -> None:
            run = Run(where)
            while run.trainer.steps < END:
                run.step()
                run.save()
                os.write(write, bytes([run.trainer.steps]))
            time.sleep(60)

        before = int(kept.exists()) and steps[-1]
        child = forked(work)
        os.close(write)
        told = os.read(read, 1)
        time.sleep(dice.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        assert killed(child)
        while more := os.read(read, 100):
            told += more
        os.close(read)
        found = files(run_directory)
        step = expected.index(found) + 1
        assert told and told[-1] <= step <= told[-1] + 1, (told, step)
        assert list(told) == list(range(before + 1, told[-1] + 1)), (before, told)
        steps.append(step)
    print(json.dumps(steps))


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    how, directory, *rest = arguments
    globals()[how](Path(directory), *map(int, rest))


if __name__ == "__main__":
    main(sys.argv[1:])
