"""Models that are spread over devices: refused before anything changes, from the wrapper and from inside."""

import pytest
import torch
import torch.distributed as dist
from crew import Crew, said
from torch import nn

import ecospa_fx
from ecospa_fx.errors import WrapperError
from ecospa_fx.ranks import wrappers
from ecospa_fx.ranks.members import ranks_of
from ecospa_fx.ranks.wrappers import check_wrappers

X = torch.linspace(-1, 1, 24).reshape(4, 6)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def compiled():
    torch.manual_seed(0)
    return ecospa_fx.compile(Blocks(), example_inputs=(X,))


def fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = compiled()
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    return model, wrapped


def around_shards():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = compiled()
    wrapped = nn.parallel.DistributedDataParallel(model)
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"up": ColwiseParallel()})
    return model, wrapped


def a_part():
    model = ecospa_fx.compile(Blocks(), example_inputs=(X,))
    model.up = nn.parallel.DistributedDataParallel(model.up)
    return model, model


COUPLING = "ffn"
CASES = [fsdp1, around_shards, a_part]


@pytest.fixture(scope="module")
def two():
    with Crew(2) as crew:
        yield crew


def refused(rank, world):
    texts = {}
    for case in CASES:
        model, wrapped = case()
        texts[case.__name__] = [
            said(ecospa_fx.shrink, model, {COUPLING: torch.arange(4)}),
            said(ecospa_fx.EcoSpaTrainer, model, torch.optim.SGD(model.parameters(), lr=0.1)),
            said(ecospa_fx.EcoSpaTrainer, wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1)),
        ]
        assert not ecospa_fx.plan(model).kept
        del wrapped
    model = compiled()  # not wrapped, beside all of them: gradients are the user's own business
    ecospa_fx.shrink(model, {ecospa_fx.couplings(model)[0]: torch.arange(4 + rank)})
    return texts, ecospa_fx.couplings(model)[0].size


def test_two_ranks_refuse_wrappers_that_cannot_follow_before_anything_changes(two):
    (first, size), (second, other) = two.run(refused)
    assert first == second and (size, other) == (4, 5)
    assert all(text.startswith("WrapperError: ") for texts in first.values() for text in texts)
    assert set(first["fsdp1"]) == {
        "WrapperError: Blocks is wrapped in FullyShardedDataParallel, whose flat parameters would keep their sizes "
        "when the model shrinks: gradients would no longer be reduced, and the ranks drift apart. Use "
        "DistributedDataParallel or fully_shard, or train in one process on one device; or shrink the plain model "
        "first, and wrap it afterwards"
    }
    assert set(first["around_shards"]) == {
        "WrapperError: `up.weight` of Blocks is sharded (a DTensor), and Blocks is wrapped in DistributedDataParallel, "
        "which takes whole parameters: use fully_shard on the mesh of the data in its place"
    }
    assert set(first["a_part"]) == {
        "WrapperError: `up` of Blocks is wrapped in DistributedDataParallel, and the model around it is to shrink: "
        "wrap the whole model, DistributedDataParallel(model), and not a part of it"
    }


def made_before(rank, world):
    """A wrapper that nobody has taken note of is found when the model in it is compiled, a dead one is left alone."""
    torch.manual_seed(0)
    model = Blocks()
    wrapper = nn.parallel.DistributedDataParallel(model)
    wrappers._NOTED.clear()
    wrappers._SEARCHED.clear()
    ecospa_fx.compile(wrapper, example_inputs=(X,))
    found = wrappers.wrappers_around(model)
    assert found == [wrapper]
    reducer = wrapper.reducer
    ecospa_fx.shrink(wrapper, {COUPLING: torch.arange(4)})
    return wrapper.reducer is not reducer, len(ranks_of(model).groups)


def test_wrappers_that_were_made_before_the_library_was_imported_are_found(two):
    assert two.run(made_before) == [(True, 1)] * 2


def of_a_group_that_has_ended(rank, world):
    model = compiled()
    group = dist.new_group([0, 1])
    wrapper = nn.parallel.DistributedDataParallel(model, process_group=group)
    before = len(ranks_of(model).groups)
    dist.destroy_process_group(group)
    ecospa_fx.shrink(model, {COUPLING: torch.arange(4 + rank)})  # on its own
    return before, len(ranks_of(wrapper).groups), ecospa_fx.couplings(model)[0].size


def test_a_wrapper_whose_group_has_ended_decides_nothing(two):
    assert two.run(of_a_group_that_has_ended) == [(1, 0, 4), (1, 0, 5)]


def test_data_parallel_over_several_devices_is_refused_and_over_one_is_not():
    model = compiled()
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0]
    check_wrappers(wrapped)
    wrapped.device_ids = [0, 1]
    with pytest.raises(WrapperError, match="Blocks is wrapped in DataParallel, whose replicas would keep their sizes"):
        check_wrappers(wrapped)


def test_an_engine_of_deepspeed_is_known_by_its_name():
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    engine.module = compiled()
    with pytest.raises(WrapperError, match="Blocks is wrapped in DeepSpeedEngine, whose flat parameters"):
        check_wrappers(engine)
