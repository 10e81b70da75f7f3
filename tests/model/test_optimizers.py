"""Optimizer state under a shrink: elementwise steps commute with it, the others do what is said beside each."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from ecospa_fx.model.journal import Journal
from ecospa_fx.model.optimizer_table import factored
from ecospa_fx.model.slicing import prepare
from ecospa_fx.plan import Plan

Keeps = dict[tuple[str, int], Tensor]

ELEMENTWISE = {
    optim.Adam: [{}, {"amsgrad": True, "maximize": True}, {"weight_decay": 0.1}, {"fused": True}, {"foreach": True}],
    optim.AdamW: [{"lr": torch.tensor(0.01)}, {"amsgrad": True, "fused": True}, {"amsgrad": True, "foreach": True}],
    optim.SGD: [
        {},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "fused": True},
        {"momentum": 0.9, "dampening": 0.3, "foreach": True},
    ],
    optim.NAdam: [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}, {"foreach": True}],
    optim.RAdam: [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}, {"foreach": True}],
    optim.Adamax: [{}, {"foreach": True, "weight_decay": 0.1}],
    optim.RMSprop: [{}, {"momentum": 0.9, "centered": True}, {"momentum": 0.9, "centered": True, "foreach": True}],
    optim.Adagrad: [{"lr_decay": 0.1, "initial_accumulator_value": 0.5}, {"fused": True}, {"foreach": True}],
    optim.Adadelta: [{}, {"foreach": True, "weight_decay": 0.1}],
    optim.ASGD: [{"t0": 1.0}, {"foreach": True}],
    optim.Rprop: [{}, {"foreach": True, "maximize": True}],
}
CAPTURABLE = [
    optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.RMSprop, optim.Adadelta, optim.ASGD,
    optim.Rprop,
]  # fmt: skip
OTHERWISE = {optim.Adafactor, optim.Muon, optim.SparseAdam, optim.LBFGS}  # each has its own tests below
CASES = [(cls, options) for cls, each in ELEMENTWISE.items() for options in each]
CASES += [(cls, {"capturable": True, "foreach": foreach}) for cls in CAPTURABLE for foreach in (False, True)]


class Weights(nn.Module):
    """A matrix, its bias, a convolution, and one that never shrinks."""

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        for name, shape in {
            "matrix": (rows, columns), "bias": (rows,), "kernel": (columns, rows, 3, 2), "other": (2, 3),
        }.items():  # fmt: skip
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64)))


@st.composite
def settings_of_a_run(draw):
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    keep = {size: draw(st.lists(st.integers(0, size - 1), min_size=1, unique=True)) for size in {rows, columns}}
    return {
        "rows": rows,
        "columns": columns,
        "keep": {size: torch.tensor(sorted(each)) for size, each in keep.items()},
        "before": draw(st.integers(0, 3)),
        "after": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 1000)),
    }


def keeps_of(run) -> Keeps:
    rows, columns = run["keep"][run["rows"]], run["keep"][run["columns"]]
    return {
        ("matrix", 0): rows, ("matrix", 1): columns, ("bias", 0): rows, ("kernel", 0): columns, ("kernel", 1): rows,
    }  # fmt: skip


def shrink(model: nn.Module, keeps: Keeps, *optimizers: optim.Optimizer) -> None:
    """What `ecospa_fx.shrink` does to tensors, without a graph."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if any(name == n for n, _ in keeps)}
    prepare(model, Plan(), Plan(dict(keeps), shapes), optimizers).commit(Journal())


def cut(tensor: Tensor, name: str, keeps: Keeps) -> Tensor:
    for dim in range(tensor.ndim):
        if (name, dim) in keeps:
            tensor = tensor.index_select(dim, keeps[name, dim])
    return tensor


def step(model: nn.Module, optimizer: optim.Optimizer, seed: int, whole: nn.Module, keeps: Keeps) -> None:
    """A step with random gradients of the shapes of `whole`, cut to the shapes of `model` where it is smaller."""
    draw, shapes = torch.Generator().manual_seed(seed), {name: p.shape for name, p in whole.named_parameters()}
    for name, p in model.named_parameters():
        gradient = torch.randn(shapes[name], generator=draw, dtype=torch.float64)
        p.grad = gradient if gradient.shape == p.shape else cut(gradient, name, keeps)
    optimizer.step()


def assert_alike(model, optimizer, twin, twin_optimizer) -> None:
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=name)
        assert optimizer.state[p].keys() == twin_optimizer.state[q].keys()
        for entry, value in optimizer.state[p].items():
            torch.testing.assert_close(value, twin_optimizer.state[q][entry], rtol=1e-12, atol=1e-14, msg=entry)


@pytest.mark.parametrize(("cls", "options"), CASES, ids=[f"{c.__name__} {' '.join(o)}".strip() for c, o in CASES])
@settings(max_examples=8, deadline=None)
@given(run=settings_of_a_run())
def test_stepping_a_shrunk_model_is_shrinking_a_stepped_one(cls, options, run):
    # Tensors in place of numbers are refused on a CPU, but not while a step is compiled.
    compiling = mock.patch("torch.compiler.is_compiling", return_value="capturable" in options)
    keeps = keeps_of(run)
    whole, model, twin = (Weights(run["rows"], run["columns"], run["seed"]) for _ in range(3))
    optimizer, twin_optimizer = (cls(each.parameters(), **options) for each in (model, twin))
    with compiling:
        for number in range(run["before"]):
            step(model, optimizer, number, whole, {})
            step(twin, twin_optimizer, number, whole, {})
        shrink(model, keeps, optimizer)
        for number in range(run["after"]):
            step(model, optimizer, 10 + number, whole, keeps)
            step(twin, twin_optimizer, 10 + number, whole, keeps)
    shrink(twin, keeps, twin_optimizer)
    assert_alike(model, optimizer, twin, twin_optimizer)


def test_every_optimizer_of_torch_is_tested():
    classes = {
        value for value in vars(optim).values()
        if isinstance(value, type) and issubclass(value, optim.Optimizer) and value is not optim.Optimizer
    }  # fmt: skip
    assert classes == {*ELEMENTWISE, *OTHERWISE}


def test_step_counts_and_tensors_as_learning_rates_stay_the_same_objects():
    """A captured CUDA graph and a scheduler hold these very tensors."""
    model = Weights(4, 3, 0)
    optimizer = optim.AdamW(model.parameters(), lr=torch.tensor(0.01), foreach=True, capturable=True)
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        step(model, optimizer, 0, Weights(4, 3, 0), {})
    counts = {name: optimizer.state[p]["step"] for name, p in model.named_parameters()}
    rate = optimizer.param_groups[0]["lr"]
    shrink(model, {("matrix", 0): torch.tensor([0, 2])}, optimizer)
    assert all(optimizer.state[p]["step"] is counts[name] for name, p in model.named_parameters())
    assert optimizer.param_groups[0]["lr"] is rate


# Adafactor


def estimate(row: Tensor, column: Tensor) -> Tensor:
    """The second moment that row and column means stand for, over the last two dims."""
    return row @ column / row.mean(-2, keepdim=True)


@settings(max_examples=20, deadline=None)
@given(run=settings_of_a_run())
def test_adafactor_keeps_its_estimate_of_every_entry_that_stays(run):
    keeps, whole, model = keeps_of(run), *(Weights(run["rows"], run["columns"], run["seed"]) for _ in range(2))
    optimizer = optim.Adafactor(model.parameters())
    for number in range(1 + run["before"]):
        step(model, optimizer, number, whole, {})
    before = {name: {e: v.clone() for e, v in optimizer.state[p].items()} for name, p in model.named_parameters()}
    shrink(model, keeps, optimizer)
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        assert state["step"] == before[name]["step"]
        if p.ndim == 1:
            assert torch.equal(state["variance"], cut(before[name]["variance"], name, keeps))
            continue
        assert state["row_var"].shape == (*p.shape[:-1], 1)
        assert state["col_var"].shape == (*p.shape[:-2], 1, p.shape[-1])
        expected = cut(estimate(before[name]["row_var"], before[name]["col_var"]), name, keeps)
        torch.testing.assert_close(estimate(state["row_var"], state["col_var"]), expected, rtol=1e-12, atol=0)
        # They are means of one matrix, so their own means agree, as they do in a state that has grown.
        torch.testing.assert_close(
            state["row_var"].mean(-2), state["col_var"].mean(-1), rtol=1e-12, atol=0, check_stride=False
        )
    step(model, optimizer, 20, whole, keeps)  # and it goes on


@settings(max_examples=20, deadline=None)
@given(run=settings_of_a_run())
def test_adafactor_commutes_where_no_mean_over_the_whole_enters(run):
    """The squared gradient is a product of rows and columns, and neither clipping nor the relative step is at work."""
    options = {"d": 1e9, "eps": (1e-30, 1e9), "lr": 1e-12}
    keeps, model, twin = keeps_of(run), *(Weights(run["rows"], run["columns"], run["seed"]) for _ in range(2))
    optimizer, twin_optimizer = (optim.Adafactor(each.parameters(), **options) for each in (model, twin))

    def gradients(model, number, keeps):
        draw, signs = torch.Generator().manual_seed(run["seed"]), torch.Generator().manual_seed(number)
        for name, p in Weights(run["rows"], run["columns"], 0).named_parameters():
            factors = [torch.rand(size, generator=draw, dtype=torch.float64) + 0.1 for size in p.shape]
            product = torch.einsum(",".join("abcd"[: p.ndim]) + "->" + "abcd"[: p.ndim], *factors)
            gradient = (1 + number) * product * torch.randn(p.shape, generator=signs, dtype=torch.float64).sign()
            model.get_parameter(name).grad = cut(gradient, name, keeps)

    for number in range(run["before"]):
        for each, held in ((model, optimizer), (twin, twin_optimizer)):
            gradients(each, number, {})
            held.step()
    shrink(model, keeps, optimizer)
    for number in range(10, 10 + run["after"]):
        for each, held, kept in ((model, optimizer, keeps), (twin, twin_optimizer, {})):
            gradients(each, number, kept)
            held.step()
    shrink(twin, keeps, twin_optimizer)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=name)


def test_adafactor_of_transformers_keeps_its_estimate_and_its_first_moment():
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    model, whole = Weights(5, 4, 0), Weights(5, 4, 0)
    optimizer = adafactor(
        model.parameters(), lr=1e-3, scale_parameter=False, relative_step=False, warmup_init=False, beta1=0.9
    )
    for number in range(3):
        step(model, optimizer, number, whole, {})
    p, keeps = model.matrix, {("matrix", 0): torch.tensor([0, 3, 4]), ("matrix", 1): torch.tensor([1, 2])}
    before = {entry: value.clone() for entry, value in optimizer.state[p].items() if isinstance(value, Tensor)}
    shrink(model, keeps, optimizer)
    state = optimizer.state[p]
    assert state["step"] == 3
    assert torch.equal(state["exp_avg"], cut(before["exp_avg"], "matrix", keeps))
    whole_estimate, left = (
        estimate(each["exp_avg_sq_row"][:, None], each["exp_avg_sq_col"][None]) for each in (before, state)
    )
    torch.testing.assert_close(left, cut(whole_estimate, "matrix", keeps), rtol=1e-12, atol=0)
    step(model, optimizer, 20, whole, keeps)


def test_factors_of_a_gradient_that_has_been_zero_stay_zero():
    rule = factored("row", "column")
    state = {"row": torch.zeros(4, 1), "column": torch.zeros(1, 3)}
    made = rule(state, torch.zeros(4, 3), {0: torch.tensor([1, 2])})
    assert torch.equal(made["row"], torch.zeros(2, 1)) and torch.equal(made["column"], torch.zeros(1, 3))


# Muon: momentum commutes, its orthogonal part is that of the smaller matrix.


def test_muon_carries_its_momentum_and_orthogonalises_what_is_left():
    whole = nn.ParameterDict({"w": torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))})
    model, keeps = nn.ParameterDict({"w": whole["w"].detach().clone()}), {("w", 0): torch.tensor([0, 2, 5])}
    optimizer = optim.Muon(model.parameters(), lr=0.1, momentum=0.9)
    for number in range(3):
        step(model, optimizer, number, whole, {})
    momentum, weight = optimizer.state[model["w"]]["momentum_buffer"].clone(), model["w"].detach().clone()
    shrink(model, keeps, optimizer)
    assert torch.equal(optimizer.state[model["w"]]["momentum_buffer"], momentum[keeps["w", 0]])

    fresh = nn.ParameterDict({"w": weight[keeps["w", 0]]})
    fresh_optimizer = optim.Muon(fresh.parameters(), lr=0.1, momentum=0.9)
    fresh_optimizer.state[fresh["w"]]["momentum_buffer"] = momentum[keeps["w", 0]]
    step(model, optimizer, 10, whole, keeps)
    step(fresh, fresh_optimizer, 10, whole, keeps)
    assert torch.equal(model["w"], fresh["w"])
    torch.testing.assert_close(
        optimizer.state[model["w"]]["momentum_buffer"],
        fresh_optimizer.state[fresh["w"]]["momentum_buffer"],
        rtol=1e-12,
        atol=0,
    )


# SparseAdam, on gradients that hold rows


@pytest.mark.parametrize("between", [False, True], ids=["after a step", "between backward and step"])
def test_sparse_adam_commutes_and_sparse_gradients_follow(between):
    keeps = {("w", 1): torch.tensor([0, 3, 5])}

    def gradient(number: int) -> Tensor:
        draw = torch.Generator().manual_seed(number)
        values = torch.randn(2, 6, generator=draw, dtype=torch.float64)
        return torch.sparse_coo_tensor(torch.tensor([[1, 4 + number]]), values, (9, 6), check_invariants=True)

    models = [nn.ParameterDict({"w": torch.ones(9, 6, dtype=torch.float64)}) for _ in range(2)]
    optimizers = [optim.SparseAdam(model.parameters(), lr=0.1) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        for number in range(2):
            model["w"].grad = gradient(number)
            optimizer.step()
    model, twin = models
    if between:
        model["w"].grad = gradient(2)
        shrink(model, keeps, optimizers[0])
    else:
        shrink(model, keeps, optimizers[0])
        model["w"].grad = gradient(2).index_select(1, keeps["w", 1])
    assert model["w"].grad.is_sparse
    twin["w"].grad = gradient(2)
    for optimizer in optimizers:
        optimizer.step()
    shrink(twin, keeps, optimizers[1])
    assert_alike(model, optimizers[0], twin, optimizers[1])
