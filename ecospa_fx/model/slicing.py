"""Slicing: remove from parameters, gradients and optimizer state the entries that a plan drops, all or nothing.

prepare(model, before, after, optimizers)   every new tensor is made beside the old one, or from its replacement
-> Change.commit(journal)                   assignments only; the Parameter objects stay the same
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.kernels import compacted
from ecospa_fx.passes.graph.tensors import named_tensors, storage_key
from ecospa_fx.plan import Plan

from .journal import Journal
from .optimizer_state import OptimizerStates
from .optimizer_table import SliceLater


class Absorber(Protocol):
    """An object that lets weights that stay take over from those that a shrink removes, such as `ecospa_fx.Grams`."""

    def absorbed(self, before: Plan, after: Plan, weights: Sequence[Mapping[str, Tensor]], /) -> dict[int, Tensor]:
        """Return new values, by `id`, of the tensors in `weights` that take over, at their sizes before the shrink."""


@dataclass(eq=False)
class Change:
    """New tensors for a model and its optimizers, ready to be put in place.

    Attributes:
        tensors: (parameter or buffer, its new data, its new gradient).
        states: (an optimizer's state of one parameter, key, new value).
    """

    tensors: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    states: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)

    def commit(self, journal: Journal) -> None:
        """Put every new tensor in place."""
        for tensor, data, grad in self.tensors:
            journal.set_tensor(tensor, data, grad)
        for state, key, value in self.states:
            journal.set_item(state, key, value)


def prepare(model: nn.Module, before: Plan, after: Plan, optimizers: Iterable[Optimizer] = ()) -> Change:
    """Make the tensors of `model` and `optimizers` under the plan `after`, which keeps a subset of `before`.

    Raises:
        OptimizerError: an optimizer holds state of a shrinking parameter that cannot follow.
    """
    return prepare_tensors(named_tensors(model).items(), before, after, optimizers)


@torch.no_grad()
def prepare_tensors(
    named: Iterable[tuple[str, Tensor]],
    before: Plan,
    after: Plan,
    optimizers: Iterable[Optimizer] = (),
    replaced: Mapping[int, Tensor] = MappingProxyType({}),
) -> Change:
    """Make new tensors as `prepare` does, for tensors of one or several models by their names in the plan.

    Args:
        named: the tensors.
        before: the plan now.
        after: the plan to come.
        optimizers: the optimizers that hold them.
        replaced: `id` of a tensor, or of an entry of optimizer state -> values of the same shape to take its entries
            from; see `passes.transform.absorb`. Tensors that lose no entries are set to these values.

    Raises:
        OptimizerError: an optimizer holds state of a shrinking parameter that cannot follow.
    """
    optimizer_states = OptimizerStates(optimizers)
    # The source of each new tensor, and the positions that stay. Tensors that share storage go on sharing it.
    jobs: list[tuple[Tensor, dict[int, Tensor]]] = []
    numbers: dict[Any, int] = {}
    tensors: list[tuple[Tensor, int, int | None]] = []
    sliced_states: list[tuple[dict[str, Any], str, int]] = []
    states: list[tuple[dict[str, Any], str, Any]] = []
    full_size: list[tuple[Tensor, Tensor, Tensor | None]] = []
    seen: set[int] = set()

    def new(tensor: Tensor, keep: dict[int, Tensor]) -> int:
        jobs.append((replaced.get(id(tensor), tensor), keep))
        return len(jobs) - 1

    for name, tensor in named:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        keep = kept_positions(name, before, after) if name in after.original_shapes else {}
        if not keep:
            if id(tensor) in replaced:
                full_size.append((tensor, replaced[id(tensor)], tensor.grad))
                entries = optimizer_states.entries(tensor)
                states.extend((state, entry, replaced[id(v)]) for state, entry, v in entries if id(v) in replaced)
            continue
        key = (storage_key(tensor), tensor.shape)
        if key not in numbers:
            numbers[key] = new(tensor, keep)
        tensors.append((tensor, numbers[key], None if tensor.grad is None else new(tensor.grad, keep)))
        for state, entry, value in optimizer_states.shrunk(name, tensor, keep):
            if isinstance(value, SliceLater):
                sliced_states.append((state, entry, new(value.value, keep)))
            else:
                states.append((state, entry, value))
    results = compacted(jobs)
    return Change(
        [(tensor, results[data], None if grad is None else results[grad]) for tensor, data, grad in tensors]
        + full_size,
        [(state, entry, results[value]) for state, entry, value in sliced_states] + states,
    )


def kept_positions(name: str, before: Plan, after: Plan) -> dict[int, Tensor]:
    """Return, per dim that loses entries, the positions that stay, counted among those there are now."""
    keep = {}
    for dim in range(len(after.original_shapes[name])):
        if (name, dim) not in after.kept:
            continue
        mask = after.mask(name, dim)
        if name in before.original_shapes:
            mask = mask[before.mask(name, dim)]
        if not mask.all():
            keep[dim] = mask.nonzero().flatten()
    return keep
