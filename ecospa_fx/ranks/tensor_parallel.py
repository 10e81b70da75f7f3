"""Tensor parallelism: parameters that stay sharded while a module runs, and functions that send what it takes.

These are hooks, as `parallelize_module` sets them, or a forward on the instance, as transformers does.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.collectives import is_distributed
from ecospa_fx.errors import WrapperError
from ecospa_fx.passes.graph.tensors import parameters_of

from . import fsdp2
from .placed import coordinates, positions_here, shards_of
from .shards import gathered, is_sharded

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_DEEP = 4  # closures within closures


@dataclass(frozen=True)
class Sharding:
    """The way in which one dim of a parameter is sharded in a forward.

    Attributes:
        mesh: the device mesh.
        shards: (dim of the mesh, runs before it), see `placed.shards_of`.
    """

    mesh: Any
    shards: tuple[tuple[int, int], ...]

    @property
    def ranks(self) -> int:
        """The number of ranks that share it out."""
        count = 1
        for mesh_dim, _ in self.shards:
            count *= self.mesh.size(mesh_dim)
        return count

    def owners(self, size: int) -> Tensor:
        """Return the rank, of those that share it out, that has each position, `[size]`."""
        ranks = torch.zeros(size, dtype=torch.long, device="cpu")
        for mesh_dim, at in coordinates(size, self.mesh, self.shards).items():
            ranks = ranks * self.mesh.size(mesh_dim) + at
        return ranks

    def here(self, size: int) -> Tensor:
        """Return the positions on this rank, ascending."""
        return positions_here(size, self.mesh, self.shards)


def shardings(tensor: Any) -> dict[int, Sharding]:
    """Return dim of a tensor -> how it is sharded; of one that is not sharded nothing."""
    by_dim = shards_of(tensor) if is_sharded(tensor) else None
    return {dim: Sharding(tensor.device_mesh, tuple(by)) for dim, by in (by_dim or {}).items()}


def spread_dims(model: nn.Module) -> dict[tuple[str, int], Sharding]:
    """Return (parameter, dim) -> how it is sharded while the model runs, a tied parameter under each of its names."""
    if not is_distributed():
        return {}
    known = fsdp2.owners(model)
    found: dict[tuple[str, int], Sharding] = {}
    for name, parameter in parameters_of(model, remove_duplicate=False):
        in_forward = fsdp2.in_forward(known[id(parameter)]) if id(parameter) in known else parameter
        found |= {(name, dim): each for dim, each in shardings(in_forward).items()}
    return found


def parallel_count(model: nn.Module) -> int:
    """Return the number of ranks that compute one batch together; 1 without tensor parallelism."""
    return max((each.ranks for each in spread_dims(model).values()), default=1)


def sends(function: Any, deep: int = _DEEP) -> bool:
    """Decide whether a hook or a forward speaks for a device mesh, which it then has in its closure."""
    mesh_class = getattr(sys.modules.get("torch.distributed.device_mesh"), "DeviceMesh", None)
    if mesh_class is None or not deep:
        return False
    if isinstance(function, functools.partial):
        held: Sequence[Any] = (function.func, *function.args, *function.keywords.values())
    else:
        held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _filled(cell)]
    return any(isinstance(each, mesh_class) or sends(each, deep - 1) for each in held)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def check_sequences(where: str) -> None:
    """Refuse context parallelism, which replaces the function of attention for a while.

    Raises:
        WrapperError: it is on now.
    """
    if sends(nn.functional.scaled_dot_product_attention):
        raise WrapperError(
            f"{where} is called inside of context_parallel, which replaces the attention of torch, and generated code "
            "calls the operator behind that: each rank would attend to its part of a sequence alone. Shard batches "
            "with fully_shard, or weights with parallelize_module"
        )


def sending(module: nn.Module) -> list[tuple[dict[Any, Any], Any]]:
    """Return the dicts, each with the key in it, in which a module has functions that speak for a device mesh."""
    found: list[tuple[dict[Any, Any], Any]] = [
        (module.__dict__[kind], key) for kind in HOOKS for key, hook in module.__dict__[kind].items() if sends(hook)
    ]
    if sends(module.__dict__.get("forward")):
        found.append((module.__dict__, "forward"))
    return found


def parallel_modules(module: nn.Module, model: nn.Module | None = None) -> dict[str, nn.Module]:
    """Return the modules in another one, without itself, that are spread: by their parameters, or what they send.

    Args:
        module: the module, in a forward; or
        model: the model that it is a part of, outside of one.
    """
    if not is_distributed():
        return {}
    known = {} if model is None else fsdp2.owners(model)

    def sharded(parameter: Any) -> bool:
        owner = known.get(id(parameter))
        return is_sharded(parameter if owner is None else fsdp2.in_forward(owner))

    return {
        path: child
        for path, child in module.named_modules()
        if path and (any(map(sharded, child._parameters.values())) or sending(child))
    }


@contextmanager
def gathered_here(module: nn.Module) -> Iterator[None]:
    """Hold all weights of a module on this rank for a while, as a plain module that sends nothing.

    Every rank must take part, and needs memory for all of the module.
    """
    before = [] if not is_distributed() else [
        (child._parameters, name, parameter) for child in module.modules()
        for name, parameter in child._parameters.items() if parameter is not None and is_sharded(parameter)
    ]  # fmt: skip
    functions = [each for child in module.modules() for each in sending(child)] if is_distributed() else []
    plain: dict[int, nn.Parameter] = {}
    kept = [(owner, dict(owner), key) for owner, key in functions]
    try:
        for owner, name, parameter in before:
            if id(parameter) not in plain:
                plain[id(parameter)] = nn.Parameter(gathered(parameter), requires_grad=parameter.requires_grad)
            owner[name] = plain[id(parameter)]
        for owner, key in functions:
            del owner[key]
        yield
    finally:
        for owner, name, parameter in before:
            owner[name] = parameter
        for owner, all_of_them, key in reversed(kept):
            _put_back(owner, all_of_them, key)


def _put_back(owner: dict[Any, Any], before: dict[Any, Any], key: Any) -> None:
    """Put an entry of a dict back where it was among those that are still there."""
    now = dict(owner)
    now[key] = before[key]
    ordered = [each for each in before if each in now] + [each for each in now if each not in before]
    owner.clear()
    owner.update({each: now[each] for each in ordered})


@contextmanager
def gathered_whole(model: nn.Module) -> Iterator[None]:
    """Hold all weights of a model on this rank for a while, as a plain model, however they are sharded.

    Every rank must take part, and needs memory for all of the model.
    """
    with fsdp2.gathered_whole(model), gathered_here(model):
        yield
