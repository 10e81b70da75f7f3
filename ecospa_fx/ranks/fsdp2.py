"""FSDP2: what a shrink must know of `torch.distributed.fsdp.fully_shard`; the one file that reads its private parts.

FSDP2 keeps an `FSDPParam` per parameter, with sizes, padding and buffers of its own. For a parameter that shrinks one
is made anew, by torch's own constructor and beside the old one, and at the commit the old object takes its attributes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ecospa_fx.collectives import is_distributed
from ecospa_fx.errors import RanksError, WrapperError
from ecospa_fx.passes.graph.tensors import join

from .placed import positions_here, shards_of
from .shards import whole_of

KNOWN = {
    "param", "module_info", "mesh_info", "post_forward_mesh_info", "device", "shard_placement_fn", "mp_policy",
    "offload_policy",
}  # fmt: skip
"""The arguments of the constructor of `FSDPParam`."""

HELD = ("_module_info", "_post_load_hook_handle", "_param_fqn", "_orig_param_uid", "sharded_param")
"""The attributes of an `FSDPParam` that tie it to its module and parameter; the others speak of sizes."""


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules in a model to which `fully_shard` has been applied."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    cls = getattr(fsdp, "FSDPModule", None)
    return [] if cls is None else [module for module in model.modules() if isinstance(module, cls)]


def is_fsdp(module: nn.Module) -> bool:
    """Decide whether `fully_shard` has been applied to a module itself."""
    cls = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return cls is not None and isinstance(module, cls)


def class_inside(cls: type[Any]) -> type[Any]:
    """Return the class of a module before `fully_shard` put one of its own on top; another class itself."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return cls.__bases__[1] if fsdp is not None and cls.__bases__[:1] == (fsdp,) else cls


def reshard(model: nn.Module) -> None:
    """Let a model hold its sharded parameters: a root keeps its weights gathered after a forward without backward."""
    if torch.compiler.is_compiling() or not is_distributed():  # inside of a forward, or with nothing to gather
        return
    for module in fsdp_modules(model):
        module.reshard()


def owners(model: nn.Module) -> dict[int, Any]:
    """Return `id` of each sharded parameter -> the `FSDPParam` that owns it.

    Raises:
        RanksError: this version of torch keeps them elsewhere.
    """
    return {id(owner.sharded_param): owner for group in _groups(model) for owner in group.fsdp_params}


def in_forward(owner: Any) -> Any:
    """Return how a parameter is placed while its weights are gathered, with its sizes; None where it is whole then.

    It is sharded there if it was before `fully_shard`, as by tensor parallelism.
    """
    if not owner.is_dtensor:
        return None
    spec = getattr(owner, "_unsharded_dtensor_spec", None)
    if spec is None:
        raise RanksError(_unknown("FSDPParam has no `_unsharded_dtensor_spec`"))
    return _Placed(spec.mesh, tuple(spec.placements), owner.sharded_param.shape)


@dataclass(frozen=True)
class _Placed:
    """The way in which a tensor is placed on a device mesh."""

    device_mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size

    @property
    def ndim(self) -> int:
        """The number of dims."""
        return len(self.shape)

    def to_local(self) -> None:
        """Return nothing: it has no values."""


def _groups(model: nn.Module) -> Iterator[Any]:
    for module in fsdp_modules(model):
        yield from _groups_of(module)


def _groups_of(module: Any) -> list[Any]:
    groups: list[Any] | None = getattr(module._get_fsdp_state(), "_fsdp_param_groups", None)
    if groups is None:
        raise RanksError(_unknown("FSDPState has no `_fsdp_param_groups`"))
    return groups


def check_reduced(model: nn.Module) -> None:
    """Refuse a model whose gradients are still on the way, or an FSDP2 that this file does not know.

    Raises:
        RanksError: it is so.
    """
    for group in _groups(model):
        arguments = set(inspect.signature(type(group.fsdp_params[0]).__init__).parameters) if group.fsdp_params else {}
        if arguments and arguments != {"self"} | KNOWN:
            raise RanksError(_unknown(f"FSDPParam takes {', '.join(sorted(arguments))}"))
        for owner in group.fsdp_params:
            unsharded = getattr(owner, "_unsharded_param", None)
            held = owner.unsharded_accumulated_grad is not None or (
                unsharded is not None and unsharded.grad is not None
            )
            if held or getattr(group, "_partial_reduce_output", None) is not None:
                raise RanksError(
                    f"the gradient of `{owner._param_fqn or owner._module_info.param_name}` is not reduced yet, as "
                    "between micro-batches with set_requires_gradient_sync(False): shrink after the optimizer's step"
                )


def anew(owner: Any, new: Any) -> tuple[Any, Mapping[str, Any]]:
    """Make the data and the attributes of an `FSDPParam` for a parameter of other sizes.

    Args:
        owner: the `FSDPParam` now; it stays as it is.
        new: the DTensor to come, placed as the old one.

    Returns:
        The DTensor that its parameter is to hold, in memory that is padded, and all attributes to come.

    Raises:
        RanksError: FSDP2 cannot shard a parameter of such sizes.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    info, placement = owner._module_info, owner.fsdp_placement
    stand_in = nn.Module()
    stand_in.register_parameter(info.param_name, None)
    placed = in_forward(owner)
    sizes = list(new.shape)
    for dim, shards in (shards_of(placed) or {}).items() if placed is not None else ():
        sizes[dim] = len(positions_here(sizes[dim], placed.device_mesh, shards))
    blank: Any = torch.empty(sizes, dtype=new.dtype, device="meta")
    shell = nn.Parameter(
        blank if placed is None else whole_of(blank, placed, new.shape),
        requires_grad=owner.sharded_param.requires_grad,
    )
    offload = CPUOffloadPolicy(pin_memory=owner.pin_memory) if owner.offload_to_cpu else OffloadPolicy()
    try:
        made = type(owner)(
            shell,
            type(info)(stand_in, info.param_name),
            mesh_info=owner.mesh_info,
            post_forward_mesh_info=owner.post_forward_mesh_info,
            device=owner.device,
            shard_placement_fn=(lambda _: placement) if placement.dim else None,
            mp_policy=owner.mp_policy,
            offload_policy=offload,
        )
    except NotImplementedError as error:  # uneven shards along columns
        ranks = owner.mesh_info.shard_mesh_size
        raise RanksError(
            f"`{owner._param_fqn or info.param_name}` is sharded along dim {placement.dim} and would be "
            f"{tuple(new.shape)}, but FSDP2 shards only multiples of {ranks} along it ({error}): make widths multiples "
            f"of it, round_to={ranks}, or let fully_shard shard rows"
        ) from error
    stand_in._parameters[info.param_name] = nn.Parameter(new, requires_grad=owner.sharded_param.requires_grad)
    made.reset_sharded_param()  # pads the shard, and pins its memory
    made.init_dtype_attrs(owner.mp_policy)
    return made.sharded_param, {**vars(made), **{name: getattr(owner, name) for name in HELD}}


def _unknown(what: str) -> str:
    return (
        f"FSDP2 of torch {torch.__version__} is not the one that is known here ({what}), so nothing can shrink in it: "
        "use torch 2.13, or train with DistributedDataParallel"
    )


@contextmanager
def gathered_whole(model: nn.Module) -> Iterator[None]:
    """Hold all weights of a model on this rank for a while, as a plain model that FSDP2 does not look at.

    Every rank must take part, and needs memory for all of the model.
    """
    modules = fsdp_modules(model)
    if not modules:
        yield
        return
    shut = [module for module in modules if any(each.is_sharded for each in _groups_of(module))]
    hooks = [_hooks(module) for module in modules]
    held = [(hook, dict(hook)) for own in hooks for hook, _ in own]
    try:
        for module in modules:
            module.unshard()
        for own in hooks:
            for hook, key in own:
                hook.pop(key, None)
        yield
    finally:
        for hook, before in held:
            hook.clear()
            hook.update(before)
        for module in shut:
            module.reshard()


def _hooks(module: Any) -> list[tuple[dict[int, Any], int]]:
    """Return the dicts of hooks of a module, each with the key of FSDP2's own hook in it."""
    state = module._get_fsdp_state()
    own = []
    for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
        for each in getattr(handle, "handles", [handle]):
            own += [(held, each.id) for held in (module._forward_pre_hooks, module._forward_hooks) if each.id in held]
    return own


def sharded_apart(module: nn.Module) -> list[str]:
    """Return the names of the modules inside a module that `fully_shard` gathers on their own."""
    # Without `id`, at which torch.compile would take each of many equal blocks for another.
    return [name for name, child in module.named_modules() if name and is_fsdp(child)]


def check_gathered_at_once(name: str, module: nn.Module, execution: str) -> None:
    """Refuse a region that runs as one graph, with modules in it whose weights FSDP2 gathers for their own calls only.

    Raises:
        WrapperError: it has such modules.
    """
    apart = sharded_apart(module) if execution == "graph" else []
    if apart:
        region = f"`{name}`" if name else f"the {type(module).__name__}"
        raise WrapperError(
            f"{region} is one region, which runs as one graph, and fully_shard gathers the weights of "
            f"`{join(name, apart[0])}` in it for calls of that alone. Compile with regions='blocks' and apply "
            "fully_shard to the same blocks and to the model; or to the model only; or use execution='module'"
        )
