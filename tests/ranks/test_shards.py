"""Sharded tensors that lose entries: equal to cutting the whole tensor, and no rank sends more than it holds."""

import pytest
import torch
import torch.distributed as dist
from crew import Crew
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from ecospa_fx.ranks import shards
from ecospa_fx.ranks.placed import positions_here, shards_of
from ecospa_fx.ranks.shards import gathered, local_part, move, moved, put, split
from ecospa_fx.score.slices import SliceSums


def bytes_sent(function):
    """Return a result, and the bytes that this rank sends to others by all-to-all meanwhile, and in how many calls."""
    real, sent = dist.all_to_all_single, []

    def counted(out, given, out_sizes, sizes, group=None):
        sent.append(sum(sizes) - sizes[dist.get_rank(group)])
        return real(out, given, out_sizes, sizes, group=group)

    dist.all_to_all_single = counted
    try:
        return function(), sum(sent), len(sent)
    finally:
        dist.all_to_all_single = real


SHAPES = [
    ((40, 6), torch.float64, [Shard(0)]),
    ((7, 5, 3), torch.bfloat16, [Shard(0)]),
    ((6, 9), torch.float32, [Shard(1)]),
    ((13,), torch.int16, [Shard(0)]),
    ((2, 4), torch.float32, [Shard(0)]),
    ((5, 4), torch.float64, [Replicate()]),
]


def cut_at_random(rank, world):
    mesh, generator = init_device_mesh("cpu", (world,)), torch.Generator().manual_seed(0)
    for trial in range(12):
        wholes, moves, expected = [], [], []
        for shape, dtype, placements in SHAPES:
            whole = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype) + trial
            dims = [dim for dim in range(len(shape)) if torch.rand((), generator=generator) < 0.7]
            keep = {}
            for dim in dims:
                count = int(torch.randint(1, shape[dim] + 1, (), generator=generator))
                keep[dim] = torch.randperm(shape[dim], generator=generator)[:count].sort().values
            wholes.append(whole)
            moves.append(move("w", distribute_tensor(whole, mesh, placements, src_data_rank=None), keep))
            for dim, index in keep.items():
                whole = whole.index_select(dim, index)
            expected.append(whole)
        held = sum(local_part(each.tensor).nbytes for each in moves)
        results, sent, calls = bytes_sent(lambda moves=moves: moved(moves))
        assert sent <= held and calls <= 1, (sent, held, calls)
        for each, result, whole in zip(moves, results, expected, strict=True):
            assert result.placements == each.tensor.placements and result.shape == whole.shape
            same = distribute_tensor(whole, mesh, each.tensor.placements, src_data_rank=None)
            assert torch.equal(local_part(result), local_part(same)) and result.stride() == same.stride()


@pytest.fixture(scope="module")
def three():
    with Crew(3) as crew:
        yield crew


def test_a_cut_of_shards_is_the_shards_of_a_cut(three):
    three.run(cut_at_random)


def bounded(rank, world):
    """Cut as many bytes as two batches hold."""
    mesh, before = init_device_mesh("cpu", (world,)), shards.MOST_BYTES
    whole = torch.arange(120.0).reshape(30, 4)
    keep = {0: torch.arange(0, 30, 2)}
    moves = [move("w", distribute_tensor(whole, mesh, [Shard(0)]), keep) for _ in range(4)]
    shards.MOST_BYTES = 2 * whole.nbytes // world
    try:
        results, _, calls = bytes_sent(lambda: moved(moves))
    finally:
        shards.MOST_BYTES = before
    assert calls == 2 and all(torch.equal(each.full_tensor(), whole[::2]) for each in results)


def test_so_many_bytes_go_at_once(three):
    three.run(bounded)


def over_a_grid(rank, world):
    """Cut a tensor whose rows one dim of the mesh shards and whose columns the other; with replicas; both the rows."""
    mesh = init_device_mesh("cpu", (2, 2))
    whole, rows, columns = torch.arange(88.0).reshape(8, 11), torch.tensor([0, 3, 4, 6]), torch.tensor([1, 2, 10])
    placed = [Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(1), Replicate()], [Shard(0), Shard(0)]
    for placements in (*placed, [_StridedShard(0, split_factor=2), Shard(0)], [_StridedShard(0, split_factor=4)] * 2):
        before = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        (result,) = moved([move("w", before, {0: rows, 1: columns})])
        after = distribute_tensor(whole[rows][:, columns], mesh, placements, src_data_rank=None)
        assert torch.equal(local_part(result), local_part(after)) and list(result.placements) == list(placements)
    summands = DTensor.from_local(whole * rank, mesh, [Partial(), Partial()], run_check=False)
    (result,) = moved([move("w", summands, {0: rows})])
    assert torch.equal(result.full_tensor(), 6 * whole[rows])


def positions_by_hand(rank, world):
    """Compare the positions that a rank holds with the entries that torch gives it, in sizes that it splits evenly."""
    mesh = init_device_mesh("cpu", (2, 2))
    for placements in ([Shard(0), Shard(0)], [_StridedShard(0, split_factor=2), Shard(0)], [Replicate(), Shard(0)]):
        for size in (4, 8, 14, 10):
            given = distribute_tensor(torch.arange(size), mesh, placements, src_data_rank=None)
            assert positions_here(size, mesh, shards_of(given)[0]).tolist() == given.to_local().tolist()


def sums_of_runs(rank, world):
    """Sum up slices of a tensor of which each rank has several runs, along each dim."""
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for placements in ([_StridedShard(0, split_factor=3), Replicate()], [_StridedShard(0, split_factor=2), Shard(1)]):
        sharded = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        sums = SliceSums({"w": sharded}, {"w": (0, 1)}, weighted=True)
        sums.add({"w": sharded}, {"w": 2 * sharded})
        found = sums.reduced()
        for dim in (0, 1):
            torch.testing.assert_close(found["w", dim], (2 * whole * whole).square().sum(1 - dim), rtol=0, atol=1e-12)


def test_a_mesh_of_two_dims():
    with Crew(4) as four:
        four.run(positions_by_hand)
        four.run(over_a_grid)
        four.run(sums_of_runs)


def put_and_back(rank, world):
    """Put other data into a parameter, and gather it and place it again."""
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.arange(40.0).reshape(8, 5)
    parameter = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    parameter.mark = "mine"
    seen = id(parameter)
    small = distribute_tensor(whole[:5, 1:], mesh, [Shard(0)])
    put(parameter, small, torch.ones_like(small))
    assert id(parameter) == seen and parameter.mark == "mine" and parameter.requires_grad and parameter.is_leaf
    assert parameter.shape == (5, 4) and torch.equal(gathered(parameter.detach()), whole[:5, 1:])
    assert torch.equal(gathered(parameter.grad), torch.ones(5, 4))
    again = split(gathered(parameter), parameter)
    assert torch.equal(local_part(again), local_part(parameter)) and again.placements == parameter.placements


def test_a_parameter_gets_other_data_and_stays_the_same_object(three):
    three.run(put_and_back)
