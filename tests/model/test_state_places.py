"""Places of state: wherever a forward keeps a value, it is put back by trials, and followed or refused by graphs."""

import collections
import copy
import itertools
import random
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ecospa_fx
from ecospa_fx.errors import CaptureError
from ecospa_fx.passes.graph.isolate import isolated, restored_parameters, seed
from ecospa_fx.passes.graph.iterators import copied, position
from ecospa_fx.passes.graph.python_state import PythonState
from ecospa_fx.passes.graph.stores import watched_stores

X = torch.linspace(-1, 1, 12).reshape(3, 4)
KINDS = {"flag": True}


def remembered(seen=[0]):  # noqa: B006
    seen[0] += 1
    return seen[0]


def values():
    yield from (1.0, 2.0, 3.0)


class Keeper(nn.Module):
    """A perceptron that calls `does(self, hidden)`, and has places of many kinds."""

    level = None

    def __init__(self, does) -> None:
        super().__init__()
        self.up, self.down, self.does = nn.Linear(4, 6), nn.Linear(6, 2), does
        self.table, self.items, self.space = {"on": True}, [True], types.SimpleNamespace(on=True)
        self.last, self.order = collections.deque([True] * 2, maxlen=2), collections.OrderedDict(a=1, b=2)
        self.draws, self.values, self.rng = iter([0.5, 0.25, 2.0] * 9), values(), random.Random(0)
        self.generator, self.switch = torch.Generator().manual_seed(0), nn.Module()

    def forward(self, x):
        return self.down(self.does(self, F.gelu(self.up(x))))


def _and(does):
    return lambda self, h: (does(self, h), h)[1]


def _grad(_):
    return torch.is_grad_enabled()


WRITES = {
    "a dict": _and(lambda self, h: self.table.update(on=_grad(h))),
    "a list": _and(lambda self, h: self.items.__setitem__(0, h.requires_grad)),
    "a namespace": _and(lambda self, h: setattr(self.space, "on", _grad(h))),
    "a full deque": _and(lambda self, h: self.last.append(_grad(h))),
    "a class": _and(lambda self, h: setattr(type(self), "level", _grad(h))),
    "a global": _and(lambda self, h: KINDS.__setitem__("flag", h.requires_grad)),
    "by size": _and(lambda self, h: self.table.__setitem__("on", h.shape[0] > 4)),
    "a default argument": _and(lambda self, h: remembered()),
    "an iterator": lambda self, h: h * next(self.draws),
    "a generator": lambda self, h: h * next(self.values),
    "a random generator": lambda self, h: h * self.rng.random(),
    "the mode of a child": _and(lambda self, h: self.switch.train(not torch.is_grad_enabled())),
}


@pytest.mark.parametrize("does", WRITES.values(), ids=list(WRITES))
def test_what_a_forward_writes_is_refused_wherever_it_lies_and_left_as_it_was(does):
    model = Keeper(does)
    world = PythonState(model)
    with pytest.raises(CaptureError):
        ecospa_fx.compile(model, example_inputs=(X,), regions="root")
    assert not [change.where for change in world.changes()]
    assert next(model.values) == 1.0  # which nothing has drawn from


def test_places_that_a_forward_leaves_alone_are_no_obstacle():
    model = ecospa_fx.compile(Keeper(_and(lambda self, h: self.table.get("on"))), example_inputs=(X,))
    assert ecospa_fx.couplings(model)


class MadeOnLookup(collections.OrderedDict):
    """A registry of classes that gives out instances."""

    def __getitem__(self, key):
        return super().__getitem__(key)()


ACTIVATIONS = MadeOnLookup(gelu=nn.GELU, relu=nn.ReLU)


def test_a_registry_that_makes_what_is_looked_up_is_read_and_left_as_it_was():
    def chosen(_, hidden):
        return ACTIVATIONS["gelu"](hidden)

    model = ecospa_fx.compile(Keeper(chosen), example_inputs=(X,), regions="root")
    assert list(ACTIVATIONS.values()) == [nn.GELU, nn.ReLU]
    whole = model(X)
    assert ecospa_fx.verify(model, example_inputs=(X,)).ok
    ACTIVATIONS.update(gelu=nn.ReLU)
    try:
        assert not torch.equal(model(X), whole)  # its own Python, or another graph
        assert list(ACTIVATIONS.values()) == [nn.ReLU, nn.ReLU]
    finally:
        ACTIVATIONS.update(gelu=nn.GELU)


class Defaults(nn.Module):
    """A perceptron whose forward has containers among its default arguments, and a function with such ones."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x, mask=None, options: dict[str, int] = {}, *, sizes=[]):  # noqa: B006
        return self.down(F.gelu(scaled(self.up(x), **options)))


def scaled(x, factors=[2.0], table={}):  # noqa: B006
    return x * factors[0] if not table else x


def test_default_arguments_that_a_forward_only_reads_are_no_obstacle():
    model = Defaults()
    compiled = ecospa_fx.compile(copy.deepcopy(model), example_inputs=(X,), regions="root")
    assert torch.equal(compiled(X), model(X))
    ecospa_fx.shrink(compiled, {ecospa_fx.couplings(compiled)[0]: torch.arange(3)})
    assert ecospa_fx.verify(compiled, example_inputs=(X,)).ok


def test_a_result_that_depends_on_the_gradient_mode_is_refused():
    with pytest.raises(CaptureError, match=r"output 0 without gradients \(torch.no_grad\) is another than with them"):
        ecospa_fx.compile(
            Keeper(lambda self, h: h * 2 if torch.is_grad_enabled() else h), example_inputs=(X,), regions="root"
        )


def test_a_store_at_an_equal_value_is_told_from_none():
    owner = types.SimpleNamespace(a=True, b=None, c=3, d={"k": "text"}, e=[False, 1.5])
    model = nn.Module()
    model.owner = owner

    def writes():
        owner.b = None
        owner.d["k"] = "text"
        owner.e[1] = 1.5

    state = PythonState(model)
    with watched_stores(state) as stores:
        writes()
    assert sorted(change.where for change in stores.anew()) == ["owner.b", "owner.d['k']", "owner.e[1]"]
    assert owner == types.SimpleNamespace(a=True, b=None, c=3, d={"k": "text"}, e=[False, 1.5])
    assert type(owner.c) is int


@pytest.mark.parametrize(
    "make",
    [
        lambda: iter([1, 2, 3]),
        lambda: itertools.count(3),
        lambda: itertools.cycle(iter([1, 2])),
        lambda: enumerate(iter([5, 6])),
        lambda: itertools.chain(iter([1]), [2, 3]),
        lambda: zip(iter([1, 2, 3]), range(3), strict=False),
    ],
)
def test_a_copy_of_an_iterator_draws_nothing_from_it(make):
    iterator = make()
    first = next(copied(iterator, "it"))
    before = position(iterator)
    assert first == next(copied(iterator, "it")) == next(iterator)
    assert position(iterator) != before


def test_an_ordered_dict_comes_back_in_its_order():
    model = Keeper(None)
    with isolated(model):
        model.order.move_to_end("a")
        model.order["c"] = 3
    assert list(model.order.items()) == [("a", 1), ("b", 2)]


def test_one_look_at_a_state_restores_it_each_time():
    model, counts = Keeper(None), iter(range(9))
    model.drawn = counts
    state = PythonState(model)
    for _ in range(2):
        with isolated(model, state):
            assert next(model.drawn) == 0
            model.order["c"] = 3
            model.more = 1
        assert list(model.order.items()) == [("a", 1), ("b", 2)] and not hasattr(model, "more")
        assert model.drawn is counts
    assert next(counts) == 0


def test_seeds_are_those_of_torch():
    torch.manual_seed(3)
    theirs = torch.randn(5)
    seed(3)
    assert torch.equal(torch.randn(5), theirs)


def test_parameters_are_put_back_however_they_are_written():
    model, memory = nn.Module(), torch.zeros(6)
    model.a, model.b = nn.Parameter(memory[:3]), nn.Parameter(memory[3:])
    with restored_parameters(model), torch.no_grad():
        model.a.fill_(1)
        torch.ops.aten.mul_.Scalar(model.b.add_(1), 2)
        model.a.set_(torch.ones(3))
    assert torch.equal(memory, torch.zeros(6)) and model.a.data_ptr() == memory.data_ptr()


def test_a_hook_that_changes_values_and_more_is_refused_and_one_beside_it_only_looks():
    seen = []
    model, plain = Keeper(lambda self, h: h), Keeper(lambda self, h: h)
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        each.up.register_forward_hook(lambda module, args, out: out * 2)
        each.down.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    with pytest.warns(UserWarning, match="forward hooks on up are part of the captured graph"):
        ecospa_fx.compile(model, example_inputs=(X,), regions="root")
    assert seen == []
    assert torch.allclose(model(X), plain(X)) and seen == [3, 3]
    plain.up.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    with pytest.raises(CaptureError, match="a forward hook on `up` in the model changes `seen in"):
        ecospa_fx.compile(plain, example_inputs=(X,), regions="root")


def test_a_loaded_model_runs_a_call_that_cannot_be_captured_by_its_own_python(tmp_path):
    def draws(self, h):
        return h * (0.5 + random.random()) if self.training else h

    model = ecospa_fx.compile(Keeper(draws).eval(), example_inputs=(X,))
    ecospa_fx.save(model, tmp_path / "saved")
    loaded = ecospa_fx.load(tmp_path / "saved", lambda: Keeper(draws)).train()
    random.seed(0)
    first, second = loaded(X), loaded(X)
    assert not torch.allclose(first, second)


MEAN = types.SimpleNamespace(of=torch.zeros(4, dtype=torch.float64))


class Centred(nn.Module):
    """A stream that is centred by a running mean, which lies in an object outside of the module."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x - MEAN.of
        with torch.no_grad():
            MEAN.of.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.head(x + self.down(torch.tanh(self.up(x))))


def test_an_axis_along_which_other_memory_is_written_stays_whole():
    torch.manual_seed(0)
    plain, x = Centred().double(), torch.randn(5, 3, dtype=torch.float64)
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,))
    (ffn,) = ecospa_fx.couplings(model)
    assert "aten.add_ writes into memory that does not shrink" in str(ecospa_fx.explain(model))
    ecospa_fx.shrink(model, {ffn: torch.arange(1, 6)})
    with torch.no_grad():
        plain.down.weight[:, 0] = 0
    means = []
    for each in (model, plain):
        MEAN.of.zero_()
        out = [each(x), each(2 * x)]
        means.append((MEAN.of.clone(), out))
    torch.testing.assert_close(*means)


class Noting(nn.Module):
    """Keeps a tensor for itself from one method to the next, and lets go of it, as layers over graphs do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
        self.weights = None

    def message(self, x):
        self.weights = self.a(x).softmax(-1)
        return self.weights * 2

    def forward(self, x):
        y = self.message(x)
        y, self.weights = y + self.weights, None
        return self.b(y)


def test_what_a_forward_keeps_for_itself_and_clears_is_no_obstacle():
    """The attribute is None before the call and after it; a call that finds something else there clears it, too."""
    torch.manual_seed(0)
    plain = Noting()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(X,))
    (coupling,) = ecospa_fx.couplings(model)
    for shrunk in (False, True):
        if shrunk:
            ecospa_fx.shrink(model, {coupling: torch.tensor([0, 2, 3, 5])})
        for found in (None, "something", torch.ones(2)):
            model.weights = plain.weights = found
            result = model(X)
            assert model.weights is None
            if not shrunk:
                assert torch.equal(result, plain(X))
