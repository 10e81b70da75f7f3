"""Training runs of the demo, and their curves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ecospa_fx

from .corpus import Corpus, training_batches, validation_batches
from .models import build_model
from .options import Options

PEAK_RATE = 2e-3
WARMUP = 0.05
"""Fraction of the steps during which the learning rate rises."""

EVALUATIONS = 12
"""Number of validation losses measured along a run."""

EVALUATION_BATCHES = 6
FINAL_BATCHES = 48


@dataclass
class Run:
    """A training run: its model and its curves.

    Attributes:
        name: title of its row.
        model: the model after the last step.
        optimizer: the optimizer.
        trainer: the `EcoSpaTrainer`, or None for the dense run.
        losses: training loss of each step, in nats per byte.
        sizes: parameters after each step.
        seconds: time of each step, from batch to cleared gradients.
        valid: steps and the validation loss there, in nats per byte.
        shrinks: steps after which the model was smaller.
        final_loss: validation loss after the last step on more held-out text, in nats per byte.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    trainer: Any = None
    losses: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    valid: list[tuple[int, float]] = field(default_factory=list)
    shrinks: list[int] = field(default_factory=list)
    final_loss: float = math.nan

    def state_bytes(self) -> int:
        """Count the bytes of parameters and of all optimizer state."""
        entries = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *(value for value in entries if isinstance(value, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def start_run(name: str, options: Options, before_shrink: Callable[..., None] | None = None) -> Run:
    """Build the model and optimizer of a run; runs of one seed start from equal weights.

    Args:
        name: `"dense"` for a plain model that ecospa_fx never sees; any other name is trained with EcoSpa.
        options: sizes, seed and schedule.
        before_shrink: called before each shrink, see `EcoSpaTrainer`.
    """
    torch.manual_seed(options.seed)
    model = build_model(options)
    trainer = None
    if name != "dense":
        example = torch.zeros(options.batch_size, options.context, dtype=torch.long)
        ecospa_fx.compile(model, example_inputs=(example,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    if name != "dense":
        trainer = ecospa_fx.EcoSpaTrainer(
            model,
            optimizer,
            target=options.target,
            interval=options.interval,
            start=options.start,
            end=options.end,
            before_shrink=before_shrink,
        )
    return Run(name, model, optimizer, trainer)


def train(run: Run, corpus: Corpus, options: Options) -> Iterator[int]:
    """Train to the end, one step at a time, and record the curves in `run`.

    Yields:
        The number of each finished step, from 1.
    """
    every = max(1, options.steps // EVALUATIONS)
    batches = training_batches(corpus, options.steps, options.batch_size, options.context, options.seed)
    for step, (x, y) in enumerate(batches, start=1):
        began = time.perf_counter()
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps)
        run.losses.append(training_step(run, x, y))
        run.seconds.append(time.perf_counter() - began)
        run.sizes.append(sum(parameter.numel() for parameter in run.model.parameters()))
        if len(run.sizes) > 1 and run.sizes[-1] < run.sizes[-2]:
            run.shrinks.append(step)
        if step % every == 0 or step == options.steps:
            run.valid.append((step, evaluate(run.model, corpus, options, EVALUATION_BATCHES)))
        yield step
    run.final_loss = evaluate(run.model, corpus, options, FINAL_BATCHES)


def training_step(run: Run, x: Tensor, y: Tensor) -> float:
    """Do one optimizer step on `x`, `y` (both `[batch, context]`) and return the loss before it, in nats per byte."""
    run.model.train()
    loss = loss_of(run.model, x, y)
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    if run.trainer is not None:
        run.trainer.step()
    run.optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def evaluate(model: nn.Module, corpus: Corpus, options: Options, count: int) -> float:
    """Compute the mean loss over `count` fixed batches of held-out text, in nats per byte."""
    model.eval()
    batches = validation_batches(corpus, count, options.batch_size, options.context)
    losses = [loss_of(model, x, y).item() for x, y in batches]
    return sum(losses) / len(losses)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Compute the mean cross entropy of the next byte, in nats; `x` and `y` are `[batch, context]`."""
    logits = model(x).logits  # [batch, context, 256]
    return cross_entropy(logits.flatten(0, 1), y.flatten())


def learning_rate(step: int, steps: int) -> float:
    """Return the learning rate: linear warmup, then a cosine down to a tenth of the peak; `step` counts from 1."""
    warmup = max(1, round(WARMUP * steps))
    if step <= warmup:
        return PEAK_RATE * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return PEAK_RATE * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
