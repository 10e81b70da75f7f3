"""Small tasks: for each a model with random weights, batches, a loss, and a score on held-out data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ecospa_fx.demo.corpus import Corpus, read_corpus, training_batches, validation_batches
from ecospa_fx.demo.models import build_model
from ecospa_fx.demo.options import Options

Batch = tuple[Tensor, Tensor]


def placed(model: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors on the device of a model."""
    device = next(model.parameters()).device
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


class Task(Protocol):
    """One thing to learn. It is made in the process that runs it, from values that can be sent there."""

    rate: float

    def model(self) -> nn.Module:
        """A model with random weights, as `torch.manual_seed` left the generator."""

    def batches(self, steps: int, seed: int) -> Iterable[Batch]:
        """Training batches; the same seed gives the same ones. Those of a long run are a sequence, made when taken."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """`loss` on held-out data, and what else is worth knowing."""


@dataclass(frozen=True)
class Text:
    """Bytes of text, learned by a small causal language model of any transformers type.

    Attributes:
        source: folder or file of text, or None for the interpreter's standard library.
        arch: transformers model type.
        width: hidden size, in channels.
        layers: blocks.
    """

    source: Path | None
    arch: str = "gpt2"
    width: int = 128
    layers: int = 4
    context: int = 128
    batch_size: int = 8
    rate: float = 2e-3

    @classmethod
    def of(cls, scale: str, source: Path | None = None) -> Text:
        """The sizes that the experiments have in common, for a `"cpu"` or a `"gpu"`."""
        return cls(source, width=512, layers=8, context=256, batch_size=32) if scale == "gpu" else cls(source)

    def model(self) -> nn.Module:
        return build_model(self._options())

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        return training_batches(self._corpus(), steps, self.batch_size, self.context, seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y = placed(model, *batch)
        return cross_entropy(model(x).logits.flatten(0, 1), y.flatten())

    def validate(self, model: nn.Module) -> dict[str, float]:
        batches = validation_batches(self._corpus(), 32, self.batch_size, self.context)
        losses = [self.loss(model, batch).item() for batch in batches]
        return {"loss": sum(losses) / len(losses)}

    def _options(self) -> Options:
        sizes = {"width": self.width, "layers": self.layers}
        return Options(arch=self.arch, context=self.context, batch_size=self.batch_size, **sizes)

    def _corpus(self) -> Corpus:
        return _read(self.source)


@cache
def _read(source: Path | None) -> Corpus:
    return read_corpus(source, least=100_000)


@dataclass(frozen=True)
class Recall:
    """Associative recall: pairs of key and value, then keys again, whose values are to be named.

    A sequence holds `pairs` pairs and then asks for twice as many at random, some of them again. Only the answers
    count. It cannot be solved without looking back, nor by leaving out what has been answered, so it shows what
    attention has lost. Matrices start four times as large as GPT-2's: from there this small model finds out how to look
    back in hundreds of steps and not in many thousands.
    """

    pairs: int = 8
    keys: int = 32
    values: int = 32
    width: int = 64
    layers: int = 2
    batch_size: int = 32
    rate: float = 1e-3

    @torch.no_grad()
    def model(self) -> nn.Module:
        length = 6 * self.pairs
        model = build_model(
            Options(arch="gpt2", context=length, batch_size=self.batch_size, width=self.width, layers=self.layers)
        )
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
        return model

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        draw = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield self._draw(self.batch_size, draw)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y = placed(model, *batch)
        return cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), ignore_index=-1)

    def validate(self, model: nn.Module) -> dict[str, float]:
        x, y = placed(model, *self._draw(256, torch.Generator().manual_seed(12345)))
        logits = model(x).logits
        asked = y >= 0
        right = (logits.argmax(-1)[asked] == y[asked]).float().mean().item()
        return {"loss": cross_entropy(logits[asked], y[asked]).item(), "accuracy": right}

    def _draw(self, count: int, draw: torch.Generator) -> Batch:
        """Tokens and what follows them, `[count, 6 * pairs]` both; -1 where no answer is due."""
        keys = torch.rand(count, self.keys, generator=draw).argsort(1)[:, : self.pairs]
        values = torch.randint(self.values, (count, self.pairs), generator=draw) + self.keys
        order = torch.randint(self.pairs, (count, 2 * self.pairs), generator=draw)
        told = torch.stack([keys, values], 2).flatten(1)
        asked = torch.stack([keys.gather(1, order), values.gather(1, order)], 2).flatten(1)
        x = torch.cat([told, asked], 1)
        y = torch.full_like(x, -1)
        y[:, 2 * self.pairs :: 2] = x[:, 2 * self.pairs + 1 :: 2]
        return x, y
