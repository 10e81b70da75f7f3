"""Slicing: remove from parameters, gradients and optimizer state the entries that a plan drops, all or nothing.

prepare(model, before, after, optimizers)   the entries that go are copied, tensors with other values are made
-> Change.commit(journal)                   one tensor after another; the Parameter objects stay the same

Sharded tensors are only looked at in the first step: their entries move between ranks in the second, which all ranks
take together once each of them is ready.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.errors import RanksError, ShrinkError
from ecospa_fx.kernels import compacted
from ecospa_fx.passes.graph.tensors import is_quantized, named_tensors, storage_key
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.fsdp2 import anew
from ecospa_fx.ranks.shards import Move, is_sharded, move, moved

from .cuts import Cuts
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
        cuts: the tensors that lose entries and have no other values.
        tensors: (parameter or buffer, its new data, its new gradient).
        states: (an optimizer's state of one parameter, key, new value).
        owners: `id` of a parameter -> what FSDP2 keeps of it, see `ecospa_fx.ranks.fsdp2`.
        sharded: the sharded tensors, whose entries still have to move.
    """

    tensors: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    states: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    cuts: Cuts = field(default_factory=Cuts)
    owners: Mapping[int, Any] = field(default_factory=dict)
    sharded: ShardedChange | None = None

    def commit(self, journal: Journal) -> None:
        """Put every new tensor in place; where tensors are sharded all ranks must be here."""
        if self.sharded is not None:
            self.sharded.finish(self)
        for tensor, data, grad in self.tensors:
            owner = self.owners.get(id(tensor))
            if owner is not None:
                data, attributes = anew(owner, data)
                journal.set_attributes(owner, attributes)
            journal.set_tensor(tensor, data, grad)
        for state, key, value in self.states:
            journal.set_item(state, key, value)
        self.cuts.commit(journal)


@dataclass(eq=False)
class ShardedChange:
    """The sharded tensors of a change. Their entries move between ranks at the commit.

    Attributes:
        moves: the tensors that lose entries, and those that get other values.
        tensors: (parameter, position in `moves` of its data, of its gradient).
        states: (an optimizer's state of one parameter, key, position in `moves`).
    """

    moves: list[Move] = field(default_factory=list)
    tensors: list[tuple[Tensor, int, int | None]] = field(default_factory=list)
    states: list[tuple[dict[str, Any], str, int]] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor, keep: dict[int, Tensor]) -> int:
        """Look at a tensor, and return its position in `moves`."""
        self.moves.append(move(name, tensor, keep))
        return len(self.moves) - 1

    def finish(self, change: Change) -> None:
        """Move the entries, and add the new tensors to a change."""
        results = moved(self.moves)
        for tensor, number, grad in self.tensors:
            change.tensors.append((tensor, results[number], None if grad is None else results[grad]))
        change.states.extend((state, key, results[number]) for state, key, number in self.states)


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
    owners: Mapping[int, Any] = MappingProxyType({}),
) -> Change:
    """Prepare a change as `prepare` does, for tensors of one or several models by their names in the plan.

    Args:
        named: the tensors.
        before: the plan now.
        after: the plan to come.
        optimizers: the optimizers that hold them.
        replaced: `id` of a tensor, or of an entry of optimizer state -> values of the same shape to take its entries
            from; see `passes.transform.absorb`. Tensors that lose no entries are set to these values.
        owners: `id` of a parameter -> what FSDP2 keeps of it, see `ecospa_fx.ranks.fsdp2`.

    Raises:
        OptimizerError: an optimizer holds state of a shrinking parameter that cannot follow.
        ShrinkError: a tensor is quantized.
        RanksError: a sharded tensor is placed in a way in which it cannot lose entries.
    """
    optimizer_states = OptimizerStates(optimizers)
    cuts = Cuts()
    # Of tensors that get other values: the source of each new one, and the positions that stay.
    jobs: list[tuple[Tensor, dict[int, Tensor]]] = []
    numbers: dict[Any, int] = {}
    tensors: list[tuple[Tensor, int, int | None]] = []
    sliced_states: list[tuple[dict[str, Any], str, int]] = []
    states: list[tuple[dict[str, Any], str, Any]] = []
    full_size: list[tuple[Tensor, Tensor, Tensor | None]] = []
    sharded = ShardedChange()
    seen: set[int] = set()

    def new(tensor: Tensor, keep: dict[int, Tensor]) -> int:
        jobs.append((replaced.get(id(tensor), tensor), keep))
        return len(jobs) - 1

    for name, tensor in named:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        keep = kept_positions(name, before, after) if name in after.original_shapes else {}
        if keep and is_quantized(tensor):
            raise ShrinkError(
                f"`{name}` is quantized ({type(tensor).__name__}), and cannot lose entries: shrink first, then quantize"
            )
        if keep and is_sharded(tensor) and not all(len(at) for at in keep.values()):
            raise RanksError(
                f"`{name}` would have no entry left, and ranks share it out; gather it before, or keep one entry "
                "(min_keep=1)"
            )
        if is_sharded(tensor) and (keep or id(tensor) in replaced):
            value = replaced.get(id(tensor), tensor)
            grad = None if tensor.grad is None else sharded.add(name, tensor.grad, keep)
            sharded.tensors.append((tensor, sharded.add(name, value, keep), grad))
            if not keep:
                given = [each for each in optimizer_states.entries(tensor) if id(each[2]) in replaced]
                sharded.states += [(state, entry, sharded.add(name, replaced[id(v)], {})) for state, entry, v in given]
        elif not keep:
            if id(tensor) in replaced:
                full_size.append((tensor, replaced[id(tensor)], tensor.grad))
                entries = optimizer_states.entries(tensor)
                states.extend((state, entry, replaced[id(v)]) for state, entry, v in entries if id(v) in replaced)
        else:
            key = (storage_key(tensor), tensor.shape)  # tensors that share storage go on sharing it
            if id(tensor) in replaced and key not in numbers:
                numbers[key] = new(tensor, keep)
            if key in numbers:
                tensors.append((tensor, numbers[key], None if tensor.grad is None else new(tensor.grad, keep)))
            else:
                cuts.add(tensor, key, keep)
        for state, entry, value in optimizer_states.shrunk(name, tensor, keep) if keep else ():
            if isinstance(value, SliceLater) and is_sharded(value.value):
                source = replaced.get(id(value.value), value.value)
                sharded.states.append((state, entry, sharded.add(f"{entry} of {name}", source, keep)))
            elif isinstance(value, SliceLater) and id(value.value) not in replaced:
                cuts.add_entry(state, entry, keep)
            elif isinstance(value, SliceLater):
                sliced_states.append((state, entry, new(value.value, keep)))
            else:
                states.append((state, entry, value))
    results = compacted(jobs)
    cuts.prepare()
    return Change(
        [(tensor, results[data], None if grad is None else results[grad]) for tensor, data, grad in tensors]
        + full_size,
        [(state, entry, results[value]) for state, entry, value in sliced_states] + states,
        cuts,
        owners,
        sharded if sharded.moves else None,
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
