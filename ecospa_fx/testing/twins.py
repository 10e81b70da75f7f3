"""Twins: the plain model after a shrink, without any graph and any plan, told only which entries each shrink took.

Zeros stand in place of what has been removed, in weights, gradients and optimizer state. A model that draws random
tensors along what shrinks is made as small as the other instead, so that both draw the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Axis = tuple[str, int]  # a parameter or buffer, and a dim of it


class Remains:
    """The entries that are left of a model.

    Attributes:
        left: original positions that are left of each dim that has shrunk.
    """

    def __init__(self) -> None:
        self.left: dict[Axis, Tensor] = {}

    def take(self, gone: Mapping[Axis, Tensor], buffers: Mapping[Axis, Tensor], sizes: Mapping[str, Tensor]) -> None:
        """Note a shrink.

        Args:
            gone: a mask of the entries that go, among those there are now, of each dim.
            buffers: positions that are left of each dim of a buffer.
            sizes: parameters of original sizes.
        """
        for (name, dim), mask in gone.items():
            if bool(mask.any()):
                now = self.left.get((name, dim), torch.arange(sizes[name].shape[dim]))
                self.left[name, dim] = now[~mask]
        self.left |= buffers

    def sliced(self, tensor: Tensor, name: str, shape: Sequence[int]) -> list[Tensor]:
        """Return all that may be left of a tensor of the plain model.

        Args:
            tensor: the tensor.
            name: the name of a parameter or buffer, or of something else.
            shape: the shape that it has in the other world; a tensor that is not a parameter or buffer is cut to it
                along axes of these sizes that have shrunk, of which there may be several.
        """
        tensors = [tensor]
        for dim in range(tensor.ndim):
            if (name, dim) in self.left:
                fitting = [self.left[name, dim]]
            elif tensor.ndim == len(shape) and tensor.shape[dim] != shape[dim]:
                fitting = [k for k in self.left.values() if len(k) == shape[dim] and int(k.max()) < tensor.shape[dim]]
            else:
                continue
            distinct = {tuple(kept.tolist()): kept for kept in fitting}
            tensors = [each.index_select(dim, kept) for each in tensors for kept in distinct.values()] or tensors
        return tensors

    def zero(self, model: nn.Module, optimizer: Optimizer, buffers: bool = False) -> None:
        """Put zeros in a dense twin wherever an entry has been removed."""
        named = dict(model.named_parameters()) | (dict(model.named_buffers()) if buffers else {})
        for (name, dim), left in self.left.items():
            if name not in named:
                continue
            tensor = named[name]
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
            gone[left] = False
            if 0 in tensor.stride():  # one entry in memory for many
                tensor.data = tensor.data.contiguous()
            for each in (tensor.data, tensor.grad, *optimizer.state.get(tensor, {}).values()):
                if isinstance(each, Tensor) and each.shape == tensor.shape:
                    each.index_fill_(dim, gone.nonzero().flatten(), 0.0)

    def slice(self, model: nn.Module, optimizer: Optimizer, before: Mapping[Axis, Tensor]) -> None:
        """Make a plain model as small as the other.

        Args:
            model: the plain model.
            optimizer: that of its parameters.
            before: `left` before the shrink.
        """
        named = dict(model.named_parameters()) | dict(model.named_buffers())
        for (name, dim), left in self.left.items():
            tensor = named[name]
            was = before.get((name, dim), torch.arange(tensor.shape[dim]))
            stays = torch.isin(was, left).nonzero().flatten()
            state, grad, shape = optimizer.state.get(tensor, {}), tensor.grad, tensor.shape
            tensor.grad = None
            small = tensor.data.index_select(dim, stays)
            if tensor.requires_grad:  # a graph that the module holds knows the old shape, up to a change of dtype
                tensor.data = torch.empty(0, dtype=torch.float16)
            tensor.data = small
            tensor.grad = None if grad is None else grad.index_select(dim, stays)
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == shape:
                    state[key] = value.index_select(dim, stays)


def fitted(fresh: nn.Module, model: nn.Module) -> nn.Module:
    """Give a plain model that was made anew the sizes of another, so that it can load its state."""
    named = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in named and named[name].shape != tensor.shape:
            named[name].data = torch.zeros_like(tensor.data)
    return fresh
