"""Outside uses: parameters of a module that the model uses while the module is not running.

The graph of a block shows how the block uses its weights, not that the model around it averages one, or multiplies by
it. Such a block cannot shrink on its own, and nothing in its graph would say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from ecospa_fx.passes.graph.tensors import parameters_of


class OutsideUses(TorchFunctionMode):
    """A mode that watches the functions of torch that a forward calls.

    Attributes:
        reasons: submodule -> a sentence that names a parameter of it that is used while it does not run, and by which
            function.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}
        self._running: list[str] = []
        self._modules = {name: model.get_submodule(name) for name in names}
        self._owners: dict[int, list[tuple[str, str]]] = {}
        users: dict[int, list[str]] = {}
        for name, parameter in parameters_of(model, remove_duplicate=False):
            users.setdefault(id(parameter), []).append(name)
        for name, module in self._modules.items():
            for inner, parameter in parameters_of(module, remove_duplicate=False):
                if not all(user.startswith(f"{name}.") for user in users[id(parameter)]):
                    continue  # tied to one outside, and kept whole for that
                self._owners.setdefault(id(parameter), []).append((name, inner))

    def register_hooks(self) -> list[Any]:
        """Register hooks that tell when a submodule runs; return their handles."""
        return running_hooks(self._modules, self._running)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and record the parameters from which it computes tensors."""
        result = func(*args, **(kwargs or {}))
        used = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if id(leaf) in self._owners]
        # Reading a size or a dtype does not use the entries.
        if used and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            for leaf in used:
                for name, inner in self._owners[id(leaf)]:
                    if name not in self._running:
                        by = resolve_name(func) or getattr(func, "__name__", "a function")
                        self.reasons.setdefault(name, f"`{name}.{inner}` is used outside of it too, by {by}")
        return result


def running_hooks(modules: Mapping[str, nn.Module], running: list[str]) -> list[Any]:
    """Register hooks that keep the names of the modules that run in a list, innermost last; return their handles."""
    handles: list[Any] = []
    for name, module in modules.items():

        def enter(*_: Any, name: str = name) -> None:
            running.append(name)

        def leave(*_: Any) -> None:
            running.pop()

        handles += [
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        ]
    return handles
