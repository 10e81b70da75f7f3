"""Shards: the parts of a sharded tensor (a DTensor), and how a tensor loses entries where each rank has a part of it.

dims that are whole on every rank   entries are left out where they lie, and nothing moves
dims that are sharded               the entries that stay go to their new owners by one all-to-all of many tensors,
                                    along one dim of the device mesh after the other

The device mesh and the placements stay. A rank sends and gets at most its own shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, distributed

from ecospa_fx.collectives import all_reduce_sum
from ecospa_fx.errors import RanksError
from ecospa_fx.kernels import compacted

from .placed import coordinates, positions_here, shards_of

MOST_BYTES = 1 << 28
"""Bytes of a rank's shards that one all-to-all moves at most, unless a single tensor has more."""


@dataclass(frozen=True, eq=False)
class Move:
    """A sharded tensor that is to lose entries; nothing happens yet.

    Attributes:
        tensor: the DTensor.
        keep: dim -> sorted LongTensor of the positions that stay.
        rows: (dim of the device mesh, dim of the tensor that it shards) for those dims that lose entries.
    """

    tensor: Any
    keep: Mapping[int, Tensor]
    rows: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> list[int]:
        """The sizes afterwards."""
        return [len(self.keep[dim]) if dim in self.keep else size for dim, size in enumerate(self.tensor.shape)]


@dataclass(eq=False)
class _Way:
    """The way that the entries of one dim take which stay, by their numbers after it.

    Attributes:
        index: LongTensor, the positions of the entries on this rank among those that it has now; used once.
        now: dim of the device mesh -> LongTensor `[entries that stay]`, where along it the ranks are that have them.
        after: the same, of the ranks that are to have them.
        mine: dim of the device mesh -> where this rank is.
    """

    index: Tensor
    now: dict[int, Tensor]
    after: dict[int, Tensor]
    mine: dict[int, int]

    @classmethod
    def of(cls, tensor: Any, dim: int, keep: Tensor) -> _Way:
        """Find the way of the entries of one dim of a DTensor."""
        mesh, shards = tensor.device_mesh, (shards_of(tensor) or {})[dim]
        before, keep = coordinates(tensor.shape[dim], mesh, shards), keep.cpu()
        mine = {mesh_dim: mesh.get_local_rank(mesh_dim) for mesh_dim, _ in shards}
        here = torch.stack([before[mesh_dim] == at for mesh_dim, at in mine.items()]).all(0)
        index = (here.cumsum(0) - 1)[keep[here[keep]]]
        now = {mesh_dim: ranks[keep] for mesh_dim, ranks in before.items()}
        return cls(index, now, coordinates(len(keep), mesh, shards), mine)

    def step(self, mesh_dim: int, ranks: int) -> tuple[Tensor, list[int], list[int], Tensor]:
        """Take the step along one dim of the device mesh, which has so many ranks.

        Returns:
            The order in which to send the rows of this rank, how many to each rank and from each, and the order in
            which to put those that came, so that they ascend.
        """
        beside = [self.now[other] == at for other, at in self.mine.items() if other != mesh_dim]
        line = torch.stack([*beside, torch.ones_like(self.now[mesh_dim], dtype=torch.bool)]).all(0)
        to, of = (each[mesh_dim] for each in (self.after, self.now))
        sent, got = to[line & (of == self.mine[mesh_dim])], of[line & (to == self.mine[mesh_dim])]
        self.now[mesh_dim] = to
        counts = [torch.bincount(each, minlength=ranks).tolist() for each in (sent, got)]
        return sent.argsort(stable=True), counts[0], counts[1], got.argsort(stable=True).argsort()


@dataclass(eq=False)
class _Parcel:
    """The rows of one tensor that this rank sends and gets.

    Attributes:
        rows: what it sends, the dim that is sharded first, by rank.
        sends: rows for each rank.
        gets: rows from each rank.
        order: of the rows that come, by rank, so that they ascend.
        got: what came, in order of the ranks.
    """

    rows: Tensor
    sends: list[int]
    gets: list[int]
    order: Tensor
    got: list[Tensor] = field(default_factory=list)

    def arrived(self) -> Tensor:
        """Return the rows that came, in their order."""
        rows = torch.cat(self.got) if self.got else self.rows[:0]
        return _ordered(rows, self.order)


def is_sharded(tensor: Any) -> bool:
    """Decide whether a tensor is a DTensor, of which this rank holds a part."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def local_part(tensor: Any) -> Tensor:
    """Return the part of a tensor that lies on this rank: all of one that is not sharded."""
    local: Tensor = tensor.detach()
    return local.to_local() if is_sharded(tensor) else local  # type: ignore[attr-defined]


def held_along(tensor: Any, dim: int) -> Tensor:
    """Return the positions along a dim of a tensor that this rank holds, ascending: all of one that is not sharded."""
    shards = (shards_of(tensor) or {}).get(dim) if is_sharded(tensor) else None
    size = tensor.shape[dim]
    return torch.arange(size) if shards is None else positions_here(size, tensor.device_mesh, shards)


def is_first_replica(tensor: Any) -> bool:
    """Decide whether this rank has the copy of its part that counts, where all ranks of a device mesh are added up."""
    mesh = tensor.device_mesh
    return all(mesh.get_local_rank(d) == 0 for d, each in enumerate(tensor.placements) if each.is_replicate())


def move(name: str, tensor: Any, keep: Mapping[int, Tensor]) -> Move:
    """Look at how a sharded tensor loses entries.

    Args:
        name: of the tensor, for messages.
        tensor: a DTensor.
        keep: dim -> sorted LongTensor of the positions that stay.

    Raises:
        RanksError: it is placed in a way that tells no rank which entries it has.
    """
    shards = shards_of(tensor)
    if shards is None:
        raise RanksError(
            f"`{name}` is placed {tuple(tensor.placements)} on its device mesh, which tells no rank which entries it "
            "has; shard it, or redistribute it"
        )
    rows = [(mesh_dim, dim) for dim, by in shards.items() if dim in keep for mesh_dim, _ in by]
    return Move(tensor, keep, tuple(rows))


@torch.no_grad()
def moved(moves: Sequence[Move]) -> list[Any]:
    """Make the DTensors without the entries that go; every rank of their meshes must call it with the same moves."""
    locals_ = compacted(
        [
            (local_part(each.tensor), {dim: at for dim, at in each.keep.items() if all(dim != d for _, d in each.rows)})
            for each in moves
        ]
    )
    ways: dict[tuple[int, int], _Way] = {}
    for stage in range(max((len(each.rows) for each in moves), default=0)):
        for batch in _batches([(n, each) for n, each in enumerate(moves) if len(each.rows) > stage], stage):
            parcels = {n: _parcel(locals_[n], each, each.rows[stage], ways, n) for n, each in batch}
            _, first = batch[0]
            mesh_dim = first.rows[stage][0]
            _exchange(list(parcels.values()), first.tensor.device_mesh.get_group(mesh_dim), first.tensor.device_mesh)
            for n, each in batch:
                dim, rows = each.rows[stage][1], parcels[n].arrived()
                locals_[n] = rows.to(locals_[n].device).movedim(0, dim).contiguous()
    return [whole_of(local, each.tensor, each.shape) for local, each in zip(locals_, moves, strict=True)]


def whole_of(local: Tensor, like: Any, shape: Sequence[int] | None = None) -> Any:
    """Make the DTensor, placed as another one, of which this rank has a part."""
    from torch.distributed.tensor import DTensor

    size = torch.Size(like.shape if shape is None else shape)
    strides = (1, *accumulate((max(1, n) for n in reversed(size[1:])), lambda a, b: a * b)) if size else ()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=size, stride=tuple(reversed(strides))
    )


def gathered(tensor: Any) -> Tensor:
    """Return all of a sharded tensor on every rank, which must all call it; another tensor itself."""
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    device = tensor.device
    if device.type != tensor.device_mesh.device_type and device.type != "meta":  # offloaded
        tensor = tensor.detach().to(tensor.device_mesh.device_type)
    whole: Tensor = tensor.detach().full_tensor()
    return whole.to(device)


def mean_squares_along(tensor: Any, dim: int) -> Tensor:
    """Return the mean square of each slice along a dim of a sharded tensor, of those slices that are here.

    The ranks that have parts of the same slices must all call it.
    """
    local = local_part(tensor)
    squares = (local.double() if local.dtype == torch.float64 else local.float()).square()
    sums = squares.movedim(dim, 0).flatten(1).sum(1)
    for other, shards in (shards_of(tensor) or {}).items():
        for mesh_dim in (mesh_dim for mesh_dim, _ in shards if other != dim):
            (sums,) = all_reduce_sum(sums, group=tensor.device_mesh.get_group(mesh_dim))
    mean: Tensor = sums / max(1, tensor.numel() // tensor.shape[dim])
    return mean


def split(whole: Tensor, like: Any) -> Any:
    """Place a tensor that every rank has as another one is; nothing moves."""
    local = whole
    for dim, shards in (shards_of(like) or {}).items():
        here = positions_here(whole.shape[dim], like.device_mesh, shards)
        local = local.index_select(dim, here.to(local.device))
    return whole_of(local.contiguous(), like, whole.shape).to(like.device)


def data_of(tensor: Any) -> Any:
    """Return a DTensor with the memory of a sharded parameter, which stays as it is when the parameter gets other."""
    return whole_of(local_part(tensor), tensor)


def other_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return a dtype for the moment between the old data of a parameter and its new data.

    A graph that is still alive (a loss someone holds) keeps the parameter's gradient accumulator, which knows the old
    sizes. torch makes a new one when the dtype changes.
    """
    return torch.float16 if dtype != torch.float16 else torch.float32


def put(tensor: Any, new: Any, grad: Tensor | None) -> None:
    """Give a sharded tensor other data and another gradient; it stays the same object."""
    tensor.grad = None
    if tensor.requires_grad:
        tensor.data = whole_of(torch.empty_like(local_part(new), dtype=other_dtype(new.dtype)), new)
    tensor.data = new.detach()  # the sizes that it shows
    tensor._local_tensor, tensor._spec = new._local_tensor, new._spec
    tensor.grad = grad


def groups_of(tensors: Iterable[Any]) -> list[distributed.ProcessGroup]:
    """Collect the process groups of the device meshes of sharded tensors."""
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if is_sharded(tensor))
    groups = [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]
    return list(dict.fromkeys(groups))


def _parcel(local: Tensor, each: Move, row: tuple[int, int], ways: dict[tuple[int, int], _Way], number: int) -> _Parcel:
    """Lay out what this rank sends of a tensor: its rows that stay, by rank."""
    mesh_dim, dim = row
    if (number, dim) not in ways:  # the first step
        ways[number, dim] = way = _Way.of(each.tensor, dim, each.keep[dim])
        local = local.index_select(dim, way.index.to(local.device))
    order, sends, gets, arrives = ways[number, dim].step(mesh_dim, each.tensor.device_mesh.size(mesh_dim))
    return _Parcel(_ordered(local.movedim(dim, 0), order).contiguous(), sends, gets, arrives)


def _ordered(rows: Tensor, order: Tensor) -> Tensor:
    """Return rows in an order, the same tensor where they are in it."""
    if torch.equal(order, torch.arange(len(order))):
        return rows
    return rows.index_select(0, order.to(rows.device))


def _exchange(parcels: list[_Parcel], group: distributed.ProcessGroup, mesh: Any) -> None:
    """Send the rows of several tensors to their new owners, as bytes, in one all-to-all."""
    if parcels[0].rows.is_meta:
        for each in parcels:
            each.got = [each.rows.new_empty(sum(each.gets), *each.rows.shape[1:])]
        return
    device = parcels[0].rows.device
    if device.type != mesh.device_type:  # offloaded: the group speaks for another device
        device = torch.device(mesh.device_type, torch.accelerator.current_device_index())
    pieces: list[Tensor] = []
    widths = [_width(each.rows) for each in parcels]
    sent, got = [0] * len(parcels[0].sends), [0] * len(parcels[0].sends)
    starts = [[0, *accumulate(each.sends)] for each in parcels]
    for rank in range(len(sent)):
        for each, start, width in zip(parcels, starts, widths, strict=True):
            if each.sends[rank]:
                pieces.append(each.rows[start[rank] : start[rank + 1]].reshape(-1).view(torch.uint8))
                sent[rank] += each.sends[rank] * width
            got[rank] += each.gets[rank] * width
    out = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)
    into = torch.empty(sum(got), dtype=torch.uint8, device=device)
    try:
        distributed.all_to_all_single(into, out.to(device), got, sent, group=group)
    except RuntimeError as error:
        raise RanksError(
            f"shrink: another rank does not answer while rows move ({error}); the model is unchanged on this one. It "
            "has failed, or runs other code: see its own output"
        ) from error
    begin = 0
    for rank in range(len(got)):
        for each, width in zip(parcels, widths, strict=True):
            if each.gets[rank]:
                end = begin + each.gets[rank] * width
                # A view as another type must begin at a multiple of its size, so the bytes are copied.
                part = into[begin:end].clone().view(each.rows.dtype)
                each.got.append(part.reshape(each.gets[rank], *each.rows.shape[1:]))
                begin = end


def _width(rows: Tensor) -> int:
    """Return the bytes of a row."""
    count = 1
    for size in rows.shape[1:]:
        count *= size
    return count * rows.element_size()


def _batches(moves: list[tuple[int, Move]], stage: int) -> Iterator[list[tuple[int, Move]]]:
    """Group moves of the same process group and device, so that each batch has a bounded number of bytes.

    The sizes are those of the whole tensors, so that all ranks make the same batches.
    """
    held: dict[Any, tuple[list[tuple[int, Move]], int]] = {}
    for n, each in moves:
        tensor, mesh_dim = each.tensor, each.rows[stage][0]
        key = (tensor.device_mesh, mesh_dim, tensor.device, local_part(tensor).is_meta)
        size = tensor.numel() * tensor.element_size() // max(1, tensor.device_mesh.size())
        batch, total = held.get(key, ([], 0))
        if batch and total + size > MOST_BYTES:
            yield batch
            batch, total = [], 0
        held[key] = ([*batch, (n, each)], total + size)
    for batch, _ in held.values():
        yield batch
