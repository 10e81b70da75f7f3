"""Record: the calls of submodules in one forward of a model, which changes nothing.

record(model, args, kwargs, names) -> a call per submodule that is called
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from ecospa_fx.passes.graph.isolate import Draws, isolated
from ecospa_fx.passes.graph.offloaded import refuse_offloaded
from ecospa_fx.passes.graph.tensors import named_tensors, swapped
from ecospa_fx.passes.ir.region_graph import Call
from ecospa_fx.passes.ir.signature import call_key, training_flags
from ecospa_fx.passes.ir.state_access import PLAIN, copy_objects, flattened, foreign, parted, resolve_object

from .ends import Ends
from .outside_numbers import OutsideNumbers
from .outside_uses import OutsideUses

# Forwards in which a submodule is looked for that others, drawn at random, may leave out (stochastic depth).
ATTEMPTS = 16


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: set[str]) -> dict[str, Call]:
    """Return the first call of each named submodule in one forward of the model, which changes nothing."""
    return {name: calls[0] for name, calls in record_all(model, args, kwargs, names).items()}


def record_all(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: set[str],
    used_outside: dict[str, str] | None = None,
    ends: set[str] | None = None,
    numbers: OutsideNumbers | None = None,
    closed: Collection[str] = (),
) -> dict[str, list[Call]]:
    """Return the calls of each named submodule in one forward of the model, one of each signature.

    Where a forward leaves submodules out at random, it is run several times.

    Args:
        model: the model; left as it is.
        args: positional arguments of the forward.
        kwargs: keyword arguments of it.
        names: of the submodules.
        used_outside: gets, by submodule, a sentence about a parameter of it that is used while it does not run.
        ends: gets the names of parameters at the ends of the model, see `passes.capture.ends`.
        numbers: gets the numbers that are read in Python, and which submodules run then.
        closed: submodules in which it records none.
    """
    calls: dict[str, list[Call]] = {}
    seen: set[Any] = set()
    clones: dict[Any, tuple[Tensor, Tensor]] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, hook_args: Any, hook_kwargs: Any) -> None:
            known = call_key(hook_args, hook_kwargs)
            key = (name, training_flags(module), known[0] if known else None)
            if key not in seen:
                seen.add(key)
                calls.setdefault(name, []).append(_snapshot((hook_args, hook_kwargs), clones))

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True) for name in sorted(names)
    ]
    try:
        with isolated(model), computable(model) as fake, torch.no_grad():
            call_args, call_kwargs = computable_call(args, kwargs, fake)
            watch = OutsideUses(model, names if used_outside is not None else ())
            at_ends = None if ends is None else Ends(model)
            handles += watch.register_hooks()
            for attempt in range(ATTEMPTS):
                draws = Draws()
                if attempt:
                    call_args, call_kwargs = computable_call(args, kwargs, fake)
                heard = nullcontext() if numbers is None else numbers.watching(model, closed)
                with watch, at_ends or nullcontext(), heard:
                    results = model(*call_args, **call_kwargs)
                if at_ends is not None:
                    at_ends.leave(results)
                if calls.keys() == names or not draws.moved():
                    break  # all are called, or none of the others ever is in such a call
            if used_outside is not None:
                used_outside |= watch.reasons
            if ends is not None and at_ends is not None:
                ends |= at_ends.names
    finally:
        for handle in handles:
            handle.remove()
    # In the order of the model, not of the calls, so that names are the same for every input.
    return {name: calls[name] for name, _ in model.named_modules() if name in calls}


def computable_call(args: tuple[Any, ...], kwargs: dict[str, Any], fake: Callable[[Tensor], Tensor]) -> Call:
    """Copy the arguments of a forward that it may change, with tensors that fit those of `computable`."""
    copied = pytree.tree_map(_copied, (args, kwargs), is_leaf=foreign)
    call: Call = pytree.tree_map_only(Tensor, fake, copied, is_leaf=foreign)
    return call


def _copied(leaf: Any) -> Any:
    """Copy an argument that a forward may change, a cache say, where it can be copied."""
    if isinstance(leaf, (Tensor, *PLAIN)):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:
        return leaf


def _snapshot(call: Call, clones: dict[Any, tuple[Tensor, Tensor]]) -> Call:
    """Copy the objects of a call, which change while the forward goes on, and the tensors in them.

    `clones` holds the copies by tensor and version, so that a tensor that many blocks are called with is copied once
    for each write to it.
    """
    leaves, spec = flattened(call)
    leaves, objects = parted(leaves)

    def copied(_: Any, tensor: Tensor) -> Tensor:
        key = (id(tensor), tensor._version)
        if key not in clones:
            clones[key] = (tensor, plain_tensor(tensor) if isinstance(tensor, FakeTensor) else tensor.detach().clone())
        return clones[key][1]

    twins = copy_objects(objects, copied)
    snapshot: Call = pytree.tree_unflatten(
        [plain_tensor(leaf) if isinstance(leaf, Tensor) else resolve_object(leaf, twins) for leaf in leaves], spec
    )
    return snapshot


def plain_tensor(tensor: Tensor) -> Tensor:
    """Detach a recorded tensor; turn a fake one into a plain meta tensor."""
    if isinstance(tensor, FakeTensor):
        with unset_fake_temporarily():
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return tensor.detach()


@contextmanager
def computable(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Let a model on the meta device run on fake tensors, for which code that looks at values takes another branch."""
    if not any(p.is_meta for p in model.parameters()):
        yield lambda tensor: tensor
        return
    refuse_offloaded(model, "")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    named = named_tensors(model).items()
    with swapped(model, {name: mode.from_tensor(t) for name, t in named}), mode:
        yield mode.from_tensor
