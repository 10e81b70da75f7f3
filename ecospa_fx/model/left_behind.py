"""LeftBehind: state of optimizers at the sizes from before a shrink: it was not told of them, or given old state."""

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
from ecospa_fx.passes.graph.tensors import parameters_of

from .diff import TensorShape
from .optimizer_state import layers
from .step_watch import watch_steps


class LeftBehind:
    """Refuses the first step of an optimizer whose state did not shrink with its parameters, and state of before.

    torch would raise an error about sizes from the middle of the next step, which names neither.
    """

    def __init__(self) -> None:
        self._shapes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> its name and the shapes it had
        self._checked: weakref.WeakSet[Any] = weakref.WeakSet()
        self._told: weakref.WeakSet[Any] = weakref.WeakSet()

    def note(self, model: nn.Module, before: Mapping[str, TensorShape], told: Iterable[Optimizer] = ()) -> None:
        """Remember that parameters had the shapes `before` until now.

        Args:
            model: the model.
            before: name -> shape, of those that have changed.
            told: optimizers whose state has followed. What they hold at such a shape is of that shape for a reason, as
                a square preconditioner is.
        """
        for name, parameter in parameters_of(model):
            if name in before:
                self._shapes.setdefault(parameter, (name, set()))[1].add(before[name])
        self._checked.clear()
        for layer in (layer for each in told for layer in layers(each)):
            self._checked.add(layer)
            if layer not in self._told and hasattr(layer, "_optimizer_load_state_dict_pre_hooks"):
                self._told.add(layer)
                layer.register_load_state_dict_pre_hook(self.before_load)

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

    def before_load(self, optimizer: Any, state_dict: Mapping[str, Any]) -> None:
        """Compare the state that an optimizer is given with what it is for.

        Raises:
            OptimizerError: it has the sizes that a parameter had before.
        """
        held = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for parameter, number in zip(held, numbers, strict=False):  # torch refuses other groups
            name, shapes = self._shapes.get(parameter, ("", ()))
            entries = dict(state_dict["state"].get(number, {})) if shapes else {}
            given = {entry: tuple(value.shape) for entry, value in entries.items() if isinstance(value, Tensor)}
            old = next((entry for entry, shape in given.items() if shape in shapes), None)
            # One that has the sizes of the parameter may hold more, such as preconditioners, at any others.
            if old is not None and tuple(parameter.shape) not in given.values():
                raise OptimizerError(
                    f"this state of {type(optimizer).__name__} is of before a shrink: `{old}` of `{name}` is "
                    f"{given[old]} in it, and `{name}` is {tuple(parameter.shape)} now. Keep states of a training run "
                    "with ecospa_fx.save(model, directory, optimizer=optimizer), and go back to one with "
                    "ecospa_fx.resume(directory, model, optimizer=optimizer)"
                )


@functools.cache
def left_behind() -> LeftBehind:
    """Return the one that watches the steps of this process."""
    watcher = LeftBehind()
    watch_steps(watcher)
    return watcher
