"""Training runs that can be cut in two: each with a model, optimizers, schedules and random numbers of its own kind.

python resuming.py DIRECTORY     go on with every run that was saved there, and save it again at its end
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

import ecospa_fx
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops

WORDS = 61
CUT, END = 11, 22  # a shrink is every 4 steps: the cut falls between two


def gpt2() -> nn.Module:
    """As the demo's, with dropout; its embedding and its head are one tensor."""
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS, n_positions=16, n_embd=24, n_layer=2, n_head=2, use_cache=False, bos_token_id=None,
            eos_token_id=None,
        )
    )  # fmt: skip


def llama() -> nn.Module:
    """Rotary, grouped queries, tied embeddings, in bfloat16 and not with the attention that a config stands for."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").bfloat16()


class Convolutions(nn.Module):
    """In channels-last memory, with running statistics, dropout, and a table that state_dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 8, 1))
            for _ in range(2)
        )
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(8, 5)
        self.register_buffer("shift", torch.linspace(0, 1, 8)[:, None, None], persistent=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.shift
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.drop(x.mean((2, 3))))


class Recurrent(nn.Module):
    """Cells whose entries gradients alone tell of, beside hidden units that are read by position."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(6, 12, batch_first=True)
        self.up, self.down, self.drop = nn.Linear(12, 24), nn.Linear(24, 5), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(F.gelu(self.up(self.cells(x)[0])))).mean(1)


def series(model: nn.Module, generator: torch.Generator) -> Tensor:
    x = torch.randn(8, 4, 6, generator=generator)
    return F.cross_entropy(model(x), torch.randint(5, (8,), generator=generator))


def words(model: nn.Module, generator: torch.Generator) -> Tensor:
    length = int(torch.randint(5, 12, (), generator=generator))
    tokens = torch.randint(2, WORDS, (4, length), generator=generator)
    return model(input_ids=tokens, labels=tokens).loss


def images(model: nn.Module, generator: torch.Generator) -> Tensor:
    x = torch.randn(4, 3, 8, 8, generator=generator)
    x = (x * random.uniform(0.9, 1.1) + np.random.normal(0, 0.1)).to(memory_format=torch.channels_last)  # noqa: NPY002
    return F.cross_entropy(model(x), torch.randint(5, (4,), generator=generator))


def adamw(model: nn.Module) -> list[Optimizer]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    return [torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, amsgrad=True)]


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)]


def muon_and_adafactor(model: nn.Module) -> list[Optimizer]:
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for p in model.parameters() if all(p is not q for q in inner)]
    return [torch.optim.Muon(inner, lr=1e-2), torch.optim.Adafactor(rest, lr=1e-2)]


def warmup(optimizer: Optimizer) -> Any:
    return lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(optimizer, 15)],
        milestones=[5],
    )


def one_cycle(optimizer: Optimizer) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=END + 1)


@dataclass
class Kind:
    """What a run is made of."""

    factory: Callable[[], nn.Module]
    loss: Callable[[nn.Module, torch.Generator], Tensor]
    optimizers: Callable[[nn.Module], list[Optimizer]]
    schedule: Callable[[Optimizer], Any]
    settings: dict[str, Any] = field(default_factory=dict)
    scaled: bool = False
    from_config: bool = False
    captured: Callable[[], Any] | None = None  # example inputs, with which it is compiled
    averaged: bool = False


KINDS = {
    "gpt2": Kind(
        gpt2,
        words,
        adamw,
        warmup,
        {"score": "taylor", "decay": 0.9, "index_score": "activation", "cost": "flops"},
        averaged=True,
    ),
    "convolutions": Kind(
        Convolutions, images, sgd, one_cycle, {"gradients": "optimizer", "window": 3}, scaled=True, averaged=True
    ),
    "llama": Kind(
        llama, words, muon_and_adafactor, warmup, {"gradients": "backward", "index_score": "random"}, from_config=True
    ),
    "cells": Kind(Recurrent, series, adamw, warmup, {"policy": "adaptive"}, captured=lambda: (torch.zeros(2, 4, 6),)),
    "images, activations": Kind(
        Convolutions, images, sgd, one_cycle, {"score": "activation"}, captured=lambda: (torch.zeros(2, 3, 8, 8),)
    ),
}


class Run:
    """One of them, new or gone on with: with the model that `load` makes, or with a new one."""

    def __init__(self, kind: str, saved: Path | None = None, *, new: bool = False) -> None:
        self.kind = kind = KINDS[kind]
        if saved is None or new:
            torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
            self.model = ecospa_fx.compile(kind.factory(), example_inputs=kind.captured() if kind.captured else None)
        else:
            self.model = ecospa_fx.load(saved, None if kind.from_config else kind.factory)
        self.optimizers = kind.optimizers(self.model)
        self.schedulers = [kind.schedule(optimizer) for optimizer in self.optimizers]
        average = swa_utils.AveragedModel(self.model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.8))
        self.average = average if kind.averaged else None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4) if kind.scaled else None
        self.trainer = ecospa_fx.EcoSpaTrainer(
            self.model,
            self.optimizers[0],
            target=0.7,
            interval=4,
            end=21,
            also=[average] if kind.averaged else (),
            **kind.settings,
        )
        self.noise = torch.Generator().manual_seed(1)
        self.step = 0
        if saved is not None:
            self.go_back(saved)

    def go_back(self, saved: Path) -> None:
        """Take up what was saved, in the objects there are."""
        ecospa_fx.resume(saved, self.model, **self.held)
        self.step = self.trainer.steps

    @property
    def held(self) -> dict[str, Any]:
        """What is saved along with the model."""
        return {
            "optimizer": self.optimizers, "trainer": self.trainer, "scheduler": self.schedulers, "scaler": self.scaler,
            "also": {"noise": self.noise} | ({} if self.average is None else {"average": self.average}),
        }  # fmt: skip

    def train(self, until: int) -> None:
        while self.step < until:
            loss = self.kind.loss(self.model, self.noise)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            for optimizer in self.optimizers:
                optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
            if self.scaler is not None:
                self.scaler.update()
            self.trainer.step(loss=loss)
            for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
                optimizer.zero_grad()
                scheduler.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
            self.step += 1

    def save(self, directory: Path) -> None:
        ecospa_fx.save(self.model, directory, **self.held)


def main(arguments: Sequence[str]) -> None:
    tolerate_missing_torchvision_ops()
    torch.set_num_threads(1)
    for kind in KINDS:
        for new in (False, True):
            run = Run(kind, Path(arguments[0]) / kind, new=new)
            assert run.step == CUT
            run.train(END)
            run.save(Path(arguments[0]) / f"{kind} resumed {'with a new model' if new else 'with a loaded model'}")


if __name__ == "__main__":
    main(sys.argv[1:])
