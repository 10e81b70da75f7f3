"""Reader: the interface of one kind of input that scores are made from; `readers.py` has one class per kind."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.passes.graph.tensors import as_real, dense

from .scores import Score
from .slices import SliceKey
from .sums import StepCount, Total

Key = TypeVar("Key")

NO_GRADIENT = (
    "no parameter of a coupling has a gradient: call trainer.step() after backward() and before zero_grad(). Where the "
    'step of an optimizer frees them, make the trainer with gradients="optimizer"; where optimizers step in hooks '
    'during backward, with gradients="backward"'
)
ZERO_GRADIENT = (
    "every gradient that was read since the last sparsification step is 0, as after zero_grad(set_to_none=False), so "
    "that no entry is worth less than another: call trainer.step() before zero_grad(), or make the trainer with "
    'gradients="optimizer"'
)
FREED_GRADIENT = (
    'gradients="backward" reads each gradient as soon as backward has it, but something has freed them before, such as '
    'a hook on a tensor that steps; read them at the steps of the optimizers, gradients="optimizer"'
)


@dataclass(frozen=True, eq=False)
class GradientStep:
    """Gradients to read: those of a training step, or of a part of one.

    Attributes:
        named: names and parameters whose gradients are read, those without one included; taken from it once.
        scale: what the gradients are still multiplied by, if so.
        found_inf: unless it is 0, the step is left out; read on the device.
        new_step: whether this is another training step, or a part of the last one that was not read yet.
    """

    named: Iterable[tuple[str, nn.Parameter]]
    scale: Tensor | None = None
    found_inf: Tensor | None = None
    new_step: bool = True

    @functools.cached_property
    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters that have a gradient, and their gradients, by name; the same ones for every reader of a step.

        Sparse ones with all entries, complex ones as pairs of real numbers, `[..., 2]`.
        """
        named = {name: p for name, p in self.named if p.grad is not None}
        gradients = {name: as_real(dense(p.grad)) for name, p in named.items() if p.grad is not None}
        return {name: as_real(p) for name, p in named.items()}, gradients


@dataclass(frozen=True, eq=False)
class ReaderOptions:
    """The arguments of a reader; each uses those that it needs.

    Attributes:
        model: a compiled model.
        score: the score that is computed from the input.
        rule: how steps are added up.
        count: training steps since the last reset; the estimator counts.
        optimizers: those that hold the parameters; None where none were given.
        seed: of random scores.
    """

    model: nn.Module
    score: Score
    rule: Total
    count: StepCount
    optimizers: Sequence[Optimizer] | None = None
    seed: int = 0


class Averaged(Generic[Key]):
    """Base of what judges by means over steps or calls, which are added up over ranks."""

    _kept: dict[Key, Tensor] | None = None

    def means(self) -> dict[Key, Tensor]:
        """Compute the means; where ranks train the model together, each of them must call it."""
        raise NotImplementedError

    def means_now(self) -> dict[Key, Tensor]:
        """Return the means, inside `at_once` those of its beginning."""
        return self.means() if self._kept is None else self._kept

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Judge several couplings by the same means, added up over ranks once."""
        before, self._kept = self._kept, self.means_now()
        try:
            yield
        finally:
            self._kept = before


class Reader(Protocol):
    """Reads one kind of input, sums it up, and judges couplings by it."""

    @property
    def sums(self) -> Mapping[SliceKey, Tensor]:
        """Sums over steps by (name, dim); empty for a reader without such sums."""

    @property
    def empty(self) -> bool:
        """True if it still lacks the input that a decision could be made from."""

    @property
    def learns(self) -> bool:
        """True if it says nothing of weights that are frozen."""

    def lacking(self) -> str | None:
        """Return the message for a decision that comes while there is nothing to make it from; None if there is."""

    @property
    def kinds(self) -> tuple[str, ...] | None:
        """The kinds of coupling that it can judge; None for all."""

    @property
    def unjudged(self) -> float:
        """The score of every entry of a coupling of which the input says nothing."""

    def observe(self) -> None:
        """Start to watch the model, where that is how it reads, as soon as the model's regions are known."""

    def add(self, step: GradientStep) -> None:
        """Take note of a training step, after its backward and before its gradients are zeroed."""

    def importance(self, coupling: Coupling) -> float | None:
        """Return the importance of a coupling; None if the input says nothing of it."""

    def entries(self, coupling: Coupling, *, by_context: bool) -> Tensor | None:
        """Score each entry, float64 `[size]` or `[contexts, size]`; None if the input says nothing of the coupling."""

    def at_once(self) -> AbstractContextManager[None]:
        """Judge several couplings from one reading, added up over ranks once."""

    def reset(self) -> None:
        """Drop the sums."""

    def detach(self) -> None:
        """Stop watching the model."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name."""

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Go on with what `tensors` returned."""
