"""Tensor parallelism by hand: entries that move, sizes that ranks share out, saves; and what it refuses, in words."""

import functools
import os
import warnings

import pytest
import torch
from crew import Crew, said
from test_tensor_parallel import compiled, inputs, make, parallel, trained, whole
from tiny import SCHEDULE, blocks_of, loss_of, made, share
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

import ecospa_fx


@pytest.fixture(scope="module")
def two():
    with Crew(2) as crew:
        yield crew


def mesh_of(world):
    return init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))


def by_hand(rank, world):
    """Keep entries that lie mostly on one rank, so that some move; and sizes that ranks cannot share out."""
    model, lone = (compiled(make("glu"), "glu", "graph") for _ in range(2))
    parallel(model, mesh_of(world))
    coupling = ecospa_fx.couplings(model)[0]
    refused = said(ecospa_fx.shrink, model, {coupling: torch.arange(39)})
    keep = {coupling.name: torch.cat([torch.arange(1, 4), torch.arange(17, 40)])}
    for each in (model, lone):
        ecospa_fx.shrink(each, keep)
    losses = [loss_of(each, inputs("glu", 3)) for each in (model, lone)]
    for each in losses:
        each.backward()
    pairs = [(a.grad, b.grad) for a, b in zip(model.parameters(), lone.parameters(), strict=True)]
    apart = max(float((whole(a) - b).abs().max()) for a, b in pairs)
    block = blocks_of(model)[0]
    shapes = [tuple(each.weight.to_local().shape) for each in (block.gate, block.down)]
    with_graph = ecospa_fx.verify(model, example_kwargs=inputs("glu", 3))
    assert isinstance(block.gate.weight, DTensor)
    # Sizes come out even, without a word of the user's; so does the reason where no size is.
    sizes = {c.name: c.size for c in ecospa_fx.couplings(model)}
    low = said(ecospa_fx.EcoSpaTrainer, model, torch.optim.AdamW(model.parameters()), **{**SCHEDULE, "target": 0.01})
    return refused, apart, abs((losses[0] - losses[1]).item()), shapes, with_graph.ok, coupling.parts, sizes, low


def test_entries_move_between_ranks_and_sizes_are_multiples_of_them(two):
    for refused, apart, loss, shapes, verified, parts, sizes, low in two.run(by_hand):
        assert refused == (
            "ShrinkError: cannot shrink `blocks.0.glu`: 2 ranks share its entries out by tensor parallelism, and 39 "
            "would stay; keep a multiple of 2"
        )
        assert apart < 1e-13 and loss < 1e-13 and verified and parts == 2
        assert shapes == [(13, 12), (12, 13)] and sizes == {"blocks.0.glu": 26, "blocks.1.glu": 40}
        assert "2 couplings that 2 ranks share out" in low


def sequences(model, mesh):
    """Shard norms along the sequence, as is usual beside the rest."""
    for block in blocks_of(model):
        plan = {
            "norm": SequenceParallel(use_local_output=True),
            "gate": ColwiseParallel(input_layouts=Shard(1)),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(block, mesh, plan)
        halves = {"input_layouts": (Replicate(),), "desired_input_layouts": (Shard(1),), "use_local_output": True}
        parallelize_module(block, mesh, PrepareModuleInput(**halves))
        parallelize_module(
            block, mesh, PrepareModuleOutput(output_layouts=(Shard(1),), desired_output_layouts=(Replicate(),))
        )
    return model


def along_sequences(rank, world):
    model, lone = (compiled(make("glu"), "glu", "module") for _ in range(2))
    sequences(model, mesh_of(world))
    found = []
    for each in (model, lone):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2, foreach=False)
        trainer = ecospa_fx.EcoSpaTrainer(each, optimizer, round_to=2, **SCHEDULE)
        trained(each, optimizer, trainer, "glu")
        found.append([whole(p) for p in each.parameters()])
        assert len(trainer.history) == 2
    apart = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    model = sequences(compiled(make("glu"), "glu", "graph"), mesh_of(world))
    plain = compiled(make("glu"), "glu", "graph")
    runs = loss_of(model, inputs("glu", 0)) - loss_of(plain, inputs("glu", 0))
    return apart, abs(runs.item()), said(ecospa_fx.shrink, model, {ecospa_fx.couplings(model)[0]: torch.arange(20)})


def test_sequence_parallelism_goes_with_the_models_own_python(two):
    for apart, runs, refused in two.run(along_sequences):
        assert apart < 1e-12 and runs < 1e-12
        assert refused == (
            "WrapperError: `blocks.0.norm` (LayerNorm) is parallel over ranks, and region `blocks.0` runs as one "
            "graph, which calls nn.Linear alone as a module: compile with execution='module', or leave it out of the "
            "plan of parallelize_module"
        )


def layouts(rank, world):
    """Shard weights so that what they return is gathered, and take it whole."""
    return other_layouts(world)


def other_layouts(world, fast=False):
    model, lone = (compiled(make("glu"), "glu", "graph") for _ in range(2))
    whole_out, whole_in = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
    for block in blocks_of(model):
        parallelize_module(block, mesh_of(world), {"gate": whole_out, "up": whole_out, "down": whole_in})
    if fast:
        model = parallel(compiled(make("glu"), "glu", "graph"), mesh_of(world))
        for block in blocks_of(model):
            block.compile(backend="eager")
    keep = {c.name: torch.arange(3, 17) for c in ecospa_fx.couplings(lone)}
    found = []
    for cut in (False, True):
        for each in (model, lone):
            if cut:
                ecospa_fx.shrink(each, keep)
            for p in each.parameters():
                p.grad = None
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The .grad attribute")  # torch.compile reads it
                loss_of(each, inputs("glu", 3)).backward()
        pairs = [(whole(a.grad), b.grad) for a, b in zip(model.parameters(), lone.parameters(), strict=True)]
        found += [float((a - b).abs().max()) for a, b in pairs]
    return max(found)


class Packed(nn.Module):
    """A gated layer whose two projections are one weight."""

    def __init__(self, d=12, h=20):
        super().__init__()
        self.fused, self.down = nn.Linear(d, 2 * h, bias=False), nn.Linear(h, d)

    def forward(self, x):
        gate, up = self.fused(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def packed(rank, world, execution):
    """Shard a packed weight as transformers does: each rank has a run of each part."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    found = []
    for spread in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(Packed(), Packed()).double()
        x = torch.randn(6, 4, 12, dtype=torch.float64)
        ecospa_fx.compile(model, example_inputs=(x,), execution=execution, regions=["0", "1"])
        if spread:
            plan = {}
            for name, style in (("fused", "packed_colwise"), ("down", "rowwise")):
                for each in (f"{i}.{name}" for i in (0, 1)):
                    names = [f"{each}.{p}" for p, _ in model.get_submodule(each).named_parameters()]
                    plan |= dict.fromkeys([*names, each], style)
            apply_tensor_parallelism(model, mesh_of(world), plan)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        settings = {**SCHEDULE, "multiple_of": {"glu": 2}, "index_score": "taylor"}
        trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, **settings)
        for step in range(8):
            model(x + step).square().mean().backward()
            optimizer.step()
            trainer.step()
            optimizer.zero_grad()
        assert len(trainer.history) == 2
        found.append([whole(p) for p in model.parameters()])
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("execution", ["graph", "module"])
def test_packed_weights_are_shared_out_part_by_part(two, execution):
    assert max(two.run(packed, execution)) < 1e-12


def compiled_blocks(rank, world):
    """Compile each block with torch.compile."""
    return other_layouts(world, fast=True)


def test_what_is_returned_may_be_gathered(two):
    assert max(two.run(layouts)) < 1e-13


@pytest.mark.sweep
def test_blocks_go_through_torch_compile(two):
    assert max(two.run(compiled_blocks)) < 1e-13


def refusals(rank, world):
    mesh = mesh_of(world)
    model = parallel(compiled(make("tied"), "tied", "graph"), mesh, divide=True)
    divided = said(loss_of, model, inputs("tied", 0))
    model = compiled(make("tied"), "tied", "graph")
    loss_of(model, inputs("tied", 0))
    given = inputs("tied", 0)
    with context_parallel(mesh, buffers=list(given.values()), buffer_seq_dims=[1, 1]):
        attention = said(loss_of, model, given)
        first = said(loss_of, ecospa_fx.compile(make("tied")), given)
    assert first.startswith("WrapperError: Tied is called inside of context_parallel, which replaces the attention")
    model = parallel(compiled(make("glu"), "glu", "graph"), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    absorbs = said(ecospa_fx.EcoSpaTrainer, model, optimizer, absorb=True, **SCHEDULE)
    model = compiled(make("glu"), "glu", "graph")
    for block in blocks_of(model):
        plan = {name: ColwiseParallel(use_local_output=False) for name in ("gate", "up")}
        parallelize_module(block, mesh, {**plan, "down": RowwiseParallel()})
    before = [whole(p).clone() for p in model.parameters()]
    outputs = [said(ecospa_fx.shrink, model, {ecospa_fx.couplings(model)[0]: torch.arange(20)})]
    runs = loss_of(model, inputs("glu", 0)).isfinite().item()  # by its own Python
    outputs.append(said(ecospa_fx.shrink, model, {ecospa_fx.couplings(model)[0]: torch.arange(20)}))
    assert runs and all(torch.equal(a, whole(b)) for a, b in zip(before, model.parameters(), strict=True))
    return divided, attention, absorbs, outputs


def test_refusals_name_the_way_out(two):
    for divided, attention, absorbs, outputs in two.run(refusals):
        assert outputs == 2 * [
            "WrapperError: `blocks.0.gate` takes or returns DTensors, or shards of a sequence, and the region around "
            "it runs as one graph of plain tensors: compile with execution='module', or use layouts in which tensors "
            "are local and whole, or shared out along the last dim"
        ]
        assert divided == (
            "WrapperError: region `blocks.0` runs as generated code, which computes this rank's part by itself, and "
            "`heads` is 2 and was 4: leave such numbers as they were when the model was compiled, or use "
            "execution='module'"
        )
        assert attention == (
            "WrapperError: region `blocks.0` is called inside of context_parallel, which replaces the attention of "
            "torch, and generated code calls the operator behind that: each rank would attend to its part of a "
            "sequence alone. Shard batches with fully_shard, or weights with parallelize_module"
        )
        assert absorbs == (
            "TargetError: absorb=True and rotate=True read all inputs of a weight, and by tensor parallelism each rank "
            "has a part of them; use absorb=False and rotate=False"
        )


def verified(rank, world):
    """Compare a model whose Python holds the heads of its rank; and a score that looks inside of graphs."""
    model = parallel(compiled(make("tied"), "tied", "module"), mesh_of(world), divide=True)
    found = [ecospa_fx.verify(model, example_kwargs={"input_ids": inputs("tied", 0)["input_ids"]}).ok]
    assert [block.heads for block in model.blocks] == [2, 2]
    plans, weights = [], []
    for how in (lambda each: parallel(each, mesh_of(world)), lambda each: each):
        each = how(compiled(make("tied"), "tied", "graph"))
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2, foreach=False)
        scores = {"score": "activation", "index_score": "taylor_positions", "multiple_of": {"heads": 2, "ffn": 2}}
        trainer = ecospa_fx.EcoSpaTrainer(each, optimizer, **scores, **SCHEDULE)
        trained(each, optimizer, trainer, "tied")
        plans.append({key: kept.tolist() for key, kept in ecospa_fx.plan(each).kept.items()})
        weights.append([whole(p) for p in each.parameters()])
    assert plans[0] == plans[1] and len(trainer.history) == 2
    return found, max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))


def test_the_judge_and_scores_inside_of_graphs(two):
    for found, apart in two.run(verified):
        assert found == [True] and apart < 1e-12


def over_a_grid(model, world):
    grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    parallel(model, grid["tp"])
    for block in blocks_of(model):
        fully_shard(block, mesh=grid["dp"])
    return fully_shard(model, mesh=grid["dp"]), grid


def begin(rank, world, directory):
    model, grid = over_a_grid(compiled(make("glu"), "glu", "graph"), world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, **SCHEDULE)
    trained(model, optimizer, trainer, "glu", lambda given: share(given, grid.get_local_rank("dp"), 2), steps=4)
    ecospa_fx.save(model, directory, optimizer=optimizer, trainer=trainer)
    return len(trainer.history)


def go_on(rank, world, directory):
    model = ecospa_fx.load(directory, functools.partial(made, "glu", seed=9))
    if world > 1:
        parallel(model, mesh_of(world))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, **SCHEDULE)
    ecospa_fx.resume(directory, model, optimizer=optimizer, trainer=trainer)
    trained(model, optimizer, trainer, "glu", steps=3, first=4)
    if world > 1:
        ecospa_fx.save(model, directory, optimizer=optimizer, trainer=trainer)
    return len(trainer.history), all_of(model, optimizer)


def all_of(model, optimizer):
    return [whole(each) for p in model.parameters() for each in (p, optimizer.state[p]["exp_avg_sq"])]


def back(rank, world, directory):
    """Go on over the grid; what no rank shared out before is sharded there."""
    model = ecospa_fx.load(directory, functools.partial(made, "glu", seed=9), device="meta")
    over_a_grid(model, world)
    model.to_empty(device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    ecospa_fx.resume(directory, model, optimizer=optimizer)
    return all_of(model, optimizer)


def test_saves_move_from_a_grid_to_two_ranks_to_one_and_back(two, tmp_path):
    directory = os.fspath(tmp_path / "run")
    with Crew(4) as four:
        assert four.run(begin, directory) == [1] * 4
        shrinks, tensors = two.run(go_on, directory)[0]
        again = four.run(back, directory)[0]
    lone = compiled(make("glu"), "glu", "graph")
    optimizer = torch.optim.AdamW(lone.parameters(), lr=1e-2, foreach=False)
    trainer = ecospa_fx.EcoSpaTrainer(lone, optimizer, round_to=2, **SCHEDULE)
    trained(lone, optimizer, trainer, "glu", steps=7)
    assert shrinks == len(trainer.history) == 2
    for mine, other in zip(tensors, all_of(lone, optimizer), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    alone = ecospa_fx.load(directory, functools.partial(made, "glu"))
    weights = [p.detach() for p in alone.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(tensors[::2], weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, again, strict=True))
