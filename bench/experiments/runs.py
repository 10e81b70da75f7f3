"""Dense runs, and the runs that branch off from them and shrink.

A run that starts to shrink at a quarter of the steps shares that quarter with the dense run of its seed. So every seed
trains one dense model, keeps a copy of it where branches begin, and each branch continues from there with its own
trainer. The result equals that of a run from scratch, at a fraction of the cost.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import ecospa_fx
from ecospa_fx.demo.ablation import break_pairing
from experiments.tasks import Task

EVALUATIONS = 10
"""Validation losses along a run."""


@dataclass(frozen=True)
class Variant:
    """A way to shrink.

    Attributes:
        name: row title.
        begin: share of the run that is dense; scores gather from there on.
        end: share of the run by which the target is reached; None lets the paper's rule run until it is.
        settings: of `EcoSpaTrainer`.
        pairing: False lets every matrix choose alone which slices go, as the paper's ablation does.
        shrinks: sparsification steps between `begin` and `end`.
        labels: more columns of its row.
        around: a context manager that its run is in.
        own: trains in a way of its own: `own(job, variant, training, batches, rows)` -> row, from the dense run at
            `begin` and the rows there are; None for an `EcoSpaTrainer`.
    """

    name: str
    begin: float
    end: float | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    pairing: bool = True
    shrinks: int = 8
    labels: Mapping[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    own: Callable[..., dict[str, Any]] | None = None


@dataclass(frozen=True)
class Job:
    """One seed of one task: a dense run and its branches.

    Attributes:
        before: what the model has learned already, and in how many steps; None starts at random weights.
        regions: see `ecospa_fx.compile`.
    """

    title: str
    task: Task
    steps: int
    seed: int
    variants: tuple[Variant, ...]
    before: tuple[Task, int] | None = None
    regions: str = "auto"


@dataclass
class Training:
    """A model in the middle of its training.

    Attributes:
        seconds: of this process's processor that its steps took.
        compute: parameters, added up over its steps.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    seconds: float = 0.0
    compute: int = 0

    @classmethod
    def begun(cls, model: nn.Module, task: Task) -> Training:
        """One that has taken no step."""
        return cls(model, torch.optim.AdamW(model.parameters(), task.rate, (0.9, 0.95), weight_decay=0.01))

    def copy(self) -> Training:
        """A second one that goes on from here by itself."""
        model = copy.deepcopy(self.model)
        optimizer = type(self.optimizer)(model.parameters())  # its options are in the state
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return Training(model, optimizer, self.seconds, self.compute)


def run_all(jobs: Sequence[Job], out: Path, workers: int, console: Console | None = None) -> list[dict[str, Any]]:
    """Run every job, `workers` at a time in processes of one thread each, and return a row per run.

    Rows of jobs that `out` already holds are taken from there, so that an interrupted experiment goes on.
    """
    console = console or Console()
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row["title"], row["seed"]) for row in rows}
    open_jobs = [job for job in jobs if (job.title, job.seed) not in done]
    began = time.perf_counter()
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        futures = [pool.submit(run_job, job) for job in open_jobs]
        for future in as_completed(futures):
            found = future.result()
            rows += found
            with out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
            losses = ", ".join(f"{row['variant']} {row['loss']:.3f}" for row in found)
            console.print(
                f"{time.perf_counter() - began:5.0f} s  {found[0]['title']}, seed {found[0]['seed']}: {losses}"
            )
    wanted = {(job.title, job.seed) for job in jobs}
    return [row for row in rows if (row["title"], row["seed"]) in wanted]


def _one_thread() -> None:
    torch.set_num_threads(1)


def run_job(job: Job) -> list[dict[str, Any]]:
    """Train the dense model of a job, then its branches.

    Returns:
        A row per run, the dense one first.
    """
    torch.manual_seed(job.seed)
    model = job.task.model()
    first, _ = next(job.task.batches(1, job.seed))
    if job.before is not None:
        task, steps = job.before
        earlier = Job(job.title, task, steps, job.seed, ())
        train(earlier, Training.begun(model, task), list(task.batches(steps, job.seed)), 0, steps, [])
    ecospa_fx.compile(model, example_inputs=(first,), regions=job.regions)
    training = Training.begun(model, job.task)
    batches = list(job.task.batches(job.steps, job.seed))
    starts = sorted({round(variant.begin * job.steps) for variant in job.variants})
    kept, curve, now = {}, [], 0
    for stop in [*starts, job.steps]:
        train(job, training, batches, now, stop, curve)
        now = stop
        kept[stop] = training.copy()
    dense = row_of(job, training, "dense", {}, curve)
    rows = [dense]
    for variant in job.variants:
        start = kept[round(variant.begin * job.steps)].copy()
        own = variant.own
        rows.append(own(job, variant, start, batches, rows) if own else _branch(job, variant, start, batches))
    for row in rows:
        row["over_dense"] = row["loss"] - dense["loss"]
        row["compute"] /= training.compute
    return rows


def _branch(job: Job, variant: Variant, training: Training, batches: Sequence[Any]) -> dict[str, Any]:
    begin = round(variant.begin * job.steps)
    span = (1.0 if variant.end is None else variant.end) - variant.begin
    trainer = ecospa_fx.EcoSpaTrainer(
        training.model,
        training.optimizer,
        interval=max(1, round(span * job.steps / variant.shrinks)),
        end=None if variant.end is None else round(variant.end * job.steps) - begin,
        before_shrink=None if variant.pairing else break_pairing,
        seed=job.seed,
        **variant.settings,
    )
    curve: list[Any] = []
    with variant.around():
        train(job, training, batches, begin, job.steps, curve, trainer)
    row = row_of(job, training, variant.name, variant.labels, curve)
    row["done"] = trainer.done
    row["reached_at"] = begin + trainer.history[-1]["step"] if trainer.history else None
    row["shrinks"] = len(trainer.history)
    expected = [sum(entry["expected"].values()) for entry in trainer.history if "expected" in entry]
    row["expected"] = sum(expected) if expected else None
    row["widths"] = {coupling.name: coupling.size for coupling in ecospa_fx.couplings(training.model)}
    return row


def train(
    job: Job,
    training: Training,
    batches: Sequence[Any],
    begin: int,
    stop: int,
    curve: list[Any],
    trainer: Any = None,
) -> None:
    """Take the steps after `begin` up to `stop`; the curve gets (step, validation loss, seconds)."""
    every = max(1, job.steps // EVALUATIONS)
    for step in range(begin + 1, stop + 1):
        began = time.process_time()
        for group in training.optimizer.param_groups:
            group["lr"] = job.task.rate * _rate(step, job.steps)
        training.model.train()
        loss = job.task.loss(training.model, batches[step - 1])
        loss.backward()
        nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
        training.optimizer.step()
        if trainer is not None:
            trainer.step()
        training.optimizer.zero_grad()
        training.seconds += time.process_time() - began
        training.compute += sum(p.numel() for p in training.model.parameters())
        if step % every == 0 and step < job.steps:
            held_out = _validated(job.task, training.model)["loss"]
            curve.append([step, round(held_out, 5), round(training.seconds, 2)])


@torch.no_grad()
def _validated(task: Task, model: nn.Module) -> dict[str, float]:
    model.eval()
    return task.validate(model)


def row_of(job: Job, training: Training, name: str, labels: Mapping[str, Any], curve: list[Any]) -> dict[str, Any]:
    """Summarise a run as one row."""
    found = _validated(job.task, training.model)
    curve.append([job.steps, round(found["loss"], 5), round(training.seconds, 2)])
    size = sum(p.numel() for p in training.model.parameters())
    return {
        "title": job.title, "variant": name, "seed": job.seed, **labels, **found,
        "parameters": size, "seconds": round(training.seconds, 1), "compute": training.compute, "curve": curve,
    }  # fmt: skip


def _rate(step: int, steps: int) -> float:
    """Linear warmup over a twentieth of the run, then a cosine down to a tenth; the share of the peak rate."""
    warmup = max(1, round(0.05 * steps))
    if step <= warmup:
        return step / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
