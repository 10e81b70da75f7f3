"""SliceSums: sums of squares of every scored row and column of many tensors.

{(parameter, dim)} -> one flat vector per device -> add(gradients): one launch -> views per (parameter, dim)

Where parameters are sharded, each rank adds its shard at its position in the whole; `reduced` adds up the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed

from ecospa_fx.collectives import all_reduce_sum
from ecospa_fx.errors import OptimizerError
from ecospa_fx.kernels import add_slice_sums, add_slice_sums_now
from ecospa_fx.ranks.placed import shards_of
from ecospa_fx.ranks.shards import held_along, is_sharded, local_part

SliceKey = tuple[str, int]


@dataclass(frozen=True)
class _Part:
    """A tensor that this rank has of a parameter, or of one dim of that a run of it.

    Attributes:
        name: of the parameter.
        dim: the dim of which it is a run; None for all.
        start: where the run begins.
        length: of the run.
    """

    name: str
    dim: int | None = None
    start: int = 0
    length: int = 0

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the part of one of some tensors by name."""
        local = _local(tensors[self.name])
        return local if self.dim is None else local.narrow(self.dim, self.start, self.length)


@dataclass(frozen=True)
class _Call:
    """The arguments of one kernel call: parts of parameters in order, then targets as `add_slice_sums` takes them."""

    parts: tuple[_Part, ...]
    tensors: list[int]
    dims: list[int]
    offsets: list[int]


class SliceSums:
    """Sums over training steps of the squares of each slice of many tensors, in memory that stays where it is.

    Args:
        parameters: the tensors whose gradients will be added.
        dims: parameter name -> its dims that are scored.
        weighted: keep the sums of `(w * g)²` too.

    Attributes:
        views: (parameter, dim) -> its sums `[parameter.shape[dim]]`, of `(w * g)²` if weighted.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], dims: Mapping[str, Iterable[int]], *, weighted: bool = False
    ) -> None:
        self.weighted = weighted
        self.dims = {name: tuple(sorted(along)) for name, along in dims.items()}
        self._home: dict[str, tuple[torch.device, torch.dtype]] = {}
        self._begin: dict[SliceKey, int] = {}
        widths: dict[tuple[torch.device, torch.dtype], int] = {}
        for name, along in self.dims.items():
            parameter = parameters[name]
            home = (parameter.device, torch.promote_types(parameter.dtype.to_real(), torch.float32))
            self._home[name] = home
            for dim in along:
                self._begin[name, dim] = widths.get(home, 0)
                widths[home] = self._begin[name, dim] + parameter.shape[dim]
        self._sizes = {(name, dim): parameters[name].shape[dim] for name, dim in self._begin}
        self._flat = {
            home: torch.zeros(1 + weighted, width, dtype=home[1], device=home[0]) for home, width in widths.items()
        }
        self._calls: dict[Any, list[tuple[tuple[torch.device, torch.dtype], _Call]]] = {}
        # By the members of a group, of which several meshes may have one: the group, and the slices that it shards.
        self._sharded: dict[tuple[int, ...], tuple[distributed.ProcessGroup, set[SliceKey]]] = {}
        for name in self.dims:
            self._note_shards(name, parameters[name])
        self.views = self._views(self._flat)

    @torch.no_grad()
    def add(
        self,
        gradients: Mapping[str, Tensor],
        weights: Mapping[str, Tensor] | None = None,
        *,
        decay: float = 1.0,
        gain: float = 1.0,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Add gradients: `sums = decay * sums + gain * squares`. No synchronisation, no memory taken on a GPU.

        Args:
            gradients: by parameter name; those of parameters that are not scored are left out.
            weights: the parameters, if weighted.
            decay: factor on the sums.
            gain: factor on the squares that are added.
            scale: the factor that gradients are multiplied by (a gradient scaler's scale), which is divided out here.
            found_inf: unless it is 0, nothing happens.

        Raises:
            OptimizerError: a gradient is a DTensor whose local part cannot be placed in the whole.
        """
        names = tuple([name for name in gradients if name in self._home])
        tensors: dict[str, Any] = dict(gradients)
        placements = tuple([(name, tensors[name].placements) for name in names if is_sharded(tensors[name])])
        calls = self._calls.get((names, placements))
        if calls is None:
            calls = self._calls[names, placements] = self._plan(names, gradients)
        add = add_slice_sums if torch.compiler.is_compiling() else add_slice_sums_now
        for home, call in calls:
            device = home[0]
            add(
                self._flat[home],
                [part.of(gradients) for part in call.parts],
                [part.of(weights) for part in call.parts] if weights is not None and self.weighted else [],
                call.tensors,
                call.dims,
                call.offsets,
                decay,
                gain,
                None if scale is None else scale.to(device, non_blocking=True),
                None if found_inf is None else found_inf.to(device, non_blocking=True),
            )

    def zero(self) -> None:
        """Set the sums to 0, in place."""
        for flat in self._flat.values():
            flat.zero_()

    def reduced(self) -> dict[SliceKey, Tensor]:
        """Return the sums on the CPU, added up over the ranks that hold parts of a parameter.

        One all-reduce of the whole vector for each dim of a device mesh along which anything is sharded. Every rank of
        the mesh must take part. Replicated parameters count once.
        """
        return self._views(self._reduced(self._flat))

    def whole(self, sums: Mapping[SliceKey, Tensor]) -> dict[SliceKey, Tensor]:
        """Add up sums of the shapes of `views` over the ranks, as `reduced` does those that are kept here."""
        flats = {home: torch.zeros_like(flat) for home, flat in self._flat.items()}
        views = self._views(flats)
        for key, each in sums.items():
            views[key].copy_(each)
        added = self._views(self._reduced(flats))
        return {key: added[key].clone() for key in sums}

    @property
    def sharded(self) -> bool:
        """True if ranks hold parts of some parameter."""
        return bool(self._sharded)

    def _reduced(self, flats_here: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        flats = {}
        for home, flat in flats_here.items():
            whole = flat
            for group, keys in self._sharded.values():
                if distributed.get_rank(group) != 0:
                    whole = whole.clone()
                    for key, begin in self._begin.items():
                        if self._home[key[0]] == home and key not in keys:
                            whole[:, begin : begin + self._sizes[key]] = 0
                (whole,) = all_reduce_sum(whole, group=group)
            flats[home] = whole.cpu()
        return flats

    def _views(self, flats: Mapping[tuple[torch.device, torch.dtype], Tensor]) -> dict[SliceKey, Tensor]:
        plane = int(self.weighted)
        return {
            key: flats[self._home[key[0]]][plane, begin : begin + self._sizes[key]]
            for key, begin in self._begin.items()
        }

    def _plan(
        self, names: tuple[str, ...], gradients: Mapping[str, Tensor]
    ) -> list[tuple[tuple[torch.device, torch.dtype], _Call]]:
        calls: dict[tuple[torch.device, torch.dtype], _Call] = {}
        for name in names:
            call = calls.setdefault(self._home[name], _Call((), [], [], []))
            runs, parts = self._runs(name, gradients[name]), [_Part(name)]
            for dim in self.dims[name]:
                for start, length, begin in runs.get(dim, [(0, 0, 0)]):
                    whole = len(runs.get(dim, ())) < 2
                    parts += [] if whole else [_Part(name, dim, start, length)]
                    call.tensors.append(len(call.parts) + (0 if whole else len(parts) - 1))
                    call.dims.append(dim)
                    call.offsets.append(self._begin[name, dim] + begin)
            calls[self._home[name]] = _Call((*call.parts, *parts), call.tensors, call.dims, call.offsets)
        return list(calls.items())

    def _runs(self, name: str, gradient: Any) -> dict[int, list[tuple[int, int, int]]]:
        """Return by dim the runs of a parameter that the local part of a gradient has.

        Each is where it begins in that, how long it is, and where it begins in the whole.
        """
        if not is_sharded(gradient):
            return {}
        self._note_shards(name, gradient)
        found: dict[int, list[tuple[int, int, int]]] = {}
        for dim in range(gradient.ndim):
            here = held_along(gradient, dim)
            starts = [0, *((here.diff() != 1).nonzero().flatten() + 1).tolist(), len(here)] if len(here) else []
            found[dim] = [(a, b - a, int(here[a])) for a, b in pairwise(starts)]
        return found

    def _note_shards(self, name: str, tensor: Any) -> None:
        """Note along which dims of its device mesh a tensor is sharded, if it is."""
        if not is_sharded(tensor):
            return
        shards = shards_of(tensor)
        if shards is None or any(placement.is_partial() for placement in tensor.placements):
            kinds = ", ".join(type(placement).__name__ for placement in tensor.placements)
            raise OptimizerError(
                f"the gradient of `{name}` is placed {kinds} along the dims of its device mesh, and only Shard and "
                "Replicate tell which slices a rank holds; redistribute it before the optimizer's step"
            )
        keys = {(name, dim) for dim in self.dims[name]}
        for mesh_dim in (mesh_dim for by in shards.values() for mesh_dim, _ in by):
            group = tensor.device_mesh.get_group(mesh_dim)
            members = tuple(distributed.get_process_group_ranks(group))
            self._sharded.setdefault(members, (group, set()))[1].update(keys)


def counts_here(parameter: Any) -> bool:
    """Decide whether sums over a whole parameter count on this rank, where those of all ranks are added up."""
    if not is_sharded(parameter):
        return True
    mesh_dims = {mesh_dim for shards in (shards_of(parameter) or {}).values() for mesh_dim, _ in shards}
    return all(parameter.device_mesh.get_local_rank(mesh_dim) == 0 for mesh_dim in mesh_dims)


def _local(tensor: Any) -> Tensor:
    """Return the part of a tensor on this rank, strided."""
    local = local_part(tensor)
    return local if local.layout == torch.strided else local.to_dense()
