"""Models that are spread over devices: refused before anything changes, from the wrapper and from inside."""

import sys

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import ecospa_fx
from ecospa_fx.errors import WrapperError
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


def ddp():
    model = compiled()
    return model, nn.parallel.DistributedDataParallel(model)


def ddp_around_more():
    model = compiled()
    whole = nn.Sequential(nn.Linear(6, 6), model)
    return model, nn.parallel.DistributedDataParallel(whole)


def fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = compiled()
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    return model, wrapped


def tensor_parallel():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = compiled()
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"up": ColwiseParallel()})
    return model, model


COUPLING = "ffn:10"
CASES = [ddp, ddp_around_more, fsdp1, tensor_parallel]


def _rank(rank, file, results):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for case in CASES:
        model, wrapped = case()
        attempts = [
            lambda m=model: ecospa_fx.shrink(m, {COUPLING: torch.arange(4)}),
            lambda m=model: ecospa_fx.EcoSpaTrainer(m, torch.optim.SGD(m.parameters(), lr=0.1)),
            lambda w=wrapped: ecospa_fx.EcoSpaTrainer(w, torch.optim.SGD(w.parameters(), lr=0.1)),
        ]
        for attempt in attempts:
            try:
                attempt()
            except Exception as error:
                results.put((case.__name__, rank, type(error).__name__, str(error)))
            else:
                results.put((case.__name__, rank, None, "nothing raised"))
        if ecospa_fx.plan(model).kept:
            results.put((case.__name__, rank, None, "it has shrunk"))
    del wrapped
    model = compiled()  # not wrapped, beside all of them: gradients are the user's own business
    ecospa_fx.shrink(model, {ecospa_fx.couplings(model)[0]: torch.arange(4)})
    results.put(("plain", rank, "shrunk", str(ecospa_fx.couplings(model)[0].size)))
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over files")
def test_two_ranks_refuse_every_wrapper_before_anything_changes(tmp_path):
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=_rank, args=(rank, tmp_path / "file", results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=200)
    said = set()
    while not results.empty():
        said.add(results.get())
    assert [worker.exitcode for worker in workers] == [0, 0]
    texts = {name: {text for case, _, _, text in said if case == name} for name in [c.__name__ for c in CASES]}
    assert all(kind == "WrapperError" for case, _, kind, _ in said if case != "plain"), said
    assert {s for s in said if s[0] == "plain"} == {("plain", 0, "shrunk", "4"), ("plain", 1, "shrunk", "4")}
    (text,) = texts["ddp"]
    assert text == (
        "Blocks is wrapped in DistributedDataParallel, whose gradient buckets would keep their sizes when the model "
        "shrinks: gradients would no longer be reduced, and the ranks drift apart. Train without it, in one process on "
        "one device; or shrink the plain model first, and wrap it afterwards"
    )
    assert any(t.startswith("Blocks is wrapped in DistributedDataParallel") for t in texts["ddp_around_more"])
    assert all("is wrapped in FullyShardedDataParallel, whose flat parameters" in t for t in texts["fsdp1"])
    assert all(t.startswith("`up.weight` of Blocks is sharded (a DTensor)") for t in texts["tensor_parallel"])


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
