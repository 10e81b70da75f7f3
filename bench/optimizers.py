"""Optimizers: the demo's training run with each optimizer of torch that can follow a shrink, dense and to half size.

python bench/optimizers.py [--steps 160] [--layers 2] [--width 64] [--context 32]

Both runs of an optimizer start from equal weights and see equal batches. Exit code 1 if any run misses its target by
more than 0.5% or ends with a loss that is not finite.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from machine import machine, write_csv
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn, optim

import ecospa_fx
from ecospa_fx.demo.corpus import Corpus, read_corpus, training_batches
from ecospa_fx.demo.models import build_model
from ecospa_fx.demo.options import Options
from ecospa_fx.demo.train import evaluate, loss_of

TOLERANCE = 0.005
"""Share of the target by which a run may miss it."""

WARMUP = 0.05
BATCHES = 24  # of held-out text, for the loss at the end

Make = Callable[[nn.Module], list[optim.Optimizer]]


def of(cls: type[optim.Optimizer], lr: float, **options: object) -> Make:
    return lambda model: [cls(model.parameters(), lr=lr, **options)]


def muon(model: nn.Module) -> list[optim.Optimizer]:
    """Muon on the matrices inside the blocks, AdamW on everything else, as one uses it."""
    inside = {id(p) for block in model.modules() if isinstance(block, nn.ModuleList) for p in block.parameters()}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) in inside]
    rest = [p for p in model.parameters() if p.ndim != 2 or id(p) not in inside]
    return [optim.Muon(matrices, lr=0.02), optim.AdamW(rest, lr=2e-3)]


OPTIMIZERS: dict[str, Make] = {
    "AdamW": of(optim.AdamW, 2e-3, betas=(0.9, 0.95), weight_decay=0.01),
    "Adam amsgrad fused": of(optim.Adam, 2e-3, amsgrad=True, fused=True),
    "NAdam": of(optim.NAdam, 2e-3),
    "RAdam": of(optim.RAdam, 2e-3),
    "Adamax": of(optim.Adamax, 4e-3),
    "SGD nesterov": of(optim.SGD, 0.2, momentum=0.9, nesterov=True),
    "RMSprop centered": of(optim.RMSprop, 5e-4, momentum=0.5, centered=True),
    "Adagrad": of(optim.Adagrad, 1e-2),
    "Adadelta foreach": of(optim.Adadelta, 1.0, foreach=True),
    "ASGD": of(optim.ASGD, 1.0),
    "Rprop": of(optim.Rprop, 1e-4, step_sizes=(1e-6, 1e-2)),
    "Adafactor": of(optim.Adafactor, 5e-2),
    "Muon and AdamW": muon,
}


@dataclass
class Subject:
    """A model in training.

    Attributes:
        model: it.
        optimizers: one or two.
        trainer: shrinks it; None for the dense run.
    """

    model: nn.Module
    optimizers: list[optim.Optimizer]
    trainer: ecospa_fx.EcoSpaTrainer | None

    def step(self, x: Tensor, y: Tensor) -> None:
        self.model.train()
        loss_of(self.model, x, y).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.trainer is not None:
            self.trainer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def state(self) -> int:
        """Entries that the optimizers hold."""
        states = (state for optimizer in self.optimizers for state in optimizer.state.values())
        return sum(value.numel() for state in states for value in state.values() if isinstance(value, Tensor))


def subjects(make: Make, options: Options) -> Iterator[Subject]:
    """The dense run, then the one that shrinks."""
    for dense in (True, False):
        torch.manual_seed(options.seed)
        model = build_model(options)
        if not dense:
            example = torch.zeros(options.batch_size, options.context, dtype=torch.long)
            ecospa_fx.compile(model, example_inputs=(example,))
        optimizers = make(model)
        trainer = None
        if not dense:
            trainer = ecospa_fx.EcoSpaTrainer(
                model, optimizers, target=options.target,
                interval=options.interval, start=options.start, end=options.end,
            )  # fmt: skip
        yield Subject(model, optimizers, trainer)


def run(name: str, corpus: Corpus, options: Options) -> dict[str, object]:
    """Train both subjects side by side, step by step."""
    dense, small = subjects(OPTIMIZERS[name], options)
    # A scheduler each, which no shrink touches: a warmup, then a cosine down to a tenth.
    schedules = [
        optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, options.steps))
        for subject in (dense, small)
        for optimizer in subject.optimizers
    ]
    for x, y in training_batches(corpus, options.steps, options.batch_size, options.context, options.seed):
        for subject in (dense, small):
            subject.step(x, y)
        for schedule in schedules:
            schedule.step()
    losses = [evaluate(subject.model, corpus, options, BATCHES) for subject in (dense, small)]
    share = small.parameters / dense.parameters
    assert small.trainer is not None
    return {
        "optimizer": name,
        "loss_dense": round(losses[0], 4),
        "loss": round(losses[1], 4),
        "loss_ratio": round(losses[1] / losses[0], 4),
        "parameters": small.parameters,
        "share": round(share, 5),
        "off_target": round(share / options.target - 1, 5),
        "state_share": round(small.state / dense.state, 5) if dense.state else "",
        "shrinks": len(small.trainer.history),
        "ok": math.isfinite(losses[1]) and abs(share / options.target - 1) <= TOLERANCE,
    }


def rate(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("steps", 160), ("layers", 2), ("width", 64), ("context", 32)):
        parser.add_argument(f"--{option}", type=int, default=default)
    options = Options(**vars(parser.parse_args()))
    corpus = read_corpus(None, least=20 * options.batch_size * (options.context + 1))
    console, began = Console(), time.perf_counter()
    rows = []
    for name in OPTIMIZERS:
        rows.append(run(name, corpus, options))
        console.print(f"{name}: loss {rows[-1]['loss']}, dense {rows[-1]['loss_dense']}, share {rows[-1]['share']}")
    settings = {"steps": options.steps, "layers": options.layers, "width": options.width, "context": options.context}
    table = Table(title=f"{options.steps} steps of the demo's model, target {options.target:g}; loss in nats per byte")
    for column in ("optimizer", "dense", "EcoSpa", "ratio", "share", "off target", "state", "shrinks"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for row in rows:
        table.add_row(
            str(row["optimizer"]), f"{row['loss_dense']:.3f}", f"{row['loss']:.3f}", f"x {row['loss_ratio']:.3f}",
            f"{row['share']:.4f}", f"{row['off_target']:+.2%}",
            f"x {row['state_share']:.2f}" if row["state_share"] else "", str(row["shrinks"]),
            style="" if row["ok"] else "red",
        )  # fmt: skip
    console.print(table)
    console.print(f"{machine()}; took {time.perf_counter() - began:.0f} s")
    write_csv("optimizers", [{**row, **settings} for row in rows])
    console.print("written to bench/results/optimizers.csv")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
