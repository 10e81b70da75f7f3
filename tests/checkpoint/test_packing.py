"""Packing: any state of an optimizer, a schedule or a generator goes to JSON and tensors and comes back the same."""

import json
import math
import random
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as lrs

import ecospa_fx
from ecospa_fx import errors
from ecospa_fx.checkpoint.packing import Packer, Unpacker
from ecospa_fx.json_text import format_json

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.complex128,
]  # fmt: skip


def there_and_back(value):
    packer = Packer()
    text = format_json(packer.pack(value, "it"))
    return Unpacker(packer.tensors, "it").unpack(json.loads(text))


def same(a, b):
    """Equal, of the same type, all the way down; NaN is itself, and -0 is not 0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        bits = a.shape == b.shape and a.dtype == b.dtype and (a.stride() == b.stride() or not a.numel())
        return bits and torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        )
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, float):
        return b != b if a != a else a == b and math.copysign(1, a) == math.copysign(1, b)
    if isinstance(a, dict):
        return list(map(type, a)) == list(map(type, b)) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, deque) and a.maxlen != b.maxlen:
        return False
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    bits = torch.tensor(
        draw(st.lists(st.integers(0, 255), min_size=16 * math.prod(shape), max_size=16 * math.prod(shape)))
    )
    dtype = draw(st.sampled_from(DTYPES))
    whole = bits.to(torch.bool) if dtype == torch.bool else bits.to(torch.uint8).view(dtype)
    order = draw(st.permutations(range(len(shape))))
    flat = whole[: math.prod(shape)].clone()
    return flat.view([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(shape))])


keys = (
    st.text(max_size=3)
    | st.sampled_from(["$tensor", "$", "a/b"])
    | st.integers()
    | st.none()
    | st.tuples(st.integers())
)
plain = (
    st.none() | st.booleans() | st.integers() | st.text() | st.floats() | st.binary(max_size=5) | st.complex_numbers()
)
numpy = st.sampled_from([np.float32(1.1), np.int64(-3), np.arange(3.0), np.zeros((), np.uint8), np.ones((2, 0))])
torches = tensors() | st.sampled_from([torch.Size([2, 3]), torch.float16, torch.device("cpu")])
values = st.recursive(
    plain | numpy | torches,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.builds(deque, st.lists(inner, max_size=3), st.none() | st.just(3))
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(st.integers(), st.integers(), max_size=3).map(Counter)
        | st.sets(st.integers() | st.text(), max_size=3)
        | st.frozensets(st.integers(), max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(values)
def test_values_come_back(value):
    assert same(value, there_and_back(value))


def test_what_is_one_stays_one():
    tensor = torch.randn(3)
    back = there_and_back({"a": tensor, "b": [tensor, tensor.view(3, 1)]})
    assert back["a"] is back["b"][0] and back["a"] is not back["b"][1]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (len, "`it` is a builtins.builtin_function_or_method, which cannot be saved without pickle; numbers, strings, "
              "tensors and lists, tuples, sets and dicts of them can"),
        ({"a": [defaultdict(int)]}, "`it/a/0` is a collections.defaultdict, which cannot be saved without pickle; "
         "numbers, strings, tensors and lists, tuples, sets and dicts of them can"),
        (torch.empty(2, device="meta"), "`it` is on the meta device and has no values"),
        (torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], check_invariants=True), "`it` is torch.sparse_coo, and "
         "as a dense tensor does not come back the same or is too large"),
        (torch.zeros(2).to(torch.float8_e8m0fnu), "`it` is torch.float8_e8m0fnu, which "
         "safetensors cannot hold"),
    ],
    ids=["a function", "a default", "meta", "sparse", "a dtype"],
)  # fmt: skip
def test_what_cannot_be_saved_is_said(value, words):
    with pytest.raises(errors.CheckpointError) as caught:
        Packer().pack(value, "it")
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"$tensor": "b"}, "it names a tensor `b`, which is not in the file beside it"),
        ({"$tensor": ["a"]}, "it cannot be read: TypeError"),
        ({"$tensor": "a", "order": [0, 0]}, "it cannot be read: ValueError"),
        ({"$tensor": "a", "order": [2**40]}, "it cannot be read: "),
        ({"$pickle": "gASV"}, "it holds `$pickle`, which this version of ecospa_fx does not know"),
        ({"$set": [[1]]}, "it cannot be read: TypeError: unhashable"),
        ({"$scalar": ["V1000000", 3]}, "it cannot be read: ValueError: 'V1000000' is not a dtype of numbers"),
        ({"$array": ["O", {"$tensor": "a"}]}, "it cannot be read: ValueError: 'O' is not a dtype of numbers"),
        ({"$dtype": "load"}, "it cannot be read: ValueError: torch has no dtype 'load'"),
        ({"$float": "1" * 9}, "it cannot be read: ValueError: '111111111' is not one of inf, -inf, nan"),
        ({"$bytes": "?"}, "it cannot be read: Error: "),
        ({"$deque": []}, "it cannot be read: IndexError"),
    ],
)
def test_what_nobody_packed_is_refused(document, words):
    with pytest.raises(errors.CheckpointError) as caught:
        Unpacker({"a": torch.zeros(2, 3)}, "it").unpack(document)
    assert str(caught.value).startswith(words)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    model = ecospa_fx.compile(Net(), example_inputs=(torch.randn(3, 6),))
    ecospa_fx.shrink(model, {"ffn": torch.arange(0, 10, 2)})
    return model


def fresh(base, tmp_path, **held):
    """A model as `base`, with the weights it has after whatever was done to it."""
    ecospa_fx.save(base, tmp_path, **held)
    return ecospa_fx.load(tmp_path, Net)


def stepped(model, optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype)
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(lambda seed=seed: torch.tensor(1.0 / (1 + seed)))
        else:
            optimizer.step()
    return model


matrices = lambda model: [p for p in model.parameters() if p.ndim == 2]  # noqa: E731
OPTIMIZERS = {
    "AdamW": {"amsgrad": True},
    "Adam": {"fused": True},
    "NAdam": {"decoupled_weight_decay": True},
    "RAdam": {},
    "Adamax": {},
    "SGD": {"momentum": 0.9, "lr": 0.1},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "Adagrad": {"initial_accumulator_value": 0.1},
    "Adadelta": {},
    "Adafactor": {},
    "ASGD": {"t0": 1},
    "Rprop": {},
    "LBFGS": {"max_iter": 3},
    "Muon": {"lr": torch.tensor(0.01)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on(base, tmp_path, name, dtype):
    """Two steps, a save, two more: state and weights are those of four steps, also where torch would cast them."""
    options = OPTIMIZERS[name] | ({"lr": 0.01} if "lr" not in OPTIMIZERS[name] else {})

    def make(model):
        return getattr(torch.optim, name)(matrices(model) if name == "Muon" else model.parameters(), **options)

    model = fresh(base, tmp_path / "base").to(dtype)
    optimizer = make(model)
    stepped(model, optimizer, range(2))
    loaded = fresh(model, tmp_path / "run", optimizer=optimizer)
    other = make(loaded)
    ecospa_fx.resume(tmp_path / "run", loaded, optimizer=other)
    assert same(optimizer.state_dict(), other.state_dict())
    stepped(model, optimizer, (2, 3)), stepped(loaded, other, (2, 3))
    assert same(optimizer.state_dict(), other.state_dict())
    assert all(map(torch.equal, model.parameters(), loaded.parameters()))


class Warm:
    """A schedule of a user's own, with a state."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        return 1 / (1 + step + self.calls)


SCHEDULERS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, Warm()),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 4, 4]),
    "ConstantLR": lambda o: lrs.ConstantLR(o),
    "LinearLR": lambda o: lrs.LinearLR(o),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 2, 2),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 2, mode="exp_range", gamma=0.9),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=12),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)], o),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)], [3]),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on(base, tmp_path, name):
    def steps(optimizer, schedule, losses):
        rates = []
        for loss in losses:
            optimizer.step()
            schedule.step(loss) if name == "ReduceLROnPlateau" else schedule.step()
            rates += [optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]]
        return rates

    optimizer = torch.optim.SGD(base.parameters(), lr=0.1, momentum=0.9)
    schedule = SCHEDULERS[name](optimizer)
    steps(optimizer, schedule, [3.0, 2.0, 2.5])
    loaded = fresh(base, tmp_path, optimizer=optimizer, scheduler=schedule)
    other = torch.optim.SGD(loaded.parameters(), lr=0.1, momentum=0.9)
    again = SCHEDULERS[name](other)
    ecospa_fx.resume(tmp_path, loaded, optimizer=other, scheduler=again)
    losses = [2.6, 2.7, 2.8, 1.0, 2.0]
    assert steps(optimizer, schedule, losses) == steps(other, again, losses)


def test_generators_and_averages_go_on(base, tmp_path):
    average = torch.optim.swa_utils.AveragedModel(base)
    held = {"average": average, "torch": torch.Generator().manual_seed(3), "numpy": np.random.default_rng(4),
            "python": random.Random(5)}  # fmt: skip
    average.update_parameters(base)
    with torch.no_grad():
        average.module.up.weight.add_(1)

    def draw(held):
        return (torch.rand(2, generator=held["torch"]).tolist(), held["numpy"].normal(), held["python"].gauss(0, 1),
                torch.rand(2).tolist(), np.random.rand(), random.random())  # noqa: NPY002  # fmt: skip

    draw(held)
    loaded = fresh(base, tmp_path, also=held)
    expected = draw(held)
    new = {"average": torch.optim.swa_utils.AveragedModel(loaded), "torch": torch.Generator(),
           "numpy": np.random.default_rng(), "python": random.Random()}  # fmt: skip
    ecospa_fx.resume(tmp_path, loaded, also=new)
    assert draw(new) == expected
    assert torch.equal(new["average"].module.up.weight, average.module.up.weight)
    assert int(new["average"].n_averaged) == 1
    with pytest.raises(errors.CheckpointError, match=r"holds no state of also\['loader'\], only of also\['average'\]"):
        ecospa_fx.resume(tmp_path, loaded, also={"loader": torch.Generator()})
    ecospa_fx.save(base, tmp_path / "listed", also=[average, held["torch"]])
    loaded = ecospa_fx.load(tmp_path / "listed", Net)
    ecospa_fx.resume(tmp_path / "listed", loaded, also=[torch.optim.swa_utils.AveragedModel(loaded), new["torch"]])
    assert torch.equal(new["torch"].get_state(), held["torch"].get_state())
    before = torch.get_rng_state()
    ecospa_fx.resume(tmp_path / "listed", loaded, rng=False)
    assert torch.equal(before, torch.get_rng_state())


def test_a_scaler_goes_on_and_a_switched_off_one_is_refused(base, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaler.update(4.0)
    loaded = fresh(base, tmp_path, scaler=scaler)
    other = torch.amp.GradScaler("cpu")
    ecospa_fx.resume(tmp_path, loaded, scaler=other)
    assert other.state_dict() == scaler.state_dict() and other.get_scale() == 4.0
    loaded = fresh(base, tmp_path, scaler=torch.amp.GradScaler("cpu", enabled=False))
    with pytest.raises(errors.CheckpointError, match=r"scaler does not take the state in .*: RuntimeError: "):
        ecospa_fx.resume(tmp_path, loaded, scaler=other)


def test_all_take_their_state_or_none(base, tmp_path):
    """The last of them fails; the first, and the random numbers, are as before."""

    class Picky:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise ValueError("not mine")

    model = fresh(base, tmp_path / "base")
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer, range(2))
    loaded = fresh(model, tmp_path / "run", optimizer=optimizer, also={"picky": Picky()})
    other = torch.optim.AdamW(loaded.parameters(), lr=0.5)
    stepped(loaded, other, range(1))
    before, rng = there_and_back(other.state_dict()), torch.get_rng_state()
    with pytest.raises(errors.CheckpointError) as caught:
        ecospa_fx.resume(tmp_path / "run", loaded, optimizer=other, also={"picky": Picky()})
    assert str(caught.value) == f"also['picky'] does not take the state in {tmp_path / 'run'}: ValueError: not mine"
    assert same(other.state_dict(), before) and torch.equal(rng, torch.get_rng_state())


def test_other_things_than_were_saved_are_refused(base, tmp_path):
    model = fresh(base, tmp_path / "base")
    optimizers = [torch.optim.SGD(matrices(model), lr=0.1), torch.optim.AdamW([model.up.bias, model.down.bias])]
    schedule = lrs.StepLR(optimizers[0], 2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizers[0], target=0.9, interval=3)
    loaded = fresh(model, tmp_path / "run", optimizer=optimizers, scheduler=schedule, trainer=trainer)

    def refused(words, **held):
        with pytest.raises(errors.CheckpointError) as caught:
            ecospa_fx.resume(tmp_path / "run", loaded, **held)
        assert str(caught.value) == words.replace("RUN", str(tmp_path / "run"))

    sgd = torch.optim.SGD(matrices(loaded), lr=0.1)
    adamw = torch.optim.AdamW([loaded.up.bias, loaded.down.bias])
    refused(
        "RUN holds the state of 2 optimizers, and resume was given 1; pass as many as were saved, in the same order",
        optimizer=sgd,
    )
    refused("RUN holds state of SGD, not of AdamW", optimizer=[adamw, sgd])
    refused(
        "the optimizer groups parameters differently from the saved one: 1 groups of [2] parameters, saved [2]; the "
        "first that differs is `down.bias`, saved `up.bias`",
        optimizer=[sgd, torch.optim.AdamW([loaded.down.bias, loaded.up.bias])],
    )
    refused("RUN holds state of StepLR, not of ExponentialLR", scheduler=lrs.ExponentialLR(sgd, 0.9))
    refused("RUN holds no scaler state: it was saved without scaler=", scaler=torch.amp.GradScaler("cpu"))
    refused(
        "the trainer has interval=4 and the saved one interval=3; make it with the same settings, or omit trainer= "
        "to begin a new schedule",
        trainer=ecospa_fx.EcoSpaTrainer(loaded, sgd, target=0.9, interval=4),
    )
