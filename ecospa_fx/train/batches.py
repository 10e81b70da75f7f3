"""Batches: the loss of a batch, the number of tokens in it, and a listener to the losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ecospa_fx.errors import EcoSpaError

from .loss_spikes import number_of


class LossListener(Protocol):
    """An object that follows training, such as `ecospa_fx.Watch`."""

    def step(self, loss: float) -> None:
        """Take the loss of a training step, after the trainer has taken that step."""


def loss_of(model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor] | None) -> Tensor:
    """Compute the loss of a batch.

    Args:
        model: called with the batch.
        batch: a mapping of keyword arguments of a model whose output has `.loss`, or an `(inputs, targets)` pair.
        loss: `loss(outputs, targets)` for pairs.

    Raises:
        EcoSpaError: the batch is a pair, and `loss` is missing; or the loss is not one number.
    """
    if isinstance(batch, Mapping):
        value: Tensor = model(**batch).loss
        return _one(value)
    if loss is None:
        kind = type(batch).__name__
        raise EcoSpaError(f"a batch is a {kind}, not a mapping; pass loss=, a function of outputs and targets")
    inputs, targets = batch
    return _one(loss(model(inputs), targets))


def _one(loss: Tensor) -> Tensor:
    number_of(loss.detach() if loss.numel() != 1 else 0.0)  # without waiting for a GPU
    return loss


def tokens_of(batch: Any) -> int | None:
    """Count the tokens of a batch: the entries of its first tensor of whole numbers; None if it has no such tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    integers = (v for v in values if isinstance(v, Tensor) and not v.is_floating_point())
    return next((tensor.numel() for tensor in integers), None)
