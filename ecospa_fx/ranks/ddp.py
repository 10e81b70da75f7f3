"""DistributedDataParallel made again in place, once parameters have other sizes.

Its reducer holds buckets of the old sizes, and hooks on gradient accumulators that a shrink replaces, so that they
never fire again. A new reducer with the same settings takes its place. Nothing is sent for that: a broadcast of weights
would hide ranks that have drifted apart.

The methods of torch that are used here beside the public ones are those by which it makes itself anew when it is
unpickled (`DistributedDataParallel.__setstate__`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


def note_trained(wrapper: DistributedDataParallel, module: nn.Module) -> None:
    """Note which parameters train as a module is wrapped: the gradients of these are reduced from then on."""
    _TRAINED[wrapper] = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}


_TRAINED: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()


@contextmanager
def _as_when_wrapped(ddp: Any) -> Iterator[None]:
    """Let those parameters train that did when the module was wrapped: one may be frozen now, and go on later."""
    parameters = list(ddp.module.parameters())
    now = [parameter.requires_grad for parameter in parameters]
    trained = _TRAINED.get(ddp)
    try:
        if trained is not None:
            for parameter in parameters:
                parameter.requires_grad_(id(parameter) in trained)
        yield
    finally:
        for parameter, trains in zip(parameters, now, strict=True):
            parameter.requires_grad_(trains)


def make_again(wrapper: DistributedDataParallel) -> None:
    """Give a wrapper a reducer for its parameters as they are now; the wrapper, its hooks and settings stay."""
    ddp: Any = wrapper
    builtin = _builtin_hook(ddp)
    with _as_when_wrapped(ddp):
        parameters, sparse = ddp._build_params_for_reducer()
        ddp._ddp_init_helper(parameters, sparse, ddp._build_debug_param_to_name_mapping(parameters), ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    if ddp.static_graph:
        _learn_the_graph(ddp)
    hooks, ddp._comm_hooks = ddp._comm_hooks, []
    try:
        for hook, state in hooks:
            ddp.register_comm_hook(state, hook)
    except BaseException:
        ddp._comm_hooks = hooks
        raise
    if builtin is not None:
        ddp._register_builtin_comm_hook(builtin)


def _learn_the_graph(ddp: Any) -> None:
    """Let a new reducer learn a static graph from the first backward.

    torch cannot learn it without sync. Of gradients that are accumulated in `no_sync` the first are reduced therefore:
    the mean over ranks of a mean and later gradients is the mean of all.
    """
    ddp.reducer._set_static_graph()
    ddp.logger._set_static_graph()
    ddp._static_graph_delay_allreduce_enqueued = False

    def sync(held: Any, *_: object) -> None:
        if held._static_graph_delay_allreduce_enqueued:  # there has been a backward
            handle.remove()
        elif torch.is_grad_enabled():
            held.require_backward_grad_sync = True

    handle = ddp.register_forward_pre_hook(sync)


def refusal(wrapper: DistributedDataParallel) -> str | None:
    """Return why a wrapper cannot be made again, to follow its name in a message; None if it can."""
    ddp: Any = wrapper
    if ddp._delay_all_reduce_params:
        return (
            "with delay_all_reduce_named_params, whose one buffer of gradients would keep its size when the model "
            "shrinks; leave it out"
        )
    if ddp.mixed_precision is not None:
        return (
            "with mixed_precision, whose copies of the parameters would keep their sizes when the model shrinks; use "
            "torch.autocast"
        )
    if any(hasattr(p, "_in_backward_optimizers") for p in ddp.module.parameters()):
        return (
            "with optimizers that step in backward, as its gradients arrive, and nobody knows how their state follows "
            "a shrink; let the optimizer step after backward"
        )
    for hook, state in ddp._comm_hooks:
        if state is not None and _holds_sizes(state):
            name = getattr(hook, "__qualname__", hook)
            return (
                f"with the communication hook {name}, whose {type(state).__name__} holds tensors at the sizes of the "
                "gradient buckets, which would keep them when the model shrinks; use one without such a state, such as "
                "fp16_compress_hook"
            )
    return None


def _holds_sizes(state: object) -> bool:
    """Return whether the state of a communication hook holds tensors, or will, as that of PowerSGD does."""
    if any(cls.__name__ == "PowerSGDState" for cls in type(state).__mro__):
        return True
    return any(isinstance(leaf, Tensor) and leaf.numel() > 1 for leaf in _leaves(state))


def _leaves(state: object) -> Iterable[object]:
    return pytree.tree_leaves(dict(vars(state)) if hasattr(state, "__dict__") else state)


def _builtin_hook(ddp: Any) -> Any:
    """Return the communication hook of torch's own that is not in Python, if one is registered."""
    if ddp._comm_hooks:
        return None
    said = str(ddp._get_ddp_logging_data().get("comm_hook", ""))
    return getattr(distributed.BuiltinCommHookType, said.rpartition(".")[2], None) if said else None  # type: ignore[attr-defined]
