"""FSDP2: 10 steps of AdamW with 2 shrinks on many ranks, beside one process on the whole batch, in float64."""

import pytest
import torch
from crew import Crew
from tiny import KINDS, SCHEDULE, batch, blocks_of, compiled, loss_of, made, share, trained
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call

import ecospa_fx

LAYOUTS = {
    "blocks": (2, {}),
    "root": (2, {"blocks": False}),
    "root of blocks": (2, {"blocks": False, "regions": "blocks"}),
    "hsdp": (4, {"replicate": 2}),
    "uneven": (3, {}),
    "offload": (2, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    "kept gathered": (2, {"reshard_after_forward": False}),
    "mixed": (2, {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float64)}),
}
"""Layout -> the number of ranks, and the arguments of `sharded`."""


@pytest.fixture(scope="module")
def crews():
    """A crew of a size, one at a time: cases of one size come after each other."""
    held = [Crew(2)]

    def of(world):
        if held[0].world != world:
            held[0].stop()
            held[0] = Crew(world)
        return held[0]

    yield of
    held[0].stop()


def sharded(model, world, blocks=True, replicate=1, **options):
    names = ("replicas", "shards")
    mesh = init_device_mesh("cpu", (world,))
    if replicate > 1:
        mesh = init_device_mesh("cpu", (replicate, world // replicate), mesh_dim_names=names)
    for block in blocks_of(model) if blocks else ():
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def alone(kind, execution, regions, world, mixed, evals=(), make=torch.optim.AdamW, **settings):
    """Train in one process; with mixed precision by casts in plain sight, part by part.

    Part by part too beside a number of ranks that is no power of two: LLaMA's norms are float32 in a model of float64,
    and round gradients of a third of a batch otherwise than those of the whole.
    """
    model = compiled(made(kind), kind, execution=execution, regions=regions)
    optimizer = make(model.parameters(), lr=1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, **{**SCHEDULE, **settings})
    if mixed is None and world.bit_count() == 1:
        trained(model, optimizer, trainer, kind, evals=evals)
        return model, optimizer, trainer
    low = mixed.param_dtype if mixed is not None else next(model.parameters()).dtype
    for step in range(10):
        for rank in range(world):
            inputs = share(batch(kind, step), rank, world)
            inputs = {n: v.to(low) if v.is_floating_point() else v for n, v in inputs.items()}
            cast = {n: p.to(low) for n, p in model.named_parameters()}
            loss_of(lambda cast=cast, **given: functional_call(model, cast, (), given), inputs).backward()
        for p in model.parameters():
            p.grad /= world
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    return model, optimizer, trainer


def beside(rank, world, kind, execution, layout, evals=(), settings=None, optimizer=torch.optim.AdamW):
    """Train sharded, and in one process; how far weights and state are apart, and what is not as it should be."""
    layout, settings, make = dict(LAYOUTS[layout][1]), settings or {}, optimizer
    regions = layout.pop("regions", "blocks" if layout.get("blocks", True) else "root")
    lone, its_optimizer, its_trainer = alone(
        kind, execution, regions, world, layout.get("mp_policy"), evals, make, **settings
    )

    def part(given):
        return share(given, rank, world)

    model = sharded(compiled(made(kind), kind, part, execution=execution, regions=regions), world, **layout)
    objects = list(model.parameters())
    optimizer = make(model.parameters(), lr=1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, **{**SCHEDULE, **settings})
    trained(model, optimizer, trainer, kind, part, evals=evals)

    wrong = []
    shrinks = [[entry["step"] for entry in each.history] for each in (trainer, its_trainer)]
    wrong += [f"shrinks {shrinks}"] if shrinks[0] != shrinks[1] or len(shrinks[0]) != 2 else []
    plans = [ecospa_fx.plan(each).kept for each in (model, lone)]
    if plans[0].keys() != plans[1].keys() or any(not torch.equal(plans[0][k], plans[1][k]) for k in plans[0]):
        return float("inf"), [*wrong, "another plan"]
    model.reshard()
    if any(a is not b for a, b in zip(objects, model.parameters(), strict=True)):
        wrong.append("other Parameters")
    apart = 0.0
    for (name, mine), theirs in zip(model.named_parameters(), lone.parameters(), strict=True):
        pairs = [("weight", mine, theirs)]
        for key, value in its_optimizer.state[theirs].items():
            pairs.append((key, optimizer.state[mine][key], value))
        for key, a, b in pairs:
            if b.ndim and (not isinstance(a, DTensor) or a.placements != mine.placements):
                wrong.append(f"{name}: {key} is no DTensor like it")
            if b.ndim and layout.get("offload_policy") and a.to_local().device.type != "cpu":
                wrong.append(f"{name}: {key} is not offloaded")
            a, b = whole(a), b.detach()
            apart = max(apart, float((a - b).abs().max()) if a.shape == b.shape else float("inf"))
    return apart, wrong


QUICK = [
    ("glu", "graph", "blocks"),
    ("glu", "module", "hsdp"),
    ("glu", "graph", "uneven"),
    ("glu", "graph", "root"),
    ("glu", "graph", "offload"),
    ("glu", "module", "mixed"),
    ("llama", "graph", "blocks"),
    ("gpt2", "module", "uneven"),
    ("gpt2", "graph", "root of blocks"),
    ("vit", "module", "kept gathered"),
]
ALL = [(k, e, layout) for layout in LAYOUTS for k in KINDS for e in ("graph", "module")]
for cases in (QUICK, ALL):
    cases.sort(key=lambda case: LAYOUTS[case[2]][0])


def check(crews, case, *more):
    world = LAYOUTS[case[2]][0]
    for apart, wrong in crews(world).run(beside, *case, *more):
        assert not wrong and apart < 1e-12, (apart, wrong)


@pytest.mark.parametrize("case", QUICK, ids=" ".join)
def test_many_ranks_train_as_one_process(crews, case):
    check(crews, case)


@pytest.mark.sweep
@pytest.mark.parametrize("case", [case for case in ALL if case not in QUICK], ids=" ".join)
def test_every_model_in_every_layout(crews, case):
    check(crews, case)
