"""Wrappers: modules that call a model. Some spread it over devices, with sizes that a shrink would change under them.

Buckets, flat parameters and shards are made once, for the sizes of that moment. After a shrink the gradients of some
parameters are no longer reduced, and the ranks drift apart, often without an error: the reducer of
`DistributedDataParallel` holds on to the gradient accumulators that it was made with.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ecospa_fx.collectives import is_distributed
from ecospa_fx.errors import WrapperError

from .fsdp2 import owners
from .shards import is_sharded

HOLDS = {
    "DistributedDataParallel": "gradient buckets",
    "FullyShardedDataParallel": "flat parameters",
    "DataParallel": "replicas",
    "DeepSpeedEngine": "flat parameters",
}
"""The class of a wrapper, by name because its library need not be installed -> what it keeps at sizes of its own."""

INSIDE = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
"""The class of a wrapper of torch that computes the same as the module in it -> the attribute that holds that."""

Function = TypeVar("Function", bound=Callable[..., Any])

WAY_OUT = "Train without it, in one process on one device; or shrink the plain model first, and wrap it afterwards"


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
    """Refuse a model that is spread over devices.

    Args:
        model: the model that is to shrink, or a wrapper of it.

    Raises:
        WrapperError: the model or a part of it is wrapped, or parameters are sharded.
    """
    name = type(model).__name__
    for where, module in model.named_modules():
        wrapper = _wrapper(module)
        if wrapper is not None:
            inner = getattr(module, "module", None)
            if isinstance(inner, nn.Module):
                where, name = "", type(inner).__name__
            raise WrapperError(_wrapped(f"`{where}` of {name}" if where else name, wrapper))
    for wrapper in _wrappers_around(model):
        raise WrapperError(_wrapped(name, wrapper))
    follows = owners(model)
    for parameter_name, parameter in model.named_parameters():
        if is_sharded(parameter) and id(parameter) not in follows:
            raise WrapperError(
                f"`{parameter_name}` of {name} is sharded (a DTensor), as in tensor parallelism, and its shards would "
                f"keep their sizes when the model shrinks. {WAY_OUT}"
            )


def _wrapped(where: str, wrapper: str) -> str:
    return (
        f"{where} is wrapped in {wrapper}, whose {HOLDS[wrapper]} would keep their sizes when the model shrinks: "
        f"gradients would no longer be reduced, and the ranks drift apart. {WAY_OUT}"
    )


def _wrappers_around(model: nn.Module) -> Iterator[str]:
    """Yield the classes of the wrappers that hold the model. No reference leads there, so all objects are searched."""
    if not (is_distributed() or torch.cuda.device_count() > 1):
        return
    if next(_around(model), None) is not None:
        gc.collect()  # of wrappers that nobody holds any more
        yield from _around(model)


def _around(model: nn.Module) -> Iterator[str]:
    for each in gc.get_objects():
        # The class is asked and not the object: lazy objects of other libraries import something when asked.
        if issubclass(type(each), nn.Module):
            wrapper = _wrapper(each)
            if wrapper is not None and any(module is model for module in each.modules()):
                yield wrapper


def _wrapper(module: nn.Module) -> str | None:
    """Return the class among `HOLDS` that a module is of, if it is of any and on several devices."""
    name = _torch_class(module, HOLDS)
    one_device = name == "DataParallel" and len(getattr(module, "device_ids", ())) < 2  # it calls the model itself
    return None if one_device else name


def _torch_class(module: nn.Module, names: Iterable[str]) -> str | None:
    """Return the first of these classes, of torch or deepspeed, that a module is of."""
    classes = {
        cls.__name__ for cls in type(module).__mro__ if cls.__module__.partition(".")[0] in ("torch", "deepspeed")
    }
    return next((name for name in names if name in classes), None)
