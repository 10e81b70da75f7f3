"""First calls that do more than the others: they fill caches, draw, or set weights from the first batch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ecospa_fx
from ecospa_fx.errors import CaptureError, NotNowError

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
KEEP = torch.tensor([0, 1, 3, 4, 6, 7])


class Net(nn.Module):
    """A layer pair with a step between that its first call prepares."""

    def __init__(self, prepare):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)
        self.scale, self.ready = nn.Parameter(torch.ones(8)), False
        self.register_buffer("mean", torch.zeros(8))
        self.prepare = prepare

    def forward(self, x):
        h = self.up(x)
        if not self.ready:
            self.prepare(self, h.detach())
            self.ready = True
        return self.down(F.relu((h - self.mean) * self.scale))


def _in_place(net, h):
    with torch.no_grad():
        net.scale.copy_(1 / h.std(0))


def _other_data(net, h):
    net.scale.data = 1 / h.std(0)


def _buffer(net, h):
    net.mean.copy_(h.mean(0))


def _drawn(net, h):
    nn.init.normal_(net.scale)


PREPARED = {_in_place: "changes `scale`", _other_data: "changes `scale`", _buffer: "changes `mean`",
            _drawn: "draws from the random generator of torch"}  # fmt: skip


def _pair(prepare, **options):
    torch.manual_seed(0)
    plain = Net(prepare).double()
    return plain, ecospa_fx.compile(copy.deepcopy(plain), **options)


@pytest.mark.parametrize("execution", ["graph", "module"])
@pytest.mark.parametrize("prepare", PREPARED)
def test_it_happens_once_as_in_the_plain_model(prepare, execution):
    plain, model = _pair(prepare, example_inputs=(X,), execution=execution)
    for call in range(3):
        torch.manual_seed(call)
        expected = plain(X), torch.rand(1)
        torch.manual_seed(call)
        assert torch.equal(model(X), expected[0]) and torch.equal(torch.rand(1), expected[1])
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    ecospa_fx.shrink(model, {"ffn": KEEP})
    with torch.no_grad():
        plain.down.weight[:, [2, 5]] = 0
    torch.testing.assert_close(model(X), plain(X))


@pytest.mark.parametrize("prepare", PREPARED)
def test_after_a_shrink_no_graph_can_do_it(prepare):
    """It was lost without a word: the flag was set, the weights were not."""
    _, model = _pair(prepare, example_inputs=(X,))
    ecospa_fx.shrink(model, {"ffn": KEEP})
    before = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(NotNowError) as caught:
        model(X)
    assert str(caught.value) == (
        f"the model sets `ready` in its first call of this kind, and {PREPARED[prepare]}, which its graph of later "
        "calls would not; the model has shrunk, and its own Python is of the original sizes. Make such a call before "
        "the first shrink"
    )
    assert not model.ready and torch.equal(before[0], torch.get_rng_state())
    assert all(torch.equal(t, before[1][name]) for name, t in model.state_dict().items())


class Caching(nn.Module):
    def __init__(self, made):
        super().__init__()
        self.up, self.down, self.cache, self.made = nn.Linear(4, 8), nn.Linear(8, 3), {}, made

    def forward(self, x):
        if "k" not in self.cache:
            self.cache["k"] = self.made()
        return self.down(F.relu(self.up(x)) * self.cache["k"])


def test_a_cache_that_is_computed_is_filled_after_a_shrink_too():
    torch.manual_seed(0)
    plain = Caching(lambda: torch.arange(8.0))
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(X.float(),))
    ecospa_fx.shrink(model, {"ffn": KEEP})
    with torch.no_grad():
        plain.down.weight[:, [2, 5]] = 0
    torch.testing.assert_close(model(X.float()), plain(X.float()))
    assert torch.equal(model.cache["k"], torch.arange(8.0))


def test_a_cache_that_is_not_a_dict_any_more_is_another():
    torch.manual_seed(0)
    plain = Caching(lambda: torch.arange(8.0))
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(X.float(),))
    for other in (None, [], {}):
        for net in (plain, model):
            net.cache = other
        expected = _tried(plain)
        found = _tried(model)
        assert torch.equal(expected, found) if other == {} else type(expected) is type(found)


def _tried(net):
    try:
        return net(X.float())
    except TypeError as error:
        return error


class Table(nn.Module):
    """A table that a longer call registers anew, as tables of rotations are."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.register_buffer("table", torch.ones(3, 4), persistent=False)

    def forward(self, x):
        if len(x) > len(self.table):
            self.register_buffer("table", torch.arange(4.0 * len(x)).reshape(-1, 4).cos().to(x), persistent=False)
        return self.down(self.up(x * self.table[: len(x)]).relu())


@pytest.mark.parametrize("execution", ["graph", "module"])
def test_a_table_may_be_registered_anew_before_a_shrink(execution):
    torch.manual_seed(0)
    plain = Table().double()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(X,), execution=execution)
    longer = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(9, 4)
    for x in (longer, longer, X):
        assert model(x).allclose(plain(x), rtol=1e-12)
        assert [c.name for c in ecospa_fx.couplings(model)] == ["ffn"]
    ecospa_fx.shrink(model, {"ffn": KEEP})
    with torch.no_grad():
        for gone in (2, 5):
            plain.down.weight[:, gone] = 0
    for x in (longer, X):
        assert model(x).allclose(plain(x), rtol=1e-12)
    longest = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(12, 4)
    if execution == "module":
        assert model(longest).allclose(plain(longest), rtol=1e-12)
        return
    with pytest.raises(CaptureError, match=r"registers `table` in its first call; .* make it before the first shrink$"):
        model(longest)
