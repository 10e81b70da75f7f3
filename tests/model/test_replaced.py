"""Replaced parts: whatever a loop puts in place of a part of a captured region, the next call is right."""

import copy
import enum
import types

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx.model.lookup import regions_of
from ecospa_fx.passes.ir.guards import setting_read
from ecospa_fx.passes.ir.unchanged import unchanged

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Config:
    """Settings that look themselves up in Python, under other names too."""

    def __init__(self, gain) -> None:
        self.gain = gain

    def __getattribute__(self, name):
        return object.__getattribute__(self, {"strength": "gain"}.get(name, name))


class Scaled(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.config, self.linear, self.dropout = config, nn.Linear(4, 4), nn.Dropout(0.5)
        self.steps, self.extra = [1.0, 2.0], {"a": 1.0}

    def forward(self, x):
        gain = self.config.gain if not hasattr(self.config, "off") else 0.0
        return self.dropout(self.linear(x)) * gain * self.steps[1] * self.extra["a"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = Config(0.5)
        self.first, self.second, self.act = Scaled(config), Scaled(config), nn.ReLU()

    def forward(self, x):
        return self.act(self.second(self.act(self.first(x))))


def _other_linear(model):
    model.second.linear = nn.Linear(4, 4)
    nn.init.constant_(model.second.linear.weight, 0.3)
    nn.init.constant_(model.second.linear.bias, 0.3)


CHANGES = {
    "a layer of another class": lambda m: setattr(m, "act", nn.Tanh()),
    "a layer of the same class": _other_linear,
    "a layer that is taken out": lambda m: setattr(m, "first", nn.Identity()),
    "a forward on an instance": lambda m: setattr(m.second, "forward", lambda x: 7 * x),
    "an object that two layers hold, in one": lambda m: setattr(m.second, "config", Config(0.25)),
    "an attribute of it": lambda m: setattr(m.second.config, "gain", 0.25),
    "an attribute that it did not have": lambda m: setattr(m.first.config, "off", True),
    "an attribute that its class did not have": lambda m: setattr(type(m.first.config), "off", True),
    "an item of a list": lambda m: m.first.steps.__setitem__(1, 5.0),
    "a list": lambda m: setattr(m.first, "steps", [1.0, 3.0]),
    "an entry of a dict": lambda m: m.first.extra.__setitem__("a", 4.0),
    "training": lambda m: m.train(),
    "training of one layer": lambda m: m.second.dropout.train(),
    "a hook": lambda m: m.act.register_forward_hook(lambda module, args, result: result + 1),
    "hooks in a dict of their own": lambda m: m.act.__dict__.update(
        _forward_hooks={0: lambda module, args, result: result + 1}
    ),
}


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    plain = Model().eval()
    return plain, ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(X,), regions="root")


@pytest.fixture
def models(compiled):
    models = copy.deepcopy(compiled)
    for model in models:
        model(X)
    yield models
    if hasattr(Config, "off"):
        del Config.off


def outputs(model):
    torch.manual_seed(0)
    return model(X)


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_call_is_that_of_the_plain_model(models, change):
    before = outputs(models[0])
    for model in models:
        CHANGES[change](model)
    plain, mine = (outputs(model) for model in models)
    assert torch.allclose(plain, mine) and not torch.allclose(plain, before)


@pytest.mark.parametrize("change", CHANGES)
def test_the_guard_sees_it(models, change):
    model = models[1]
    captured = regions_of(model)[""].naming_graph.captured
    settings = [setting_read(*place, value) for place, value in captured.settings.items()]
    holds = unchanged(model, [*settings, *captured.reads])
    assert holds() and holds()
    CHANGES[change](model)
    assert not holds()


def test_equal_values_in_place_of_others_are_no_change(models):
    plain, model = models
    for each in models:
        each.first.steps, each.first.config = [1.0, float("2.0")], each.first.config
        each.second.dropout.p = float("0.5")
    assert torch.allclose(plain(X), model(X)) and len(regions_of(model)[""].specializations) == 1


def test_a_value_that_is_made_anew_at_every_call_is_followed_without_a_guard(models):
    model = models[1]
    for _ in range(40):
        model.first.extra = dict(model.first.extra)
        model(X)
    assert len(regions_of(model)[""].specializations) == 1
    for each in models:
        each.first.extra = {"a": 3.0}
    assert torch.allclose(models[0](X), model(X))


class Kind(enum.Enum):
    PLAIN = "plain"
    OTHER = "other"


class Registry(dict):
    """A dict of functions, in whose `get` there is no default."""

    def get(self, name):
        return self[name]


REGISTRY = Registry(plain=torch.relu, other=torch.tanh)
TAU = 1.0


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        kind, notes, note = Kind.PLAIN if TAU < 9 else Kind.OTHER, {}, types.SimpleNamespace()
        notes["kind"] = kind
        setattr(note, "kind", kind)  # noqa: B010 - in a call
        return self.down(REGISTRY.get(note.kind.value)(self.up(x))) * TAU


def test_globals_that_nobody_can_assign_or_look_up_as_usual_hide_no_others(monkeypatch):
    torch.manual_seed(0)
    plain = Chooses()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(X,), regions="root")
    assert torch.allclose(plain(X), model(X))
    monkeypatch.setitem(globals(), "TAU", 10.0)
    assert torch.allclose(plain(X), model(X))
    monkeypatch.setitem(globals(), "REGISTRY", Registry(other=torch.sigmoid))
    assert torch.allclose(plain(X), model(X))
