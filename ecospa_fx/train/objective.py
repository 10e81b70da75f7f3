"""Objective: a loss for a model whose task is unknown, from its own outputs.

    a loss, or a scalar              that: a model may compute its loss inside
    logits -> labels drawn from them         the gradients whose squares are the Fisher information
    other outputs -> a random projection     the gradients whose squares are those of a squared error

The labels of a batch are drawn once, from the whole model, so that the loss of a smaller one can be set beside it: its
mean rise is the divergence between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.errors import TargetError

from .cross_entropy import drawn_labels, mean_cross_entropy

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""`loss(model, batch)` -> a scalar."""


def called(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: keyword arguments in a mapping, positional ones in a tuple or list, else one input."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


class Objective:
    """The loss of a model's own outputs; call it as `loss(model, batch)`.

    Args:
        seed: of labels and projections.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._wanted: dict[int, tuple[Any, Tensor]] = {}  # id of a batch -> the batch, and its labels or outputs

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Compute the loss of a batch; of one that it meets for the first time, it sets the labels."""
        return self._value(model, batch, drawn=1.0)

    def measured(self, model: nn.Module, batch: Any) -> Tensor:
        """Compute the loss without what is drawn at random of a projection: half the squared error of the outputs."""
        return self._value(model, batch, drawn=0.0)

    def _value(self, model: nn.Module, batch: Any, drawn: float) -> Tensor:
        result = called(model, batch)
        if (own := loss_in(result)) is not None:
            return own
        logits = logits_of(result)
        told_apart = logits is not None
        outputs = outputs_of(result) if logits is None else logits
        if outputs.ndim == 0:
            return outputs
        rows = outputs.flatten(0, -2) if told_apart else outputs.float().flatten()
        if told_apart and (mask := _mask_of(batch)) is not None and mask.numel() == len(rows):
            counts = mask.flatten().to(rows.device).bool()
            rows = rows if bool(counts.all()) else rows[counts]
        if id(batch) not in self._wanted:
            generator = torch.Generator().manual_seed(self.seed + len(self._wanted))
            wanted = (drawn_labels if told_apart else _projection)(rows, generator)
            self._wanted[id(batch)] = batch, wanted
        wanted = self._wanted[id(batch)][1].to(rows.device)
        if told_apart:
            return mean_cross_entropy(rows, wanted)
        # Half the squared error, and a random projection, whose gradient is that at the whole model.
        error, along = rows - wanted[0], wanted[1]
        return (error.square().sum() / 2 - drawn * (error * along).sum()) / max(1, len(outputs))


def _projection(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Return the outputs, and a direction among them drawn at random, as long as they vary."""
    scale = outputs.detach().std(correction=0)
    return torch.stack([outputs.detach(), scale * torch.randn(outputs.shape, generator=generator).to(outputs.device)])


def loss_in(result: Any) -> Tensor | None:
    """Return the loss of a result that has one, as models of transformers do that were given labels."""
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.ndim == 0 else None


def logits_of(result: Any) -> Tensor | None:
    """Return the logits `[..., classes]` of a result that names them, as models with a head of transformers do."""
    logits = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.ndim > 1 else None


def outputs_of(result: Any) -> Tensor:
    """Return the first tensor of a result that has a gradient."""
    for leaf in pytree.tree_leaves(dict(result) if isinstance(result, Mapping) else result):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise TargetError(f"the model returns no tensor of numbers but {type(result).__name__}; pass loss=")


def _mask_of(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None
