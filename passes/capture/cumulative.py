"""Cumulative averages: running statistics of batch norms whose `momentum` is None, as `update_bn` of torch sets it.

They move by one over the number of batches so far. The layer reads that number out of a buffer, in Python, and no graph
of torch.export goes on from there; while a region is traced, the same is computed of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode


def cumulative_averages(module: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which the batch norms of a module that average over all batches can be traced."""
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm)
        and not isinstance(layer, nn.SyncBatchNorm)  # its ranks average with each other
        and layer.training
        and layer.momentum is None
        and layer.num_batches_tracked is not None
    ]
    return _CumulativeAverages(layers) if layers else nullcontext()


class _Share:
    """Stands in for the momentum of a layer: one over the number of batches that it has seen."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer


class _CumulativeAverages(TorchFunctionMode):
    def __init__(self, layers: list[_BatchNorm]) -> None:
        super().__init__()
        self._layers = layers

    def __enter__(self) -> Any:
        for layer in self._layers:
            layer.__dict__["momentum"] = _Share(layer)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for layer in self._layers:
            layer.__dict__["momentum"] = None

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, batch norms with such a momentum as several functions."""
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise as `torch.nn.functional.batch_norm` does, whose arguments these are."""
    if not isinstance(momentum, _Share):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    batches = momentum.layer.num_batches_tracked
    assert batches is not None
    with torch.no_grad():
        values, dims = input.detach().to(running_mean.dtype), [0, *range(2, input.ndim)]
        share = (1.0 / batches).to(running_mean.dtype)
        running_mean.lerp_(values.mean(dims), share)
        running_var.lerp_(values.var(dims), share)
    return F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)
