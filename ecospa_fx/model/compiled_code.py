"""Compiled code: what torch.compile keeps of the forwards of modules, for sizes that are gone after a shrink.

torch.compile keeps at most `torch._dynamo.config.recompile_limit` graphs of a function and runs it uncompiled from then
on. After each shrink it needs a new one: those of sizes that do not come back are dropped.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from types import CodeType
from typing import Any

from torch import nn

from ecospa_fx.errors import CaptureError
from ecospa_fx.logs import logger

from .full_size import saved_tensors_hooks_on

OWN: list[Any] = []
"""Functions of this library that become frames of their own in compiled code, where a value leaves it."""


def forget_code(model: nn.Module, changed: Collection[str]) -> None:
    """Drop the graphs that torch.compile keeps of modules in which parameters have changed their sizes.

    Args:
        model: the model.
        changed: names of the parameters.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    reset = getattr(dynamo, "reset_code", None)
    if reset is None or not changed:
        return
    paths = {"", *(name[:end] for name in changed for end, letter in enumerate(name) if letter == ".")}
    modules = [model.get_submodule(path) for path in sorted(paths)]
    functions = (*(type(module).forward for module in modules), *OWN)
    codes = {getattr(function, "__code__", None) for function in functions}
    for code in codes:
        for each in _with_resumed(code) if code is not None else ():
            reset(each)
    _warn_of_many_sizes(model, dynamo.config.recompile_limit)


def check_not_recomputed(region: str) -> None:
    """Refuse to capture a call in compiled code that activation checkpointing will run again.

    This time the code breaks off for the capture, and the next time it does not: it would save other tensors.

    Raises:
        CaptureError: it is such a call.
    """
    hooks = saved_tensors_hooks_on()
    if hooks and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint":
        raise CaptureError(
            f"{region} is called in a new way (another dtype, mode or kind of arguments) under torch.compile and "
            "activation checkpointing, which would compute it again by other code than it ran by. Take the first step "
            "of each kind without torch.compile: `with torch.compiler.set_stance('force_eager'):` around its forward "
            "and backward"
        )


def _with_resumed(code: CodeType) -> Iterator[CodeType]:
    """Yield code, and what torch.compile has made of it to go on after breaks.

    It keeps that in a private place (torch 2.13 to 2.14); where there is none, that code is not dropped.
    """
    yield code
    made = getattr(sys.modules.get("torch._dynamo.resume_execution"), "ContinueExecutionCache", None)
    cache: Any = getattr(made, "cache", {})
    for each in cache[code].values() if code in cache else ():
        yield from _with_resumed(each)


def _warn_of_many_sizes(model: nn.Module, limit: int) -> None:
    """Say so where blocks that are compiled one by one have more sizes than torch.compile keeps graphs of one forward.

    A first block, whose input asks for no gradient, takes a graph of its own.
    """
    sizes: dict[type[nn.Module], set[tuple[Any, ...]]] = {}
    for module in model.modules():
        if module._compiled_call_impl is not None:
            sizes.setdefault(type(module), set()).add(tuple(parameter.shape for parameter in module.parameters()))
    for cls, shapes in sizes.items():
        if len(shapes) + 1 > limit:
            logger("shrink").warning(
                "%d modules of class %s are compiled one by one and have different sizes, and torch.compile keeps %d "
                "graphs of one forward: the others run uncompiled. Set torch._dynamo.config.recompile_limit to %d or "
                "more, or give blocks equal sizes, Constraints(uniform='layers')",
                len(shapes), cls.__name__, limit, 2 * len(shapes) + 1,
            )  # fmt: skip
