"""LeftBehind: optimizers that a shrink was not told of, whose state still has the sizes from before."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from ecospa_fx.errors import OptimizerError

from .diff import TensorShape
from .optimizer_state import layers
from .step_watch import watch_steps


class LeftBehind:
    """Refuses the first step of an optimizer whose state did not shrink with its parameters.

    torch would raise an error about sizes from the middle of that step, which names neither.
    """

    def __init__(self) -> None:
        self._shapes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> its name and the shapes it had
        self._checked: weakref.WeakSet[Any] = weakref.WeakSet()

    def note(self, model: nn.Module, before: Mapping[str, TensorShape], told: Iterable[Optimizer] = ()) -> None:
        """Remember that parameters had the shapes `before` until now.

        Args:
            model: the model.
            before: name -> shape, of those that have changed.
            told: optimizers whose state has followed. What they hold at such a shape is of that shape for a reason, as
                a square preconditioner is.
        """
        for name, parameter in model.named_parameters():
            if name in before:
                self._shapes.setdefault(parameter, (name, set()))[1].add(before[name])
        self._checked.clear()
        self._checked.update(layer for each in told for layer in layers(each))

    def before_step(self, optimizer: Any) -> None:
        """Compare the state of an optimizer with what it is for, once after each shrink.

        Raises:
            OptimizerError: it holds a tensor of the shape that a parameter had before.
        """
        if optimizer in self._checked:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name, shapes = self._shapes.get(parameter, ("", ()))
                for entry, value in dict(optimizer.state.get(parameter, {})).items() if shapes else ():
                    leaves = (each for each in pytree.tree_leaves(value) if isinstance(each, Tensor))
                    shape = next((tuple(each.shape) for each in leaves if tuple(each.shape) in shapes), None)
                    if shape is not None and shape != tuple(parameter.shape):
                        raise OptimizerError(
                            f"this {type(optimizer).__name__} holds `{entry}` of `{name}` at the sizes {shape}, and "
                            f"a shrink made the parameter {tuple(parameter.shape)} without it. Nothing can be taken "
                            "out of that state now: give every shrink the optimizers of the model, "
                            "shrink(model, selection, optimizer=...), or make this optimizer anew here"
                        )
        self._checked.add(optimizer)


@functools.cache
def left_behind() -> LeftBehind:
    """Return the one that watches the steps of this process."""
    watcher = LeftBehind()
    watch_steps(watcher)
    return watcher
