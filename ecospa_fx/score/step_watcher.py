"""StepWatcher: the steps that optimizers took, for a reader of gradients that comes after them.

A `torch.amp.GradScaler` multiplies gradients. They are divided again before a step, or in it if the optimizer is fused.
If gradients have overflowed the step is not taken, and they are still there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.errors import OptimizerError
from ecospa_fx.model.optimizer_state import layers
from ecospa_fx.model.optimizer_table import rules_for
from ecospa_fx.passes.graph.tensors import parameters_of


class Reading(NamedTuple):
    """The gradients to read of one optimizer.

    Attributes:
        names: their parameters; None: all.
        found_inf: unless it is 0 they are left out.
    """

    names: set[str] | None
    found_inf: Tensor | None


class StepWatcher:
    """Watches the steps of a model's optimizers.

    Args:
        model: the model whose gradients they take.
        optimizers: one or several.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.model, self.optimizers = model, list(optimizers)
        self._taken = [False] * len(self.optimizers)
        self._found_inf: list[Tensor | None] = [None] * len(self.optimizers)
        self._handles: list[Any] = []
        for number, optimizer in enumerate(self.optimizers):
            # A wrapper's own hooks may never be called; those of the optimizers it wraps are.
            for each in layers(optimizer):
                if hasattr(each, "_optimizer_step_pre_hooks"):
                    hook = lambda held, *_, number=number: self._note(number, held)  # noqa: E731
                    self._handles.append(each.register_step_pre_hook(hook))

    def _note(self, number: int, optimizer: Any) -> None:
        """Take note that an optimizer is about to take a step."""
        if getattr(optimizer, "grad_scale", None) is not None and not rules_for(type(optimizer)).unscales:
            raise OptimizerError(
                f"this {type(optimizer).__name__} takes gradients multiplied by a GradScaler's scale, and whether it "
                'leaves them so is not known: read them before its steps, EcoSpaTrainer(..., gradients="optimizer")'
            )
        self._taken[number] = True
        found_inf = getattr(optimizer, "found_inf", None)
        self._found_inf[number] = found_inf if found_inf is not None else self._found_inf[number]

    def readings(self) -> Iterator[Reading]:
        """Return which of the gradients to read, once per optimizer; none of an optimizer that left its step out.

        An optimizer that has taken no step since the last call, while gradients have overflowed, has left it out.
        """
        for number in range(len(self.optimizers)):
            names = names_of(self.model, self.optimizers, number)
            taken, found_inf = self._taken[number], self._found_inf[number]
            self._taken[number], self._found_inf[number] = False, None
            if taken or not self._handles or _finite(self._gradients(names)):
                yield Reading(names, found_inf)

    def _gradients(self, names: set[str] | None) -> list[Tensor]:
        return [
            p.grad for name, p in parameters_of(self.model) if p.grad is not None and (names is None or name in names)
        ]

    def detach(self) -> None:
        """Stop watching."""
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()


def names_of(model: nn.Module, optimizers: Sequence[Optimizer], number: int) -> set[str] | None:
    """Return the parameters whose gradients are read at the steps of one of several optimizers.

    Returns:
        Names of its own parameters, and for the first optimizer also of those that none of them holds. None: all.
    """
    if len(optimizers) == 1:
        return None
    parameters = [{id(p) for group in each.param_groups for p in group["params"]} for each in optimizers]
    named = list(parameters_of(model))
    if number > 0:
        return {name for name, p in named if id(p) in parameters[number]}
    others = set().union(*parameters[1:])
    return {name for name, p in named if id(p) not in others}


def _finite(gradients: Sequence[Any]) -> bool:
    """Return whether no gradient has an inf or a NaN."""
    values = [g.detach().to_local() if hasattr(g, "to_local") else g.detach() for g in gradients]
    flags = [(g.coalesce().values() if g.is_sparse else g).isfinite().all() for g in values]
    return bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all()) if flags else True
