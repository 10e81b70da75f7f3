"""Wrappers: modules that call a model. Some spread it over devices, with sizes that a shrink changes under them.

Buckets, flat parameters and shards are made once, for the sizes of that moment. `ddp.py` makes those of
`DistributedDataParallel` again; the others are refused, because gradients of some parameters would no longer be
reduced, and the ranks drift apart, often without an error.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from ecospa_fx.collectives import is_distributed
from ecospa_fx.errors import WrapperError
from ecospa_fx.passes.graph.tensors import parameters_of

from .ddp import note_trained, refusal
from .placed import shards_of
from .shards import is_sharded

HOLDS = {
    "FullyShardedDataParallel": "flat parameters",
    "DataParallel": "replicas",
    "DeepSpeedEngine": "flat parameters",
}
"""The class of a wrapper, by name because its library need not be installed -> what it keeps at sizes of its own."""

INSIDE = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
"""The class of a wrapper of torch that computes the same as the module in it -> the attribute that holds that."""

FOLLOWS = "DistributedDataParallel"

Function = TypeVar("Function", bound=Callable[..., Any])

WAY_OUT = (
    "Use DistributedDataParallel or fully_shard, or train in one process on one device; or shrink the plain model "
    "first, and wrap it afterwards"
)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile(model)`, `DistributedDataParallel(model)` and `DataParallel(model)`.

    The wrapper computes the same, and its parameters are those of the model under longer names.
    """
    while (attribute := _torch_class(model, INSIDE)) is not None:
        model = getattr(model, INSIDE[attribute])
    return model


def looks_inside(function: Function) -> Function:
    """Let a function of a model take `torch.compile(model)` and the like for the model, see `unwrapped`."""

    @functools.wraps(function)
    def inner(model: Any, *args: Any, **kwargs: Any) -> Any:
        return function(unwrapped(model), *args, **kwargs)

    return cast(Function, inner)


def check_wrappers(model: nn.Module) -> None:
    """Refuse a model that is spread over devices in a way that a shrink cannot bring along.

    Args:
        model: the model that is to shrink, or a wrapper of it.

    Raises:
        WrapperError: the model or a part of it is wrapped so, or parameters are sharded.
    """
    inside = unwrapped(model)
    name = type(inside).__name__
    for where, module in inside.named_modules():
        wrapper = _wrapper(module)
        if wrapper == FOLLOWS:
            raise WrapperError(
                f"`{where}` of {name} is wrapped in {wrapper}, and the model around it is to shrink: wrap the whole "
                "model, DistributedDataParallel(model), and not a part of it"
            )
        if wrapper is not None:
            held = getattr(module, "module", None)
            where, kind = ("", type(held).__name__) if isinstance(held, nn.Module) else (where, name)
            raise WrapperError(_wrapped(f"`{where}` of {kind}" if where else kind, wrapper))
    for around in (*_between(model), *wrappers_around(inside)):
        wrapper = _wrapper(around)
        if wrapper is not None and wrapper != FOLLOWS:
            raise WrapperError(_wrapped(name, wrapper))
        reason = refusal(around) if isinstance(around, DistributedDataParallel) else None
        if reason is not None:
            raise WrapperError(f"{name} is wrapped in DistributedDataParallel {reason}")
    outer = next((type(each).__name__ for each in wrappers_around(inside)), None)
    parameters: Iterable[tuple[str, Any]] = parameters_of(inside)
    for parameter_name, parameter in parameters:
        if not is_sharded(parameter):
            continue
        if shards_of(parameter) is None:
            raise WrapperError(
                f"`{parameter_name}` of {name} is placed {tuple(parameter.placements)} on its device mesh, which tells "
                "no rank which entries it has; shard it, or redistribute it"
            )
        if outer is not None:
            raise WrapperError(
                f"`{parameter_name}` of {name} is sharded (a DTensor), and {name} is wrapped in {outer}, which takes "
                "whole parameters: use fully_shard on the mesh of the data in its place"
            )


def _wrapped(where: str, wrapper: str) -> str:
    return (
        f"{where} is wrapped in {wrapper}, whose {HOLDS[wrapper]} would keep their sizes when the model shrinks: "
        f"gradients would no longer be reduced, and the ranks drift apart. {WAY_OUT}"
    )


def _between(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the wrappers that `unwrapped` looks through."""
    while (attribute := _torch_class(model, INSIDE)) is not None:
        yield model
        model = getattr(model, INSIDE[attribute])


def wrappers_around(model: nn.Module) -> list[nn.Module]:
    """Return the wrappers on several devices that hold a model. No reference leads there, so they have been noted."""
    found = [each for each in _active() if any(module is model for module in each.modules())]
    if len(found) > 1 or any(_wrapper(each) != FOLLOWS for each in found):
        del found
        gc.collect()  # of wrappers that nobody holds any more
        found = [each for each in _active() if any(module is model for module in each.modules())]
    return found


def _active() -> list[nn.Module]:
    """Return the wrappers noted that are on several devices, but for those whose process group has ended."""
    return [each for each in _NOTED if _wrapper(each) is not None and _has_group(each)]


def _has_group(wrapper: nn.Module) -> bool:
    if not isinstance(wrapper, DistributedDataParallel):
        return True
    try:
        distributed.get_process_group_ranks(wrapper.process_group)
    except (KeyError, ValueError, RuntimeError):
        return False
    return True


def reducers_of(tensors: Iterable[Tensor]) -> list[DistributedDataParallel]:
    """Return the wrappers in `DistributedDataParallel` that reduce the gradients of some of these tensors."""
    changed = {id(each) for each in tensors}
    active = [each for each in _active() if isinstance(each, DistributedDataParallel)] if changed else []
    return [each for each in active if any(id(p) in changed for p in each.parameters())]


def note_earlier() -> None:
    """Note the wrappers that were made before this file was imported; all objects are searched, once."""
    if not _SEARCHED and (is_distributed() or torch.cuda.device_count() > 1):
        for each in gc.get_objects():
            # The class is asked and not the object: lazy objects of other libraries import something when asked.
            if issubclass(type(each), nn.Module):
                _note(each)
        _SEARCHED.append(True)


def _note(module: nn.Module, name: str = "", child: object = None) -> None:
    """Note a module that takes another one, if it is a wrapper."""
    cls = type(module)
    if cls not in _KNOWN:
        _KNOWN[cls] = _torch_class(module, (*HOLDS, FOLLOWS)) is not None
    if _KNOWN[cls]:
        _NOTED.add(module)
        if isinstance(module, DistributedDataParallel) and isinstance(child, nn.Module) and name == "module":
            note_trained(module, child)


_NOTED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_KNOWN: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()
_SEARCHED: list[bool] = []
register_module_module_registration_hook(_note)


def _wrapper(module: nn.Module) -> str | None:
    """Return the class among `HOLDS`, or `FOLLOWS`, that a module is of, if it is of any and on several devices."""
    name = _torch_class(module, (*HOLDS, FOLLOWS))
    one_device = name == "DataParallel" and len(getattr(module, "device_ids", ())) < 2  # it calls the model itself
    return None if one_device else name


def _torch_class(module: nn.Module, names: Iterable[str]) -> str | None:
    """Return the first of these classes, of torch or deepspeed, that a module is of."""
    classes = {
        cls.__name__ for cls in type(module).__mro__ if cls.__module__.partition(".")[0] in ("torch", "deepspeed")
    }
    return next((name for name in names if name in classes), None)
