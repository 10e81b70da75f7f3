"""FSDP2 and compile in every order, with calls of new kinds in between; what cannot work says which order does."""

import pytest
import torch
from crew import Crew, said
from test_fsdp2 import sharded, whole
from tiny import SCHEDULE, batch, compiled, loss_of, made, share, trained
from torch.distributed.tensor import DTensor

import ecospa_fx


@pytest.fixture(scope="module")
def two():
    with Crew(2) as crew:
        yield crew


def trains(rank, world, order, execution="graph", regions="blocks", blocks=True, kind="glu"):
    """Train for 10 steps with an eval forward in between, a signature that was not captured before."""
    torch.manual_seed(0)
    lone = compiled(made(kind), kind, execution=execution, regions=regions)
    its = torch.optim.AdamW(lone.parameters(), lr=1e-2)
    trained(lone, its, ecospa_fx.EcoSpaTrainer(lone, its, **SCHEDULE), kind, evals=(1, 4))

    def part(given):
        return share(given, rank, world)

    model = made(kind)
    options = {"execution": execution, "regions": regions}
    if order == "capture, shard":
        compiled(model, kind, part, **options)
    elif order == "compile, shard, capture":
        ecospa_fx.compile(model, **options)
    sharded(model, world, blocks)
    if order == "shard, capture":
        compiled(model, kind, part, **options)
    elif order == "shard, compile, capture":
        ecospa_fx.compile(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, **SCHEDULE)
    trained(model, optimizer, trainer, kind, part, evals=(1, 4))
    model.reshard()
    assert len(trainer.history) == 2 and all(isinstance(p, DTensor) for p in model.parameters())
    return max(float((whole(a) - b).abs().max()) for a, b in zip(model.parameters(), lone.parameters(), strict=True))


ORDERS = ["capture, shard", "compile, shard, capture", "shard, capture", "shard, compile, capture"]


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_compile_and_fully_shard(two, order):
    for execution, regions, blocks in (("graph", "blocks", True), ("graph", "root", False), ("module", "blocks", True)):
        assert max(two.run(trains, order, execution, regions, blocks)) < 1e-12


def root_of_blocks(rank, world):
    """Refuse one region for all of the model with shards per block, at the capture or at the first call."""
    part = share(batch("glu", 0), rank, world)
    found = []
    for first in ("capture", "shard"):
        model = made("glu")
        if first == "capture":
            compiled(model, "glu", lambda _: part, regions="root")
            sharded(model, world)
            found.append(said(loss_of, model, part))
            found.append(said(ecospa_fx.shrink, model, {ecospa_fx.couplings(model)[0]: torch.arange(3)}))
        else:
            sharded(model, world)
            found.append(said(compiled, model, "glu", lambda _: part, regions="root"))
            found.append(said(loss_of, model, part))  # it runs as it was
    return found


def test_one_region_with_shards_per_block_is_refused(two):
    text = (
        "WrapperError: the FSDPGLU is one region, which runs as one graph, and fully_shard gathers the weights of "
        "`blocks.0` in it for calls of that alone. Compile with regions='blocks' and apply fully_shard to the same "
        "blocks and to the model; or to the model only; or use execution='module'"
    )
    for found in two.run(root_of_blocks):
        assert found == [text, text, text, None]


def on_meta(rank, world):
    """Compile what no rank can hold, shard it, then give it memory and values."""
    with torch.device("meta"):
        model = made("glu")
    ecospa_fx.compile(model, example_kwargs={name: each.to("meta") for name, each in batch("glu", 0, size=6).items()})
    sharded(model, world)
    model.to_empty(device="cpu")
    lone = compiled(made("glu"), "glu")
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), lone.parameters(), strict=True):
            mine.to_local().copy_(theirs.chunk(world)[rank])
    found = []
    for each, part in ((model, lambda given: share(given, rank, world)), (lone, lambda given: given)):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        trained(each, optimizer, ecospa_fx.EcoSpaTrainer(each, optimizer, **SCHEDULE), "glu", part)
        found.append([whole(p.detach()) for p in each.parameters()])
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


def test_a_model_without_memory_is_compiled_then_sharded_then_filled(two):
    assert max(two.run(on_meta)) < 1e-12
