"""A model of the final size from the start, beside those that shrink to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ecospa_fx
from experiments.runs import Job, Training, Variant, flops_of, fresh, row_of, train


def small(
    job: Job, variant: Variant, start: Training, batches: Sequence[Any], rows: Sequence[Mapping[str, Any]],
    place: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Train it for the compute that the adaptive run took."""
    (other,) = (row for row in rows if row["variant"] == "adaptive" and variant.labels.items() <= row.items())
    return _small(
        job, variant, place, lambda begun: round(other["compute"] / sum(p.numel() for p in begun.model.parameters()))
    )


def small_as_long(
    job: Job, variant: Variant, start: Training, batches: Sequence[Any], rows: Sequence[Mapping[str, Any]],
    place: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Train it for as many steps as the others."""
    return _small(job, variant, place, lambda begun: job.steps)


def small_as_many_flops(
    job: Job, variant: Variant, start: Training, batches: Sequence[Any], rows: Sequence[Mapping[str, Any]],
    place: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Train it for as many FLOPs as the dense run took."""
    (dense,) = (row for row in rows if row["variant"] == "dense")
    return _small(
        job, variant, place, lambda begun: round(dense["flops"] / flops_of(job.task, begun.model, batches[0]))
    )


def _small(job: Job, variant: Variant, place: Path | None, steps_of: Callable[[Training], int]) -> dict[str, Any]:
    training = fresh(job)
    if not training.resume(place):
        target = variant.settings["target"]
        couplings = [c for c in ecospa_fx.couplings(training.model) if c.kind != "heads"]
        keep = {c: torch.arange(max(1, round(target * c.size))) for c in couplings}
        ecospa_fx.shrink(
            training.model, keep, optimizer=training.optimizer
        )  # random weights: any entries are random ones
    longer = replace(job, steps=steps_of(training), variants=())
    batches = job.task.batches(longer.steps, job.seed)
    batches = batches if isinstance(batches, Sequence) else list(batches)
    train(longer, training, batches, longer.steps, place=place)
    return row_of(longer, training, variant.name, variant.labels)
