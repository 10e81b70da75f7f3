"""Batches: the loss of a batch, the number of tokens in it, and a listener to the losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.arguments import KEYWORDS, Kind, check, shown
from ecospa_fx.errors import ArgumentError, EcoSpaError

from .loss_spikes import number_of


class LossListener(Protocol):
    """An object that follows training, such as `ecospa_fx.Watch`."""

    def step(self, loss: float) -> None:
        """Take the loss of a training step, after the trainer has taken that step."""


def _listens(value: Any) -> bool:
    try:
        inspect.signature(value.step).bind(0.0)
    except (AttributeError, TypeError, ValueError):
        return False
    return not isinstance(value, (type, Optimizer))  # an optimizer's step takes a function


LISTENER = Kind("an object with step(loss)", _listens)


def loss_of(model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor] | None) -> Tensor:
    """Compute the loss of a batch.

    Args:
        model: called with the batch.
        batch: a mapping of keyword arguments of a model whose output has `.loss`, or an `(inputs, targets)` pair.
        loss: `loss(outputs, targets)` for pairs.

    Raises:
        EcoSpaError: the batch is a pair, and `loss` is missing; or the loss is not one number.
        ArgumentError: the batch is neither, or it gives no loss to differentiate.
    """
    if isinstance(batch, Mapping):
        check(batch, KEYWORDS, "batch", "EcoSpaTrainer.fit")
        outputs = model(**batch)
        if not hasattr(outputs, "loss"):
            raise ArgumentError(
                f"EcoSpaTrainer.fit: the batch is a mapping, so the output of the model must have .loss, and it is "
                f"{shown(outputs)}; pass batches of (inputs, targets), and loss="
            )
        return _one(outputs.loss)
    if loss is None:
        kind = type(batch).__name__
        raise EcoSpaError(f"a batch is a {kind}, not a mapping; pass loss=, a function of outputs and targets")
    inputs, targets = _pair(batch)
    return _one(loss(model(inputs), targets))


def _pair(batch: Any) -> tuple[Any, Any]:
    try:
        if not isinstance(batch, (str, bytes, Tensor)):
            inputs, targets = batch
            return inputs, targets
    except (TypeError, ValueError):  # it has no parts, or another number of them
        pass
    length = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    raise ArgumentError(
        f"EcoSpaTrainer.fit: a batch is {shown(batch)}{length}; it must be a mapping of keyword arguments, or a pair "
        "(inputs, targets)"
    )


def _one(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        kind = "a tensor without a gradient" if isinstance(loss, Tensor) else shown(loss)
        raise ArgumentError(f"EcoSpaTrainer.fit: the loss is {kind}; it must be a tensor that depends on the weights")
    number_of(loss.detach() if loss.numel() != 1 else 0.0)  # without waiting for a GPU
    return loss


def tokens_of(batch: Any) -> int | None:
    """Count the tokens of a batch: the entries of its first tensor of whole numbers; None if it has no such tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    integers = (v for v in values if isinstance(v, Tensor) and not v.is_floating_point())
    return next((tensor.numel() for tensor in integers), None)
