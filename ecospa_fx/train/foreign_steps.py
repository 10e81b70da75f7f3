"""ForeignSteps: steps that optimizers take on a model's weights behind a trainer's back."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.errors import OptimizerError
from ecospa_fx.model.lookup import couplings
from ecospa_fx.model.optimizer_state import layers
from ecospa_fx.model.step_watch import unwatch_steps, watch_steps
from ecospa_fx.passes.graph.tensors import parameters_of


class ForeignSteps:
    """Watches for optimizers that step on weights of couplings and were not given to a trainer.

    Their state would keep its sizes when the weights shrink. So it is with an optimizer that a loop has made anew in
    the middle, and with a second one that was forgotten.

    Args:
        model: the model.
        optimizers: those that the trainer was given.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.model, self.optimizers = model, optimizers
        self._own: weakref.WeakSet[Any] = weakref.WeakSet()
        self._foreign: weakref.WeakSet[Any] = weakref.WeakSet()
        watch_steps(self)

    def before_step(self, optimizer: Any) -> None:
        """Take note that some optimizer, of this model or another, is about to take a step."""
        if optimizer not in self._own and optimizer not in self._foreign:
            mine = any(optimizer is layer for each in self.optimizers for layer in layers(each))
            (self._own if mine else self._foreign).add(optimizer)

    def check(self, *, stateless: bool) -> None:
        """Refuse to go on where such an optimizer holds state at the sizes of weights that may shrink.

        Args:
            stateless: refuse one without such state too, because nothing is known of the steps that it takes.

        Raises:
            OptimizerError: naming it.
        """
        if not self._foreign:
            return
        parameters = dict(parameters_of(self.model, remove_duplicate=False))
        names = dict.fromkeys(member.parameter for coupling in couplings(self.model) for member in coupling.members)
        for optimizer in list(self._foreign):
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name in names:
                parameter = parameters.get(name)
                if parameter is None or id(parameter) not in held:
                    continue
                leaves = pytree.tree_leaves(dict(optimizer.state.get(parameter, {})))
                if stateless or any(isinstance(leaf, Tensor) and leaf.numel() > 1 for leaf in leaves):
                    raise OptimizerError(
                        f"this {type(optimizer).__name__} takes steps on `{name}` and was not given to the trainer, so "
                        "that its state would keep its sizes when the model shrinks. Give the trainer all optimizers "
                        "of the model; where the loop has made a new one, make a new trainer with it, and "
                        "new.load_state_dict(old.state_dict()) to go on with the schedule"
                    )

    def detach(self) -> None:
        """Stop watching."""
        unwatch_steps(self)
