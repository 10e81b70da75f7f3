"""Nested sizes: several models in one, each of them a part of the next larger one, trained together and saved once.

batches -> saliency of entries -> for each target the widths, and the strongest entries
        -> the model at the largest target; each smaller one is a shrink of it that is taken back
backward(loss)   gradients of all sizes in turn, added up in the largest (the sandwich rule)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.couple.constraints import Constraints
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import EcoSpaError, TargetError
from ecospa_fx.model.cost import Cost
from ecospa_fx.model.lookup import check_values, compiled_state, couplings
from ecospa_fx.model.shrinking import shrink
from ecospa_fx.model.slicing import kept_positions
from ecospa_fx.passes.graph.isolate import isolated
from ecospa_fx.passes.graph.tensors import parameters_of
from ecospa_fx.ranks.members import ranks_of
from ecospa_fx.ranks.wrappers import unwrapped

from .adaptive import AdaptiveSparsifier
from .latency import Latency
from .measuring import evaluating, listed_calls, smaller, unwatched, weakest_first
from .objective import Loss, Objective
from .settings import Among
from .targets import Target


@dataclass(frozen=True, eq=False)
class NestedSize:
    """One of the sizes of a model.

    Attributes:
        target: the target that it was made for.
        keeps: coupling name -> the entries that it keeps of the largest size, for those that are smaller.
        parameters: its parameters.
    """

    target: Target
    keeps: Mapping[str, Tensor]
    parameters: int


class NestedSizes:
    """A model at the largest of several sizes, which share its weights.

    >>> sizes = trainer.nested(batches, targets=[0.7, 0.5, 0.35])
    >>> for batch in loader:
    ...     sizes.backward(lambda model: model(**batch).loss)
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> ecospa_fx.save(model, "run", nested=sizes)
    >>> small = ecospa_fx.load("run", make_model, size=0.35)

    Attributes:
        model: the model, at the largest size.
        sizes: the sizes, the largest one first.
    """

    def __init__(self, model: nn.Module, sizes: Sequence[NestedSize]) -> None:
        self.model, self.sizes = model, tuple(sizes)
        self._widths = self._now()

    def __len__(self) -> int:
        return len(self.sizes)

    def __str__(self) -> str:
        return "\n".join(f"target {each.target}: {each.parameters:,} parameters" for each in self.sizes)

    def _now(self) -> dict[str, int]:
        return {c.name: c.size for c in couplings(self.model)}

    @contextmanager
    def at(self, number: int) -> Iterator[nn.Module]:
        """Make the model really as small as its size `number` for the time inside; 0 is the largest.

        Gradients are None at the beginning, and those made inside are gone afterwards.

        Raises:
            EcoSpaError: there is no such size, or the model has shrunk since.
        """
        if not isinstance(number, int) or not 0 <= number < len(self.sizes):
            raise EcoSpaError(f"there is no size {number!r}; sizes are 0 to {len(self.sizes) - 1}, 0 the largest")
        if self._now() != self._widths:
            raise EcoSpaError("the model has shrunk since its sizes were chosen, and they would be others now")
        held = [(p, p.grad) for p in self.model.parameters()]
        for p, _ in held:
            p.grad = None
        try:
            with smaller(self.model, self.sizes[number].keeps):
                try:
                    yield self.model
                finally:
                    for p, _ in held:
                        p.grad = None
        finally:
            for p, grad in held:
                p.grad = grad

    def backward(self, loss: Callable[[nn.Module], Tensor]) -> list[float]:
        """Add up the gradients of all sizes, each with the same weight.

        Args:
            loss: `loss(model)` -> a scalar; it is called once for each size, with the model at that size.

        Returns:
            The loss of each size.
        """
        values = []
        for number in range(len(self.sizes)):
            whole = compiled_state(self.model).plan
            with self.at(number), torch.enable_grad():
                value = loss(self.model)
                (value / len(self.sizes)).backward()
                plan = compiled_state(self.model).plan
                grads = [(name, p, p.grad) for name, p in parameters_of(self.model) if p.grad is not None]
                values.append(float(value.detach()))
            for name, p, grad in grads:
                _add(p, grad, kept_positions(name, whole, plan) if name in plan.original_shapes else {})
        return values


def _add(parameter: Tensor, grad: Tensor, keep: Mapping[int, Tensor]) -> None:
    """Add a gradient of a part of a parameter to that of the whole."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    index = tuple(
        keep.get(dim, torch.arange(size)).to(grad.device).view([-1 if d == dim else 1 for d in range(parameter.ndim)])
        for dim, size in enumerate(parameter.shape)
    )
    if index:
        parameter.grad.index_put_(index, grad, accumulate=True)
    else:
        parameter.grad += grad


def nested(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Sequence[Target],
    *,
    optimizers: Sequence[Optimizer] = (),
    also: Any = (),
    constraints: Constraints | None = None,
    cost: Cost | Latency = "parameters",
    among: Among = "all",
    loss: Loss | None = None,
) -> NestedSizes:
    """Shrink a compiled model to the largest of several targets, and find the others as parts of it.

    Raises:
        TargetError: there are no targets or batches, or one of them is out of reach.
    """
    module = unwrapped(model)
    if ranks_of(module):
        raise TargetError("several processes train this model: choose its sizes in one, before it is sharded")
    if isinstance(targets, (str, bytes)) or not isinstance(targets, Sequence) or not targets:
        raise TargetError("targets is empty; pass a share for each size, such as [0.7, 0.5, 0.35]")
    check_values(module, "measure")
    calls = listed_calls(batches)
    limits = constraints or Constraints()
    sparsifiers = [
        AdaptiveSparsifier(module, target=t, constraints=limits, cost=cost, among=among, optimizers=optimizers)
        for t in targets
    ]  # each is reachable, or none is taken
    left = {number: each.target_size(each.sizes()) for number, each in enumerate(sparsifiers)}
    order = sorted(left, key=lambda number: -left[number])
    with evaluating(module), isolated(module), unwatched(module):
        by_context = limits.head_dims == "per_head"
        orders, worths = weakest_first(
            module, enumerate(calls), loss or Objective(), couplings(module), by_context=by_context
        )
    widths = {c: c.size for c in couplings(module)}
    found: list[dict[Coupling, Tensor]] = []
    for number in order:
        each = sparsifiers[number]
        fewer = each.widths(worths, left[number])
        widths = {c: min(width, fewer.get(c, c.size)) for c, width in widths.items()}
        found.append({c: orders[c][..., c.size - width :].sort(-1).values for c, width in widths.items()})
    largest = {c: keep for c, keep in found[0].items() if keep.shape[-1] < c.size}
    sizes = [
        NestedSize(
            targets[number],
            {c.name: _within(found[0][c], keep) for c, keep in each.items() if keep.shape[-1] < found[0][c].shape[-1]},
            0,
        )
        for number, each in zip(order, found, strict=True)
    ]
    if largest:
        shrink(module, largest, optimizer=optimizers, also=also)
    result = NestedSizes(module, sizes)
    counted = []
    for number, size in enumerate(sizes):
        with result.at(number):
            counted.append(NestedSize(size.target, size.keeps, _parameters(module)))
    result.sizes = tuple(counted)
    return result


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _within(whole: Tensor, part: Tensor) -> Tensor:
    """Return the positions of sorted entries among other sorted entries that hold them, row by row."""
    return torch.searchsorted(whole.contiguous(), part.contiguous())
