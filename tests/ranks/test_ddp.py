"""DistributedDataParallel through shrinks: every setting equals one process on the whole batch, to rounding."""

import pytest
import torch
import torch.distributed as dist
from crew import Crew, differ, said
from rank_models import Run, compared
from tiny import batch, loss_of, made
from tiny import share as part
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

import ecospa_fx


@pytest.fixture(scope="module")
def two():
    with Crew(2) as crew:
        yield crew


def like_one_process(rank, world, kind="glu", execution="graph", settings=None, lazily=False, trainer=None, parts=1):
    alone = Run(kind, execution, lazily=lazily, **(trainer or {})).train(parts=parts)
    run = Run(kind, execution, lambda m: DDP(m, **(settings or {})), (rank, world), lazily, **(trainer or {}))
    wrapper, reducer = run.called, run.called.reducer
    run.train()
    assert run.called is wrapper and wrapper.reducer is not reducer
    return compared(run, alone)


def equal(found, to=1e-12):
    for apart, between in found:
        assert apart < to and between == 0.0


SETTINGS = {
    "default": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "bucket_view": {"gradient_as_bucket_view": True},
    "small_buckets": {"bucket_cap_mb": 0.001},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_of_the_wrapper(two, settings):
    equal(two.run(like_one_process, "glu", "graph", SETTINGS[settings]))


@pytest.mark.parametrize(
    ("kind", "execution", "settings"),
    [("glu", "module", "static_graph"), ("llama", "graph", "find_unused"), ("gpt2", "graph", "bucket_view")],
)
def test_models_and_executions_captured_in_the_first_step(two, kind, execution, settings):
    equal(two.run(like_one_process, kind, execution, SETTINGS[settings], True))


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("execution", ["graph", "module"])
@pytest.mark.parametrize("kind", ["glu", "llama", "gpt2", "vit"])
def test_all_of_them(two, kind, execution, settings, lazily):
    equal(two.run(like_one_process, kind, execution, SETTINGS[settings], lazily))


HOW = {
    "adaptive": {"policy": "adaptive"},
    "absorb and rotate": {"absorb": True, "rotate": True},
    "activation": {"score": "activation", "index_score": "activation"},
    "adam": {"score": "adam", "gradients": "optimizer"},
    "taylor": {"score": "taylor", "index_score": "taylor"},
    "flops": {"cost": "flops"},
}


@pytest.mark.parametrize("how", HOW)
def test_every_way_to_decide(two, how):
    """Activations are scored call by call, and each rank makes one of its own."""
    equal(two.run(like_one_process, "glu", "graph", {}, False, HOW[how], 2 if how == "activation" else 1))


def test_four_ranks():
    with Crew(4) as four:
        equal(four.run(like_one_process, "glu", "graph", {"find_unused_parameters": True}))


def by_hand(rank, world):
    """A wrapper of more than the model, found by the model in it; gradients right after the shrink are reduced."""
    torch.manual_seed(0)
    model = ecospa_fx.compile(made("glu"), example_kwargs=part(batch("glu", 0), rank, world))
    around = nn.ModuleDict({"net": model, "scale": nn.Linear(1, 1, bias=False).double()})
    around.forward = lambda given: model(**given) * around["scale"].weight.sum()
    wrapper = DDP(around)
    seen = []
    wrapper.register_forward_hook(lambda *_: seen.append(1))
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-2)
    for step in range(4):
        wrapper(part(batch("glu", step), rank, world)).backward()
        grads = [p.grad for p in wrapper.parameters()]
        assert differ(grads) == 0.0 and all(g is not None for g in grads)
        optimizer.step()
        if step == 1:
            keeps = {c: torch.arange(1, c.size - 2) for c in ecospa_fx.couplings(model)}
            ecospa_fx.shrink(model, keeps, optimizer=optimizer)
        if step == 2:
            ecospa_fx.rotate(model, optimizer=optimizer)
        optimizer.zero_grad()
    return len(seen), differ(list(wrapper.parameters()))


def test_by_hand_and_rotated(two):
    assert two.run(by_hand) == [(4, 0.0)] * 2


def frozen_for_a_while(rank, world):
    """A shrink while some weights are frozen that train later, and others train that were frozen when wrapped."""
    model = ecospa_fx.compile(made("glu"), example_kwargs=part(batch("glu", 0), rank, world))
    plain = made("glu")
    for each in (model, plain):
        each.inp.requires_grad_(False)
    pair = [DDP(each, find_unused_parameters=True) for each in (model, plain)]
    for each in (model, plain):
        each.head.requires_grad_(False)
    ecospa_fx.shrink(model, {c: torch.arange(c.size - 1) for c in ecospa_fx.couplings(model)})
    found = []
    for each, wrapper in zip((model, plain), pair):
        each.requires_grad_(True)
        for step in range(2):
            each.zero_grad()
            loss_of(wrapper, part(batch("glu", step), rank, world)).backward()
        found.append([differ([p.grad for p in m.parameters()]) > 0 for m in (each.head, each.inp, each.blocks)])
    return found


def test_what_trains_when_it_is_wrapped_is_reduced_after_a_shrink(two):
    assert two.run(frozen_for_a_while) == [[[False, True, False]] * 2] * 2


def accumulated(rank, world, settings):
    """Two micro-batches per step, the first without sync, against one process with the same two."""

    def train(run, wrapped):
        for step in range(10):
            whole = batch("glu", step)
            for number in range(2):
                given = {k: v[number * 6 : number * 6 + 6] for k, v in whole.items()}
                given = part(given, *run.of)
                # A static graph may not begin without sync: that fails in torch alone.
                if wrapped and number == 0 and not (step == 0 and "static_graph" in settings):
                    with run.called.no_sync():
                        (loss_of(run.called, given) / 2).backward()
                else:
                    (loss_of(run.called, given) / 2).backward()
            run.optimizer.step()
            run.trainer.step()
            run.optimizer.zero_grad()
        return run

    run = train(Run(wrap=lambda m: DDP(m, **settings), of=(rank, world)), True)
    return compared(run, train(Run(), False))


@pytest.mark.parametrize("settings", ["bucket_view", "static_graph"])
def test_gradients_accumulated_without_sync(two, settings):
    equal(two.run(accumulated, SETTINGS[settings]))


def doubled(state, bucket):
    """A communication hook that counts its calls, and adds gradients up as torch does."""
    state.append(len(bucket.gradients()))
    future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def with_hook(rank, world):
    def wrap(model):
        wrapper = DDP(model)
        wrapper.register_comm_hook(calls, doubled)
        return wrapper

    calls = []
    run = Run(wrap=wrap, of=(rank, world))
    counts = []
    for step in range(10):
        before = len(calls)
        run.step(step)
        counts.append(len(calls) - before)
    assert all(counts) and len(run.called._comm_hooks) == 1
    return compared(run, Run().train())


def test_communication_hooks_are_kept(two):
    equal(two.run(with_hook))


def builtin(rank, world):
    def wrap(model):
        wrapper = DDP(model)
        wrapper._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
        return wrapper

    run = Run(wrap=wrap, of=(rank, world)).train()
    return run.called._get_ddp_logging_data()["comm_hook"], *compared(run, Run().train())


def test_hooks_of_torch_that_are_not_in_python_are_kept(two):
    for name, apart, between in two.run(builtin):
        assert name.endswith("ALLREDUCE") and apart < 1e-12 and between == 0.0


def zero(rank, world, score):
    def make(parameters):
        return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=1e-2)

    run = Run(wrap=DDP, of=(rank, world), optimizer=make, score=score).train()
    alone = Run(score=score).train()
    assert run.kept() == alone.kept() and len(run.trainer.history) == 2
    weights = [(p - q).abs().max().item() for p, q in zip(run.model.parameters(), alone.model.parameters())]
    return max(weights), differ(list(run.model.parameters()))


@pytest.mark.parametrize("score", ["fisher", "adam"])
def test_optimizer_state_in_parts(two, score):
    equal(two.run(zero, score))


def refused(rank, world):
    def fresh():
        model = ecospa_fx.compile(made("glu"), example_kwargs=batch("glu", 0))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def delayed(model):
        named = list(model.named_parameters())
        return DDP(model, delay_all_reduce_named_params=named[:2], param_to_hook_all_reduce=named[3][1])

    texts, unchanged = [], []
    for wrap in (delayed, powered):
        model, optimizer = fresh()
        wrapper = wrap(model)
        keeps = {c: torch.arange(4) for c in ecospa_fx.couplings(model)}
        texts.append(said(ecospa_fx.shrink, model, keeps, optimizer=optimizer))
        texts.append(said(ecospa_fx.EcoSpaTrainer, wrapper, optimizer))
        unchanged.append(not ecospa_fx.plan(model).kept)
    model, optimizer = fresh()
    wrapper = DDP(model)
    texts.append(said(ecospa_fx.EcoSpaTrainer, wrapper, optimizer, gradients="backward"))
    texts.append(said(ecospa_fx.CoupledEstimator(model).attach_backward))
    held = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2, parameters_as_bucket_view=True)
    texts.append(said(ecospa_fx.EcoSpaTrainer, wrapper, held))
    held = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
    texts.append(said(ecospa_fx.EcoSpaTrainer, wrapper, held, cost="bytes"))
    return texts, all(unchanged)


def powered(model):
    wrapper = DDP(model)
    wrapper.register_comm_hook(powerSGD_hook.PowerSGDState(process_group=None), powerSGD_hook.powerSGD_hook)
    return wrapper


def test_settings_that_cannot_follow_are_refused_by_name(two):
    first, second = two.run(refused)
    assert first == second
    (delayed, same, power, also, backward, by_hand, view, size), unchanged = first
    assert unchanged and delayed == same and power == also and backward == by_hand
    assert delayed == (
        "WrapperError: GLU is wrapped in DistributedDataParallel with delay_all_reduce_named_params, whose one "
        "buffer of gradients would keep its size when the model shrinks; leave it out"
    )
    assert power == (
        "WrapperError: GLU is wrapped in DistributedDataParallel with the communication hook powerSGD_hook, whose "
        "PowerSGDState holds tensors at the sizes of the gradient buckets, which would keep them when the model "
        "shrinks; use one without such a state, such as fp16_compress_hook"
    )
    assert backward == (
        'WrapperError: gradients="backward" reads each gradient as soon as backward has it, and '
        "DistributedDataParallel reduces it over ranks only then, so that each rank would decide by its own; read them "
        'at the steps of the optimizers, gradients="optimizer"'
    )
    assert view == (
        "OptimizerError: this ZeroRedundancyOptimizer was made with parameters_as_bucket_view=True, and its buckets of "
        "parameters would keep their sizes when the model shrinks; leave it out"
    )
    assert size == (
        'OptimizerError: cost="bytes" counts the state of optimizers, of which this ZeroRedundancyOptimizer holds '
        'another part on each rank; use cost="parameters"'
    )


def joined(rank, world):
    """Ranks with different numbers of batches: those without one follow with nothing of their own."""
    run = Run(wrap=DDP, of=(rank, world))
    with Join([run.called]):
        for step in range(3 + rank):
            loss = loss_of(run.called, part(batch("glu", step), rank, world))
            loss.backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
    before = [p.shape for p in run.model.parameters()]
    ecospa_fx.shrink(run.model, {c: torch.arange(9) for c in ecospa_fx.couplings(run.model)}, optimizer=run.optimizer)
    with Join([run.called]):
        for step in range(3 + rank):
            loss_of(run.called, part(batch("glu", step), rank, world)).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
    return before != [p.shape for p in run.model.parameters()], differ(list(run.model.parameters()))


def test_ranks_with_fewer_batches(two):
    assert two.run(joined) == [(True, 0.0)] * 2


def apart_from_others(rank, world):
    """Two ranks train one model over a group of their own, the third trains another model, and shrinks it alone."""
    pair = dist.new_group([0, 1])
    if rank == 2:
        alone = Run(target=0.6).train()
        return len(alone.trainer.history), 0.0, 0.0
    run = Run(wrap=lambda m: DDP(m, process_group=pair), of=(rank, 2)).train()
    theirs = [torch.zeros_like(p) for p in run.model.parameters()]
    for p, other in zip(run.model.parameters(), theirs):
        both = [torch.zeros_like(p), torch.zeros_like(p)]
        dist.all_gather(both, p.detach(), group=pair)
        other.copy_(both[1 - rank])
    judge = Run().train()
    apart = [(p - q).abs().max().item() for p, q in zip(run.model.parameters(), judge.model.parameters())]
    between = [(p - q).abs().max().item() for p, q in zip(run.model.parameters(), theirs)]
    return len(run.trainer.history), max(apart), max(between)


def test_only_the_ranks_of_the_wrapper_decide():
    with Crew(3) as three:
        for shrinks, apart, between in three.run(apart_from_others):
            assert shrinks == 2 and apart < 1e-12 and between == 0.0


class Normed(nn.Module):
    """Buffers that shrink, which the wrapper sends from the first rank to all in each forward."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Conv1d(3, 12, 1), nn.BatchNorm1d(12), nn.Conv1d(12, 3, 1)

    def forward(self, x):
        return self.down(torch.relu(self.norm(self.up(x))))


def with_buffers(rank, world):
    torch.manual_seed(0)
    model = ecospa_fx.compile(Normed().double())
    wrapper = DDP(model)
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(wrapper, optimizer, target=0.6, start=2, interval=2)
    for step in range(7):
        x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)
        (wrapper(x) - x).square().mean().backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        wrapper(torch.zeros(2, 3, 5, dtype=torch.float64))  # sends the buffers
    before = differ(list(model.parameters()))
    return before, model.norm.running_mean.shape[0] < 12, trainer.done


def test_buffers_are_sent_at_their_new_sizes(two):
    assert two.run(with_buffers) == [(0.0, True, True)] * 2
