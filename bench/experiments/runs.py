"""Dense runs, and the runs that branch off from them and shrink.

A run that starts to shrink at a quarter of the steps shares that quarter with the dense run of its seed. So every seed
trains one dense model, keeps a copy of it where branches begin, and each branch continues from there with its own
trainer. The result equals that of a run from scratch, at a fraction of the cost.

A long job (`save_every`) writes each row when it has it and saves what is under way, so that it can be stopped at any
time: the same command goes on.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from machine import machine
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ecospa_fx
from ecospa_fx.demo.ablation import break_pairing
from experiments.tasks import Task, placed


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
        own: trains in a way of its own: `own(job, variant, training, batches, rows, place)` -> row, from the dense run
            at `begin` and the rows there are; `place` is where it may save; None for an `EcoSpaTrainer`.
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
        evaluations: validation losses along a run.
        last_rate: share of the peak rate that is left at the end.
        device: where its models are.
        save_every: seconds between two saves of what is under way; None saves nothing, and the job's rows are written
            together when all of it is done.
    """

    title: str
    task: Task
    steps: int
    seed: int
    variants: tuple[Variant, ...]
    before: tuple[Task, int] | None = None
    regions: str = "auto"
    evaluations: int = 10
    last_rate: float = 0.1
    save_every: float | None = None
    device: str = "cpu"


@dataclass
class Training:
    """A model in the middle of its training.

    Attributes:
        step: steps that it has taken.
        seconds: of this process's processor that these took; on a GPU those of a clock.
        compute: parameters, added up over them.
        flops: of the products in their forwards and backwards (three times those of a forward).
        curve: points along the way: step, seconds, flops, and what was validated.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    compute: int = 0
    flops: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def begun(cls, model: nn.Module, task: Task) -> Training:
        """One that has taken no step."""
        return cls(model, torch.optim.AdamW(model.parameters(), task.rate, (0.9, 0.95), weight_decay=0.01))

    def copy(self) -> Training:
        """A second one that goes on from here by itself, with a curve of its own."""
        model = copy.deepcopy(self.model)
        optimizer = type(self.optimizer)(model.parameters())  # its options are in the state
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return Training(model, optimizer, self.step, self.seconds, self.compute, self.flops)

    def state_dict(self) -> dict[str, Any]:
        """All but the model and its optimizer."""
        return {"step": self.step, "seconds": self.seconds, "compute": self.compute, "flops": self.flops,
                "curve": self.curve}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(copy.deepcopy(dict(state)))

    def save(self, place: Path, trainer: Any = None) -> None:
        ecospa_fx.save(self.model, place, optimizer=self.optimizer, trainer=trainer, also={"training": self})

    def resume(self, place: Path | None, trainer: Any = None) -> bool:
        """Go on from a save, if there is one."""
        if not has_save(place):
            return False
        ecospa_fx.resume(place, self.model, optimizer=self.optimizer, trainer=trainer, also={"training": self})
        return True


def has_save(place: Path | None) -> bool:
    return place is not None and (place / "checkpoint.json").exists()


def run_all(jobs: Sequence[Job], out: Path, saves: Path, workers: int) -> None:
    """Run the jobs of which `out` lacks rows, `workers` at a time in processes of one thread each."""
    console = Console()
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {_key(row) for row in rows_in(out)}
    open_jobs = [job for job in jobs if not _keys(job) <= done]
    began = time.perf_counter()
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        futures = [pool.submit(run_job, job, out, saves) for job in open_jobs]
        for future in as_completed(futures):
            found = future.result()
            losses = ", ".join(f"{row['variant']} {row['loss']:.3f}" for row in found)
            console.print(
                f"{time.perf_counter() - began:5.0f} s  {found[0]['title']}, seed {found[0]['seed']}: {losses}"
            )


def measured(jobs: Sequence[Job], out: Path) -> list[dict[str, Any]]:
    """The rows of `jobs` that `out` holds, each beside the dense run of its seed."""
    wanted = {key for job in jobs for key in _keys(job)}
    rows = [*{_key(row): row for row in rows_in(out) if _key(row) in wanted}.values()]
    dense = {(row["title"], row["seed"]): row for row in rows if row["variant"] == "dense"}
    computes = {key: row["compute"] for key, row in dense.items()}
    for row in rows:
        row["over_dense"] = row["loss"] - dense[row["title"], row["seed"]]["loss"]
        row["compute"] /= computes[row["title"], row["seed"]]
    return rows


def rows_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def _key(row: Mapping[str, Any]) -> str:
    """The run of a row, however its values were written."""
    return json.dumps([row[name] for name in ("title", "seed", "steps", "variant", "labels")])


def _keys(job: Job) -> set[str]:
    rows = [("dense", {}), *((variant.name, variant.labels) for variant in job.variants)]
    return {_key({**vars(job), "variant": name, "labels": labels}) for name, labels in rows}


def _one_thread() -> None:
    torch.set_num_threads(1)


def run_job(job: Job, out: Path, saves: Path) -> list[dict[str, Any]]:
    """Train the dense model of a job, then its branches, and add their rows to `out`.

    Args:
        job: with `save_every`, runs of which `out` has a row are not run again.
        out: a row a line, JSON.
        saves: folder for what is under way.

    Returns:
        A row per run, the dense one first.
    """
    keys, rows = _keys(job), []
    folder = None
    if job.save_every is not None:
        rows = [row for row in rows_in(out) if _key(row) in keys]
        folder = saves / f"{out.stem}_{job.title}_{job.steps}_{job.seed}".replace(" ", "_")
    done = {_key(row) for row in rows}

    def add(row: dict[str, Any]) -> None:
        rows.append({**row, "steps": job.steps, "machine": machine(), "date": date.today().isoformat()})
        if folder is not None:
            _write(out, rows[-1:])

    batches = job.task.batches(job.steps, job.seed)
    batches = batches if isinstance(batches, Sequence) else list(batches)
    kept: dict[int, Training] = {}
    if not rows:
        add(row_of(job, _dense(job, batches, folder, kept, job.steps), "dense", {}))
        if folder is not None:
            shutil.rmtree(folder / "dense", ignore_errors=True)
    for number, variant in enumerate(job.variants):
        if _key({**vars(job), "variant": variant.name, "labels": variant.labels}) in done:
            continue
        begin = round(variant.begin * job.steps)
        place = None if folder is None else folder / f"variant_{number}"
        if begin in kept:
            start = kept[begin].copy()
        elif has_save(place):
            start = fresh(job)  # all of it comes from there
        else:
            start = fresh(job)
            if not start.resume(None if folder is None else folder / f"start_{begin}"):
                start = _dense(job, batches, folder, kept, begin).copy()
            start.curve = []
        own = variant.own
        add(own(job, variant, start, batches, rows, place) if own else _branch(job, variant, start, batches, place))
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
    if folder is None:
        _write(out, rows)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def _write(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with out.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def fresh(job: Job) -> Training:
    """A compiled model with the random weights of the job's seed."""
    torch.manual_seed(job.seed)
    model = job.task.model().to(job.device)
    first, _ = placed(model, *next(iter(job.task.batches(1, job.seed))))
    ecospa_fx.compile(model, example_inputs=(first,), regions=job.regions)
    return Training.begun(model, job.task)


def _dense(job: Job, batches: Sequence[Any], folder: Path | None, kept: dict[int, Training], stop: int) -> Training:
    """Train the dense model up to a step; leave copies where branches begin in `kept`, and in the folder."""
    training = fresh(job)
    place = None if folder is None else folder / "dense"
    if not training.resume(place) and job.before is not None:
        task, steps = job.before
        earlier = Job(job.title, task, steps, job.seed, ())
        train(earlier, Training.begun(training.model, task), list(task.batches(steps, job.seed)), steps)
    for start in sorted({round(variant.begin * job.steps) for variant in job.variants}):
        if training.step <= start <= stop:
            train(job, training, batches, start, place=place)
            kept[start] = training.copy()
            if folder is not None:
                training.save(folder / f"start_{start}")
    train(job, training, batches, stop, place=place)
    return training


def _branch(
    job: Job, variant: Variant, training: Training, batches: Sequence[Any], place: Path | None
) -> dict[str, Any]:
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
    training.resume(place, trainer)
    with variant.around():
        train(job, training, batches, job.steps, trainer, place)
    row = row_of(job, training, variant.name, variant.labels)
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
    stop: int,
    trainer: Any = None,
    place: Path | None = None,
) -> None:
    """Take the steps up to `stop`; the curve gets a point at each validation.

    Args:
        place: where to save what is under way, every `job.save_every` seconds; None saves nothing.
    """
    every = max(1, job.steps // job.evaluations)
    size, flops, saved = -1, 0, time.perf_counter()
    for step in range(training.step + 1, stop + 1):
        if (now := sum(p.numel() for p in training.model.parameters())) != size:
            size, flops = now, flops_of(job.task, training.model, batches[step - 1])
        began = clock(job.device)
        for group in training.optimizer.param_groups:
            group["lr"] = job.task.rate * _rate(step, job.steps, job.last_rate)
        training.model.train()
        loss = job.task.loss(training.model, batches[step - 1])
        loss.backward()
        nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
        training.optimizer.step()
        if trainer is not None:
            trainer.step()
        training.optimizer.zero_grad()
        training.seconds += clock(job.device) - began
        training.compute += sum(p.numel() for p in training.model.parameters())
        training.flops += flops
        training.step = step
        if step % every == 0 and step < job.steps:
            _point(job, training)
        if place is not None and time.perf_counter() - saved > job.save_every:
            training.save(place, trainer)
            saved = time.perf_counter()


def clock(device: str) -> float:
    """Seconds of this process's processor; on a GPU those of a clock, when all that was asked of it is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def flops_of(task: Task, model: nn.Module, batch: Any) -> int:
    """FLOPs of the products in a training step: those of a forward, and twice as many in its backward."""
    model.eval()
    with torch.no_grad():
        task.loss(model, batch)  # so that nothing has to be captured while products are counted
        with FlopCounterMode(display=False) as counter:
            task.loss(model, batch)
    return 3 * int(counter.get_total_flops())


def _point(job: Job, training: Training) -> dict[str, float]:
    """Validate, and add that to the curve."""
    found = _validated(job.task, training.model)
    told = {name: round(value, 5) for name, value in found.items()}
    size = sum(p.numel() for p in training.model.parameters())
    point = {"step": training.step, "seconds": round(training.seconds, 2), "flops": training.flops,
             "parameters": size, **told}  # fmt: skip
    training.curve.append(point)
    if job.save_every is not None:
        print(f"  {job.title}, seed {job.seed}: {point}", flush=True)
    return found


@torch.no_grad()
def _validated(task: Task, model: nn.Module) -> dict[str, float]:
    model.eval()
    return task.validate(model)


def row_of(job: Job, training: Training, name: str, labels: Mapping[str, Any]) -> dict[str, Any]:
    """Summarise a run that is over as one row."""
    found = _point(job, training)
    return {
        "title": job.title, "variant": name, "seed": job.seed, "labels": dict(labels), **labels, **found,
        "parameters": training.curve[-1]["parameters"], "seconds": round(training.seconds, 1),
        "compute": training.compute, "flops": training.flops, "curve": training.curve,
    }  # fmt: skip


def _rate(step: int, steps: int, last: float) -> float:
    """Linear warmup over a twentieth of the run, then a cosine down to `last`; the share of the peak rate."""
    warmup = max(1, round(0.05 * steps))
    if step <= warmup:
        return step / warmup
    return last + (1 - last) / 2 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
