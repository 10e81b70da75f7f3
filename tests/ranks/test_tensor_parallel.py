"""Tensor parallelism: 10 steps of AdamW with 2 shrinks on 2 ranks, in FSDP2 on 4, beside one process, in float64."""

from types import SimpleNamespace

import pytest
import torch
from crew import Crew
from tiny import SCHEDULE, batch, blocks_of, loss_of, made, share
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F

import ecospa_fx

IN = ("gate", "up", "fc", "q", "k", "v", "gate_proj", "up_proj", "q_proj", "k_proj", "v_proj")


class TiedBlock(nn.Module):
    """Attention and a feed-forward layer with biases, whose Python holds the number of heads."""

    def __init__(self, d=16, heads=4, dim=6, h=20):
        super().__init__()
        self.heads, self.dim = heads, dim
        self.first, self.second = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.v = nn.Linear(d, heads * dim), nn.Linear(d, heads * dim)
        self.k = nn.Linear(d, heads * dim, bias=False)  # attention does not depend on one, so Adam would follow noise
        self.o, self.fc, self.proj = nn.Linear(heads * dim, d), nn.Linear(d, h), nn.Linear(h, d)

    def forward(self, x):
        y = self.first(x)
        q, k, v = (
            each(y).view(y.shape[0], y.shape[1], self.heads, self.dim).transpose(1, 2)
            for each in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.proj(F.gelu(self.fc(self.second(x))))


class Tied(nn.Module):
    """A language model whose embedding is its head too."""

    def __init__(self, d=16):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, d), nn.Linear(d, 32, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList(TiedBlock(d) for _ in range(2))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=self.head(x))


def make(kind):
    if kind != "tied":
        return made(kind)
    torch.manual_seed(0)
    return Tied().double()


def inputs(kind, step):
    return batch("gpt2" if kind == "tied" else kind, step)


@pytest.fixture(scope="module")
def two():
    import transformers.models.llama.modeling_llama  # noqa: F401, what is imported here need not be on each rank

    with Crew(2) as crew:
        yield crew


def parallel(model, mesh, divide=False):
    """Shard the weights of each block by the names of its layers; give attentions the heads of their rank."""
    for block in blocks_of(model):
        names = [name for name, each in block.named_modules() if isinstance(each, nn.Linear)]
        colwise = [name for name in names if name.rpartition(".")[2] in IN]
        plan = {name: ColwiseParallel() if name in colwise else RowwiseParallel() for name in names}
        parallelize_module(block, mesh, plan)
        if divide:
            block.heads //= mesh.size()
    return model


def transformers_plan(model, mesh):
    """Shard the weights as transformers does, by the plan of the model itself."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    styles = {name: style for name, style in model.tp_plan.items() if name.startswith("model.layers")}
    plan = {}
    for name, style in styles.items():
        for layer in range(len(model.model.layers)):
            module = name.replace("*", str(layer))
            plan |= {f"{module}.weight": style, module: style}
    return apply_tensor_parallelism(model, mesh, plan)


def compiled(model, kind, execution):
    given = {name: each for name, each in inputs(kind, 0).items() if kind == "glu" or name != "labels"}
    return ecospa_fx.compile(model, example_kwargs=given, execution=execution)


def trained(model, optimizer, trainer, kind, part=lambda given: given, evals=(), steps=10, first=0):
    for step in range(first, first + steps):
        loss_of(model, part(inputs(kind, step))).backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
        if step in evals:
            model.eval()
            with torch.no_grad():
                loss_of(model, part(inputs(kind, 99)))
            model.train()


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def differences(mine, its, optimizer, theirs):
    """Return how far weights and state of AdamW are apart, and what is not placed as it should be."""
    wrong, apart = [], 0.0
    for (name, a), b in zip(mine.named_parameters(), its.parameters(), strict=True):
        for key, one, other in [("weight", a, b), *((k, optimizer.state[a][k], v) for k, v in theirs.state[b].items())]:
            placed = isinstance(one, DTensor) and one.placements == getattr(a, "placements", None)
            if other.ndim and isinstance(a, DTensor) and not placed:
                wrong.append(f"{name}: {key} is no DTensor like it")
            one, other = whole(one), other.detach()
            apart = max(apart, float((one - other).abs().max()) if one.shape == other.shape else float("inf"))
    return apart, wrong


def same_plan(mine, its):
    plans = [ecospa_fx.plan(each).kept for each in (mine, its)]
    return plans[0].keys() == plans[1].keys() and all(torch.equal(plans[0][k], plans[1][k]) for k in plans[0])


def spread(kind, execution, how, world):
    """Make a model, compile it and spread it over ranks, in the order of `how`; and the part of a batch of a rank."""
    model, divide = make(kind), kind == "tied" and execution == "module"
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    if how in ("shard, compile", "transformers"):
        model = transformers_plan(model, mesh) if how == "transformers" else parallel(model, mesh)
        return compiled(model, kind, execution), lambda given: given
    model = compiled(model, kind, execution)
    if how in ("2-D", "replicas"):
        names, sizes = ("dp", "tp"), (2, world // 2)
        if how == "replicas":  # of shards on one rank
            names, sizes = ("dp", "one", "tp"), (2, 1, world // 2)
        grid = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        parallel(model, grid["tp"], divide)
        data = grid["dp"] if how == "2-D" else grid["dp", "one"]
        for block in blocks_of(model):
            fully_shard(block, mesh=data)
        fully_shard(model, mesh=data)
        return model, lambda given: share(given, grid.get_local_rank("dp"), 2)
    return parallel(model, mesh, divide), lambda given: given


def _shards(parameter, dim):
    return isinstance(parameter, DTensor) and any(p.is_shard(dim) for p in parameter.placements)


def beside(rank, world, kind, execution, how="compile, shard", evals=(), settings=None):
    settings = {**SCHEDULE, **(settings or {})}
    model, part = spread(kind, execution, how, world)
    objects = list(model.parameters())
    columns = [p for block in blocks_of(model) for p in block.parameters() if _shards(p, 1)]
    assert len(columns) == (1 if kind == "glu" else 2) * len(blocks_of(model))  # the weights that add up over ranks
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, **settings)
    limits = {c.kind: c.parts for c in ecospa_fx.couplings(model) if c.parts > 1}
    trained(model, optimizer, trainer, kind, part, evals)

    lone = compiled(make(kind), kind, execution)
    its = torch.optim.AdamW(lone.parameters(), lr=1e-2, foreach=False)
    other = ecospa_fx.EcoSpaTrainer(lone, its, multiple_of=limits, **settings)
    trained(lone, its, other, kind, evals=evals)
    shrinks = [[entry["step"] for entry in each.history] for each in (trainer, other)]
    wrong = [f"shrinks {shrinks}"] if shrinks[0] != shrinks[1] or len(shrinks[0]) != 2 else []
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    wrong += [] if all(a is b for a, b in zip(objects, model.parameters(), strict=True)) else ["other Parameters"]
    if not same_plan(model, lone):
        return float("inf"), [*wrong, "another plan"]
    apart, more = differences(model, lone, optimizer, its)
    return apart, [*wrong, *more]


def check(crew, *case):
    for apart, wrong in crew.run(beside, *case):
        assert not wrong and apart < 1e-12, (apart, wrong)


ADAPTIVE = {"policy": "adaptive", "absorb": False, "rotate": False}
QUICK = [
    ("glu", "graph", "compile, shard", (1, 4)),
    ("glu", "graph", "shard, compile", (), ADAPTIVE),
    ("glu", "module", "shard, compile"),
    ("tied", "module", "compile, shard"),
    ("llama", "graph", "transformers"),
]
ALL = [
    (kind, execution, how, (1, 4))
    for kind in ("glu", "tied", "llama")
    for execution in ("graph", "module")
    for how in ("compile, shard", "shard, compile", "transformers")
    if (kind == "llama" or how != "transformers") and (kind, execution, how) != ("tied", "module", "shard, compile")
]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: " ".join(map(str, case)))
def test_two_ranks_train_as_one_process(two, case):
    check(two, *case)


ALL += [
    ("tied", "module", "compile, shard", (), ADAPTIVE),
    ("llama", "graph", "transformers", (), ADAPTIVE),
    ("llama", "graph", "compile, shard", (), {"score": "taylor_positions", "window": 2}),
]


@pytest.mark.sweep
@pytest.mark.parametrize("case", ALL, ids=lambda case: " ".join(map(str, case)))
def test_every_model_in_every_order(two, case):
    check(two, *case)


@pytest.mark.sweep
@pytest.mark.parametrize("execution", ["graph", "module"])
def test_every_model_beside_fsdp2(execution):
    with Crew(4) as four:
        for kind in ("glu", "tied", "llama"):
            check(four, kind, execution, "2-D")
        check(four, "glu", execution, "replicas")
        check(four, "glu", execution, "2-D", (), ADAPTIVE)


def regions(rank, world, how, execution):
    """Train with couplings that cross regions, or one region for all."""
    found = []
    for spread_out in (True, False):
        model = ecospa_fx.compile(make("glu"), example_kwargs=inputs("glu", 0), regions=how, execution=execution)
        if spread_out:
            parallel(model, init_device_mesh("cpu", (world,)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        settings = {**SCHEDULE, "target": 0.6, "multiple_of": {"glu": 2}}
        trained(model, optimizer, ecospa_fx.EcoSpaTrainer(model, optimizer, **settings), "glu", evals=(1, 4))
        found.append([whole(p) for p in model.parameters()])
        assert all(c.size < c.original_size for c in ecospa_fx.couplings(model))
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


@pytest.mark.sweep
@pytest.mark.parametrize(("how", "execution"), [("joined", "graph"), ("root", "graph"), ("root", "module")])
def test_what_runs_through_all_blocks_shrinks_too(two, how, execution):
    assert max(two.run(regions, how, execution)) < 1e-12


def pretrained(rank, world, directory, execution):
    """Train a model that transformers has loaded and spread by its own plan, embeddings and head included."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=world, tp_plan="auto")
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float64, distributed_config=config)
    sharded = sum(isinstance(p, DTensor) for p in model.parameters())
    found = []
    for each in (model.train(), LlamaForCausalLM.from_pretrained(directory, dtype=torch.float64).train()):
        compiled(each, "llama", execution)
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2, foreach=False)
        settings = {**SCHEDULE, "multiple_of": {"groups": 2, "glu": 2}}
        trained(each, optimizer, ecospa_fx.EcoSpaTrainer(each, optimizer, **settings), "llama", evals=(1, 4))
        found.append([whole(p) for p in each.parameters()])
    return sharded, max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


@pytest.mark.sweep
@pytest.mark.parametrize("execution", ["graph", "module"])
def test_a_model_that_transformers_has_loaded_by_its_plan(two, tmp_path, execution):
    make("llama").save_pretrained(tmp_path)
    for sharded, apart in two.run(pretrained, str(tmp_path), execution):
        assert sharded >= 14 and apart < 1e-12
