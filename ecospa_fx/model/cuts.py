"""Cuts: tensors lose entries one after another, in little more room than the entries that go.

Cuts.add                   a place that holds a tensor, and the positions that stay
-> Cuts.prepare            the entries that go are copied out; there is room for the rest
-> Cuts.commit(journal)    tensor by tensor: the entries that stay move forward
                           <- undo: the tensor as it was
-> once all is done        the memory that is left over is given back
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ecospa_fx.kernels import compacted

from .journal import Journal, assign
from .memory import Keep, Memory, Scratch, can_be_remade, pieces, rows_at_once
from .room import check_room, give_back


@dataclass(eq=False)
class _Data:
    """The data of tensors that share memory."""

    tensors: list[Tensor]

    def held(self) -> Tensor:
        return self.tensors[0].detach()

    def empty(self) -> int:
        """Return how many tensors hold the memory: parameters must have data all the time."""
        return len(self.tensors)

    def put(self, data: Tensor) -> None:
        for tensor in self.tensors:
            assign(tensor, data, None)


@dataclass(eq=False)
class _Gradient:
    tensors: list[Tensor]

    def held(self) -> Tensor:
        (tensor,) = self.tensors
        assert tensor.grad is not None
        return tensor.grad

    def empty(self) -> int:
        self.tensors[0].grad = None
        return 0

    def put(self, grad: Tensor) -> None:
        self.tensors[0].grad = grad


@dataclass(eq=False)
class _Entry:
    """An entry of an optimizer's state of one parameter."""

    state: dict[str, Any]
    key: str
    tensors: tuple[Tensor, ...] = ()

    def held(self) -> Tensor:
        tensor: Tensor = self.state[self.key]
        return tensor

    def empty(self) -> int:
        self.state[self.key] = None
        return 0

    def put(self, value: Tensor) -> None:
        self.state[self.key] = value


@dataclass(eq=False)
class _Cut:
    """One tensor that loses entries.

    Attributes:
        place: the place that holds it.
        keep: dim -> positions that stay.
        gone: copies of the entries that go.
    """

    place: _Data | _Gradient | _Entry
    keep: Keep
    gone: list[Tensor] = field(default_factory=list)

    def make(self, journal: Journal, scratches: Mapping[torch.device, Scratch]) -> Tensor:
        """Make the tensor without the entries that go, which is still to be put into its place."""
        memory = Memory(self.place.held(), self.keep, self.gone)
        device = self.place.held().device  # held by no name here: whoever else holds the tensor keeps its memory
        journal.note(partial(_put_back, self.place, memory), *self.place.tensors)
        journal.note_later(memory.settle)
        return memory.cut(self.place.empty(), scratches[device])


def _put_back(place: _Data | _Gradient | _Entry, memory: Memory) -> None:
    place.put(memory.whole())


class Cuts:
    """The tensors of a model and its optimizers that lose entries in one change."""

    def __init__(self) -> None:
        self._data: dict[Any, _Cut] = {}
        self._gradients: dict[Any, list[_Cut]] = defaultdict(list)
        self._entries: list[_Cut] = []
        self._scratches: dict[torch.device, Scratch] = {}
        self._freed = 0

    def add(self, tensor: Tensor, memory: Any, keep: Keep) -> None:
        """Add the data and the gradient of a tensor. Tensors that give the same `memory` go on sharing it."""
        if memory in self._data:
            place = self._data[memory].place
            assert isinstance(place, _Data)
            place.tensors.append(tensor)
        else:
            self._data[memory] = _Cut(_Data([tensor]), keep)
        if tensor.grad is not None:
            self._gradients[memory].append(_Cut(_Gradient([tensor]), keep))

    def add_entry(self, state: dict[str, Any], key: str, keep: Keep) -> None:
        """Add an entry of an optimizer's state, of its parameter's shape."""
        self._entries.append(_Cut(_Entry(state, key), keep))

    def prepare(self) -> None:
        """Copy out what goes, and see that there is room for the rest.

        Raises:
            ShrinkError: there is none.
        """
        copies: dict[torch.device, int] = defaultdict(int)
        rows: dict[torch.device, int] = defaultdict(int)
        jobs: list[tuple[_Cut, tuple[Tensor, Keep]]] = []
        for cut in self._all():
            tensor = cut.place.held()
            left = math.prod(len(cut.keep[d]) if d in cut.keep else n for d, n in enumerate(tensor.shape))
            copies[tensor.device] += (tensor.numel() - left) * tensor.element_size()
            rows[tensor.device] = max(rows[tensor.device], rows_at_once(tensor)[1])
            jobs += [(cut, job) for job in pieces(tensor, cut.keep)] if can_be_remade(tensor) else []
        for device in copies:
            check_room(device, copies[device] + 2 * rows[device])
        self._scratches = {device: Scratch(size, device) for device, size in rows.items()}
        for (cut, _), piece in zip(jobs, compacted([job for _, job in jobs]), strict=True):
            cut.gone.append(piece)
        self._freed = sum(copies.values())

    def commit(self, journal: Journal) -> None:
        """Put every tensor in place without the entries that go."""
        scratches = self._scratches
        for memory, cut in self._data.items():
            # A gradient must have its parameter's shape at every moment, so it waits.
            grads = [(grad.place, grad.make(journal, scratches)) for grad in self._gradients[memory]]
            cut.place.put(cut.make(journal, scratches))
            for place, grad in grads:
                place.put(grad)
        for cut in self._entries:
            cut.place.put(cut.make(journal, scratches))
        journal.note_later(partial(give_back, self._freed))

    def _all(self) -> Iterator[_Cut]:
        yield from self._data.values()
        for cuts in self._gradients.values():
            yield from cuts
        yield from self._entries
