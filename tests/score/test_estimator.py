"""Where the estimator reads gradients, and what it makes of them: each way against sums taken by hand."""

import sys

import pytest
import torch
from torch import nn

import ecospa_fx


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 6)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def setting(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model, x = Block().to(dtype), torch.randn(5, 6, dtype=dtype)
    ecospa_fx.compile(model, example_inputs=(x,))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, **options), x


KEYS = {("up.weight", 0), ("down.weight", 1)}


def squares(model):
    """Sums of squared gradients per entry of the coupling, float64."""
    up, down = model.up.weight.grad.double(), model.down.weight.grad.double()
    return {("up.weight", 0): up.square().sum(1), ("down.weight", 1): down.square().sum(0)}


def close(estimator, expected):
    assert set(estimator.sums) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(estimator.sums[key].double(), value, rtol=1e-5, atol=1e-12)


def total(*found):
    return {key: sum(each[key] for each in found) for key in found[0]}


def test_an_optimizer_hook_reads_the_final_gradients():
    model, optimizer, x = setting()
    estimator = ecospa_fx.CoupledEstimator(model)
    estimator.attach(optimizer)
    found = []
    for _ in range(3):
        for micro in x.split(2):  # gradients sum up over micro-batches
            model(micro).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        found.append(squares(model))
        optimizer.step()
        optimizer.zero_grad()
    close(estimator, total(*found))
    assert estimator.steps == 3 and estimator.attached
    estimator.detach()
    model(x).sum().backward()
    optimizer.step()
    assert estimator.steps == 3 and not estimator.attached


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_is_divided_out_and_skipped_steps_are_left_out(fused):
    model, _, x = setting()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    estimator = ecospa_fx.CoupledEstimator(model)
    estimator.attach(optimizer)
    found = []
    for step in range(3):
        loss = model(x).square().sum()
        if step == 1:
            loss = loss * float("inf")
        else:
            model.zero_grad()
            loss.backward(retain_graph=True)
            found.append(squares(model))
        model.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    close(estimator, total(*found))
    (importance,) = estimator.importance().values()
    up, down = (float(value.sum()) / 120 / 2 for value in total(*found).values())
    assert importance == pytest.approx((up + down) / 2, rel=1e-5)


def test_backward_hooks_read_gradients_that_are_freed_at_once():
    model, _, x = setting()
    estimator = ecospa_fx.CoupledEstimator(model)
    estimator.attach_backward()
    steps = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    twin, reference, _ = setting()
    found = []

    def step(p):
        steps[p].step()
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        model(x).square().sum().backward()
        assert all(p.grad is None for p in model.parameters())
        twin(x).square().sum().backward()
        found.append(squares(twin))
        reference.step()
        reference.zero_grad()
    close(estimator, total(*found))
    assert estimator.steps == 3


def test_backward_hooks_wait_for_the_last_micro_batch():
    model, optimizer, x = setting()
    estimator = ecospa_fx.CoupledEstimator(model)
    estimator.attach_backward(every=2)
    found = []
    for _ in range(2):
        for micro in x[:4].split(2):
            model(micro).square().sum().backward()
        found.append(squares(model))
        optimizer.step()
        optimizer.zero_grad()
    close(estimator, total(*found))
    assert estimator.steps == 2


def test_an_average_forgets():
    model, _, x = setting()
    estimator = ecospa_fx.CoupledEstimator(model, decay=0.75)
    found = []
    for scale in (1.0, 2.0, 0.5):
        model.zero_grad()
        (scale * model(x).square().sum()).backward()
        found.append(squares(model))
        estimator.accumulate()
    expected = {key: 0.25 * (0.75**2 * found[0][key] + 0.75 * found[1][key] + found[2][key]) for key in KEYS}
    close(estimator, expected)
    (importance,) = estimator.importance().values()
    mean = sum(float(value.sum()) / 120 for value in expected.values()) / 2
    assert importance == pytest.approx(mean / (1 - 0.75**3), rel=1e-5)


def test_taylor_weighs_gradients_by_weights():
    model, _, x = setting()
    estimator = ecospa_fx.CoupledEstimator(model, "taylor_squared")
    model(x).square().sum().backward()
    estimator.accumulate()
    up, down = model.up.weight, model.down.weight
    close(
        estimator,
        {
            ("up.weight", 0): (up * up.grad).double().square().sum(1).detach(),
            ("down.weight", 1): (down * down.grad).double().square().sum(0).detach(),
        },
    )


def test_sums_follow_a_shrink_and_stay_where_they_are_otherwise():
    model, optimizer, x = setting()
    estimator = ecospa_fx.CoupledEstimator(model)

    def step():
        model.zero_grad()
        model(x).square().sum().backward()
        estimator.accumulate()
        return squares(model)

    first = step()
    addresses = {key: value.data_ptr() for key, value in estimator.sums.items()}
    second = step()
    estimator.reset()
    third = step()
    assert {key: value.data_ptr() for key, value in estimator.sums.items()} == addresses  # as a CUDA graph needs it
    close(estimator, third)
    keep = torch.tensor([1, 4, 7, 19])
    for index in (keep, torch.tensor([0, 2])):
        (coupling,) = ecospa_fx.couplings(model)
        ecospa_fx.shrink(model, {coupling: index}, optimizer=optimizer)
    fourth = step()
    left = keep[[0, 2]]
    close(estimator, {key: third[key][left] + fourth[key] for key in KEYS})
    assert all(torch.equal(first[key], second[key]) for key in KEYS)


def test_nan_makes_importance_nan_until_the_next_reset():
    model, _, x = setting()
    estimator = ecospa_fx.CoupledEstimator(model)
    model(x).square().sum().backward()
    good = squares(model)
    model.up.weight.grad[3, 2] = float("nan")
    estimator.accumulate()
    (importance,) = estimator.importance().values()
    assert importance != importance
    assert estimator.sums["up.weight", 0].isnan().nonzero().flatten().tolist() == [3]
    estimator.reset()
    model.up.weight.grad[3, 2] = 0.0
    estimator.accumulate(scale=2.0)
    torch.testing.assert_close(estimator.sums["down.weight", 1].double(), good["down.weight", 1] / 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: ecospa_fx.CoupledEstimator(m, decay=1.0),
            "decay=1.0 is not between 0 and 1; None adds all steps up",
        ),
        (
            lambda m: ecospa_fx.CoupledEstimator(m).attach_backward(0),
            "every=0 is out of range; it is a whole number of micro-batches, at least 1",
        ),
        (
            lambda m: ecospa_fx.EcoSpaTrainer(m, torch.optim.SGD(m.parameters()), gradients="hook"),
            "gradients='hook' is none of 'step', 'optimizer', 'backward'",
        ),
    ],
)
def test_settings_out_of_range(make, message):
    model, _, _ = setting()
    with pytest.raises(ecospa_fx.errors.TargetError) as caught:
        make(model)
    assert str(caught.value) == message


@pytest.mark.parametrize("gradients", ["optimizer", "backward"])
def test_the_trainer_reads_gradients_where_it_is_told(gradients):
    """With hooks, gradients may be gone when trainer.step() is called, and the run is the same."""

    def run(gradients, early):
        model, optimizer, x = setting()
        trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5, interval=2, gradients=gradients)
        for _ in range(12):
            model(x).square().sum().backward()
            optimizer.step()
            if early:
                optimizer.zero_grad()
            trainer.step()
            optimizer.zero_grad()
        assert trainer.done
        return trainer.history, list(model.parameters())

    (history, parameters), (expected, others) = run(gradients, True), run("step", False)
    assert history == expected
    assert all(torch.equal(p, q) for p, q in zip(parameters, others, strict=True))


def _rank(rank, file, results):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        model, _, x = setting()
        model(x).square().sum().backward()
        expected, grads = squares(model), {name: p.grad for name, p in model.named_parameters()}
        reference = ecospa_fx.CoupledEstimator(model)
        reference.accumulate()
        whole = reference.importance()
        for placements in ({"up": Shard(0), "down": Shard(0)}, {"up": Shard(1), "down": Replicate()}, {"up": Shard(0)}):
            for name, parameter in list(model.named_parameters()):
                module, leaf = model.get_submodule(name.split(".")[0]), name.split(".")[1]
                place = placements.get(name.split(".")[0])
                if leaf == "weight":
                    data, grad = reference_weights[name] if name in reference_weights else (parameter.data, grads[name])
                    reference_weights[name] = data, grad
                    new = nn.Parameter(data if place is None else distribute_tensor(data, mesh, [place]))
                    new.grad = grad if place is None else distribute_tensor(grad, mesh, [place])
                    module._parameters[leaf] = new
            estimator = ecospa_fx.CoupledEstimator(model)
            estimator.accumulate()
            found = estimator.importance()
            for coupling, value in whole.items():
                assert abs(found[coupling] - value) <= 1e-5 * value, (placements, found, whole)
            sums = estimator.reader.totals.current().reduced()
            for key in KEYS:
                torch.testing.assert_close(sums[key].double(), expected[key], rtol=1e-5, atol=1e-9)
        odd = DTensor.from_local(grads["up.weight"], mesh, [Partial()])
        model.up._parameters["weight"] = nn.Parameter(DTensor.from_local(grads["up.weight"], mesh, [Replicate()]))
        model.up.weight.grad = odd
        try:
            ecospa_fx.CoupledEstimator(model).accumulate()
        except ecospa_fx.errors.OptimizerError as error:
            results.put(str(error))
    finally:
        dist.destroy_process_group()


reference_weights: dict = {}


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over files")
def test_sharded_gradients_add_up_over_ranks(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    torch.multiprocessing.start_processes(
        _rank, (str(tmp_path / "rendezvous"), results), nprocs=2, start_method="spawn"
    )
    messages = [results.get() for _ in range(2)]
    assert set(messages) == {
        "the gradient of `up.weight` is placed Partial along the dims of its device mesh, and only Shard and Replicate "
        "tell which slices a rank holds; redistribute it before the optimizer's step"
    }
