"""Words for weights of other sizes: a state_dict of before a shrink, given to the model as it is after it.

torch lists the sizes that differ, and cannot know that a shrink lies between, nor which way leads back. A hook of
`load_state_dict` on every compiled model adds that to its error; `restore` takes it off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ecospa_fx.passes.graph.tensors import named_tensors

from .compiled import MODEL


def say_of_sizes(model: nn.Module) -> None:
    """Let a compiled model say that it has shrunk when it is given weights of other sizes."""
    if not any(_hook(held) is _say for held in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(_say)


def say_no_more(model: nn.Module) -> None:
    """Take that off."""
    hooks = model._load_state_dict_pre_hooks
    for key in [key for key, held in hooks.items() if _hook(held) is _say]:
        del hooks[key]


def look_first(model: nn.Module, hook: Callable[..., None]) -> Any:
    """Register a hook of `load_state_dict` that is called before all others, for it may let the model take the sizes.

    Returns:
        A handle to remove it.
    """
    handle = model.register_load_state_dict_pre_hook(hook)
    hooks: Any = model._load_state_dict_pre_hooks
    hooks.move_to_end(handle.id, last=False)
    return handle


def of_other_sizes(model: nn.Module, given: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a state_dict whose sizes are not those of the model, by their names in the model."""
    named = {name: (tensor, given.get(prefix + name)) for name, tensor in named_tensors(model).items()}
    return {
        name: other for name, (own, other) in named.items() if isinstance(other, Tensor) and other.shape != own.shape
    }


def _hook(held: Any) -> Any:
    return getattr(held, "hook", held)  # torch wraps those that take the module


def _say(model: nn.Module, given: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Add to the errors of torch, the last argument, where weights of the state_dict have other sizes."""
    if MODEL not in model.__dict__ or not model.__dict__[MODEL].plan.original_shapes:
        return
    odd = of_other_sizes(model, given, prefix)
    if odd and not rest[-1]:  # a callback may have said what it knows
        name = next(iter(odd))
        theirs, ours = tuple(odd[name].shape), tuple(named_tensors(model)[name].shape)
        rest[-1].append(
            f"{len(odd)} weights have other sizes than this model, which has shrunk: `{name}` is {theirs} there and "
            f"{ours} here. A state_dict does not say which rows and columns are left. Keep states of a training run "
            "with ecospa_fx.save(model, directory, ...), go back to one with ecospa_fx.resume(directory, model, ...), "
            "or make a model from it with ecospa_fx.load(directory)"
        )
