"""Hooks on the submodules of a region, which its graph does not call.

A hook that only looks is not captured. If it is on an nn.Linear, the generated code calls the module and with it the
hook; elsewhere the module's arguments and result leave the graph beside the results of the region, and the hook is
called with them. A hook that changes values, or whose results the region uses, is captured as a part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.errors import EcoSpaError
from ecospa_fx.passes.graph.tensors import storage_key
from ecospa_fx.passes.ir.region_graph import Point
from ecospa_fx.passes.ir.state_access import TENSOR, resolve_object


def inner_hooks(module: nn.Module) -> dict[str, int]:
    """Count the forward hooks and pre-hooks on each submodule that has any."""
    if not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules()):
        return {}
    return {
        path: len(child._forward_hooks) + len(child._forward_pre_hooks)
        for path, child in module.named_modules()
        if path and (child._forward_hooks or child._forward_pre_hooks)
    }


def backward_hooked(module: nn.Module) -> list[str]:
    """List the submodules with backward hooks."""
    if not any(child._backward_hooks or child._backward_pre_hooks for child in module.modules()):
        return []
    return [
        path
        for path, child in module.named_modules()
        if path and (child._backward_hooks or child._backward_pre_hooks)
    ]  # fmt: skip


def calls_itself(module: nn.Module) -> bool:
    """Return whether generated code calls a module, hooks and all, instead of inlining its ops."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


@contextmanager
def points(module: nn.Module, paths: Iterable[str]) -> Iterator[list[tuple[str, Any]]]:
    """Record calls of submodules, as (path, (arguments, keyword arguments, result)), without their own hooks."""
    seen: list[tuple[str, Any]] = []

    def recording(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            seen.append((path, (args, kwargs, result)))

        return hook

    paths = list(paths)
    with other_hooks(module, paths, _nothing):
        handles = [
            module.get_submodule(path).register_forward_hook(recording(path), with_kwargs=True)
            for path in paths
            if not calls_itself(module.get_submodule(path))
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class Changes:
    """The traces that hooks left in what they were called with.

    Attributes:
        returned: submodules where a hook returned something: it changes values.
        replaced: submodules, and the tensors in their attributes that a hook there put others in place of.
    """

    returned: set[str] = field(default_factory=set)
    replaced: list[tuple[str, Tensor]] = field(default_factory=list)

    def reach(self, constants: Iterable[Any]) -> set[str]:
        """Return the submodules whose hooks change what a graph computes, which has `constants`."""
        held = {storage_key(value) for value in constants if isinstance(value, Tensor)}
        return self.returned | {path for path, tensor in self.replaced if storage_key(tensor) in held}


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Run submodules without their hooks."""
    with other_hooks(module, inner_hooks(module), _nothing):
        yield


@contextmanager
def noted(module: nn.Module, paths: Iterable[str]) -> Iterator[Changes]:
    """Run hooks as usual, and note what they change: what goes through the module, or tensors that it reads."""
    changes = Changes()

    def noting(path: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(child: nn.Module, *args: Any) -> Any:
            before = {name: value for name, value in vars(child).items() if isinstance(value, Tensor)}
            result = hook(child, *args)
            if result is not None:
                changes.returned.add(path)
            replaced = (value for name, value in before.items() if vars(child).get(name) is not value)
            changes.replaced.extend((path, value) for value in replaced)
            return result

        return call

    with other_hooks(module, paths, noting):
        yield changes


@contextmanager
def other_hooks(module: nn.Module, paths: Iterable[str], other: Callable[..., Any]) -> Iterator[None]:
    """Replace the hooks on submodules by `other(path, hook)`; those that are registered or removed inside stay so."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    saved = [(path, held, dict(held)) for path in paths for kind in kinds
             if (held := module.get_submodule(path).__dict__[kind])]  # fmt: skip
    try:
        for path, held, hooks in saved:
            held.update({key: other(path, hook) for key, hook in hooks.items()})
        yield
    finally:
        for _, held, hooks in saved:
            held.update({key: hook for key, hook in hooks.items() if key in held})


def _nothing(path: str, hook: Callable[..., Any]) -> Callable[..., None]:
    return lambda *_, **__: None


def fire(
    module: nn.Module, at: Sequence[Point], tensors: Sequence[Tensor], region: str, objects: Sequence[Any] = ()
) -> None:
    """Call the hooks that submodules have now with the tensors of the points of a graph.

    Raises:
        EcoSpaError: a hook returned something, which would have to go back into the graph.
    """
    remaining = iter(tensors)
    for point in at:
        leaves = [next(remaining) if leaf is TENSOR else resolve_object(leaf, objects) for leaf in point.leaves]
        args, kwargs, result = pytree.tree_unflatten(leaves, point.spec)
        child = module.get_submodule(point.path)
        returned = [
            hook(child, args, kwargs) if key in child._forward_pre_hooks_with_kwargs else hook(child, args)
            for key, hook in list(child._forward_pre_hooks.items())
        ] + [
            hook(child, args, kwargs, result) if key in child._forward_hooks_with_kwargs else hook(child, args, result)
            for key, hook in list(child._forward_hooks.items())
        ]
        if any(value is not None for value in returned):
            where = f"{region}.{point.path}" if region else point.path
            raise EcoSpaError(
                f"a forward hook on `{where}` changes what goes through it, but `{region or 'the model'}` has shrunk "
                "and runs as one graph, whose values a hook can only look at. Register it before the first call, or "
                "put it on an nn.Linear"
            )
