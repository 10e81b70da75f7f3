"""Effects of hooks: what forward hooks do beside changing values, which a graph that holds them would not do."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.errors import CaptureError
from ecospa_fx.passes.graph.isolate import Draws, isolated
from ecospa_fx.passes.graph.namespaces import code_of
from ecospa_fx.passes.graph.python_state import PythonState, StateChange
from ecospa_fx.passes.graph.stores import watched_stores
from ecospa_fx.passes.ir.region_graph import Forward, described
from ecospa_fx.passes.ir.state_access import copied_call

from .hooks import other_hooks
from .reads import recorded_reads


def refuse_effects(
    module: nn.Module,
    paths: Sequence[str],
    region: str,
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Refuse hooks that a graph would hold, and that change more than what goes through their modules.

    Args:
        module: the region.
        paths: its submodules with such hooks.
        region: its name, for messages.
        forward: its own forward.
        args: positional arguments of a call.
        kwargs: keyword arguments of it.

    Raises:
        CaptureError: a hook changes state, or draws from Python's or numpy's generators.
    """
    effects: dict[str, str] = {}
    parameters = {id(parameter) for parameter in module.parameters()}
    code = code_of(module)

    def watching(path: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(child: nn.Module, *args: Any) -> Any:
            state, draws = PythonState(module, code), Draws()
            with recorded_reads(module, code) as reads, watched_stores(state) as stores:
                result = hook(child, *args)
            changes = (*state.changes(), *stores.anew(reads.writes))
            changed = next((change.where for change in changes if not _is_weight(change, parameters)), None)
            drawn = draws.moved(among=("Python", "numpy"))
            if changed is not None or drawn is not None:
                effects[path] = f"changes `{changed}`" if drawn is None else f"draws from the generator of {drawn}"
            return result

        return call

    with isolated(module), torch.enable_grad(), other_hooks(module, paths, watching):
        call_args, call_kwargs = pytree.tree_map_only(Tensor, _traced, copied_call(args, kwargs))
        forward(module, *call_args, **call_kwargs)
    for path, effect in effects.items():
        raise CaptureError(
            f"a forward hook on `{path}` in {described(region)} {effect}, which the graph would not do: hooks there "
            "are a part of it, because one of them changes what goes through the module. Put what else it does into a "
            "hook of another module"
        )


def _traced(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd knows from those that are made of parameters alone."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.detach().requires_grad_().view_as(tensor)


def _is_weight(change: StateChange, parameters: Set[int]) -> bool:
    """Return whether a hook has made a weight of parameters, in an attribute of a module, for the module to use."""
    value = change.after
    if not isinstance(change.owner, nn.Module) or type(change.key) is not str or type(value) is not Tensor:
        return False
    waiting, seen, leaves = [value.grad_fn], set(), set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
            leaves |= {id(node.variable)} if hasattr(node, "variable") else set()
    return bool(leaves) and leaves <= parameters
