"""Tensor parallelism: 10 steps of AdamW with 2 shrinks on 2 ranks, beside one process, in float64."""

import pytest
import torch
from crew import Crew
from tiny import SCHEDULE, blocks_of, compiled, made, trained
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ecospa_fx

IN, OUT = ("gate", "up", "fc", "q", "k", "v", "gate_proj", "up_proj", "q_proj", "k_proj", "v_proj"), (
    "down", "proj", "o", "down_proj", "o_proj",
)  # fmt: skip


@pytest.fixture(scope="module")
def two():
    with Crew(2) as crew:
        yield crew


def parallel(model, mesh):
    """Shard the weights of each block by the names of its layers."""
    for block in blocks_of(model):
        names = [name for name, each in block.named_modules() if isinstance(each, torch.nn.Linear)]
        last = {name: name.rpartition(".")[2] for name in names}
        plan = {name: ColwiseParallel() for name in names if last[name] in IN}
        plan |= {name: RowwiseParallel() for name in names if last[name] in OUT}
        assert plan.keys() == set(names)
        parallelize_module(block, mesh, plan)
    return model


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def differences(mine, its, optimizer, theirs):
    """Return how far weights and state of AdamW are apart, and what is not placed as it should be."""
    wrong, apart = [], 0.0
    for (name, a), b in zip(mine.named_parameters(), its.parameters(), strict=True):
        for key, one, other in [("weight", a, b), *((k, optimizer.state[a][k], v) for k, v in theirs.state[b].items())]:
            if (
                other.ndim
                and isinstance(a, DTensor)
                and (not isinstance(one, DTensor) or one.placements != a.placements)
            ):
                wrong.append(f"{name}: {key} is no DTensor like it")
            one, other = whole(one), other.detach()
            apart = max(apart, float((one - other).abs().max()) if one.shape == other.shape else float("inf"))
    return apart, wrong


def same_plan(mine, its):
    plans = [ecospa_fx.plan(each).kept for each in (mine, its)]
    return plans[0].keys() == plans[1].keys() and all(torch.equal(plans[0][k], plans[1][k]) for k in plans[0])


def beside(rank, world, kind, execution, evals=(), regions="blocks", **settings):
    settings = {**SCHEDULE, **settings}
    model, lone = (compiled(made(kind), kind, execution=execution, regions=regions) for _ in range(2))
    parallel(model, init_device_mesh("cpu", (world,)))
    objects = list(model.parameters())
    optimizer, its = (torch.optim.AdamW(each.parameters(), lr=1e-2, foreach=False) for each in (model, lone))
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, **settings)
    limits = {c.kind: c.parts for c in ecospa_fx.couplings(model) if c.parts > 1}
    settings["multiple_of"] = {**settings.get("multiple_of", {}), **limits}
    trained(model, optimizer, trainer, kind, evals=evals)
    other = ecospa_fx.EcoSpaTrainer(lone, its, **settings)
    trained(lone, its, other, kind, evals=evals)
    shrinks = [[entry["step"] for entry in each.history] for each in (trainer, other)]
    wrong = [f"shrinks {shrinks}"] if shrinks[0] != shrinks[1] or len(shrinks[0]) != 2 else []
    wrong += [] if all(a is b for a, b in zip(objects, model.parameters(), strict=True)) else ["other Parameters"]
    if not same_plan(model, lone):
        return float("inf"), [*wrong, "another plan"]
    apart, more = differences(model, lone, optimizer, its)
    return apart, [*wrong, *more]


@pytest.mark.parametrize("execution", ["graph", "module"])
@pytest.mark.parametrize("kind", ["glu", "llama"])
def test_two_ranks_train_as_one_process(two, kind, execution):
    for apart, wrong in two.run(beside, kind, execution):
        assert not wrong and apart < 1e-12, (apart, wrong)
