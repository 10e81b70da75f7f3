"""Class places: attributes of classes that a forward looks up stay in place, and are followed when they change."""

import copy
import enum
import types

import pytest
import torch
from torch import nn

import ecospa_fx

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Meta(type):
    factor = 1.0


class Backend(metaclass=Meta):
    scale = 2.0

    @classmethod
    def pick(cls):
        found, waiting = [], cls.__subclasses__()
        while waiting and len(found) < 100:
            found.append(waiting.pop())
            waiting += found[-1].__subclasses__()
        return found[-1]

    @staticmethod
    def act(x):
        return torch.relu(x)


class Plain(Backend):
    pass


class Mode(enum.Enum):
    UP = 1
    DOWN = 2


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Net(nn.Module):
    """A perceptron that looks up attributes of classes in every way that Python has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.mode = nn.Linear(4, 8), nn.Linear(8, 4), Mode.UP

    def forward(self, x):
        subclasses = Backend.__subclasses__()
        h = subclasses[0].pick().act(self.up(x)) if len(subclasses) > 1 else Backend.pick().act(self.up(x))
        h = h * Plain.scale * Plain.factor
        return self.down(h if self.mode is Mode.UP else -h)


def helper(x):
    return x


class Function(Net):
    def forward(self, x):
        if helper.__module__ == Backend.__module__ and Backend.__name__ == "Backend":
            x = helper(x)
        return self.down(Double.apply(torch.relu(self.up(x))))


def held():
    return {cls: dict(vars(cls)) for cls in (Meta, Backend, Plain, Mode, Double)}


@pytest.mark.parametrize("net", [Net, Function])
@pytest.mark.parametrize("regions", ["auto", "root"])
def test_a_lookup_leaves_the_class_as_it_was(net, regions):
    before, plain = held(), net()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(X,), regions=regions)
    (coupling,) = ecospa_fx.couplings(model)
    ecospa_fx.shrink(model, {coupling: torch.arange(3)})
    with torch.no_grad():
        plain.down.weight[:, 3:] = 0
    assert torch.allclose(model(X), plain(X), atol=1e-6)
    assert held() == before
    assert Plain.__subclasses__() == [] and Plain.pick.__self__ is Plain


CHANGES = {
    "of a base": (Backend, "scale", 3.0),
    "set over that of a base": (Plain, "scale", 5.0),
    "of a metaclass": (Meta, "factor", 7.0),
    "a static method": (Backend, "act", staticmethod(torch.tanh)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_attribute_of_a_class_that_changes_is_followed(change, monkeypatch):
    plain = Net()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(X,), regions="root")
    before = model(X)
    monkeypatch.setattr(*CHANGES[change])
    assert torch.allclose(model(X), plain(X)) and not torch.allclose(model(X), before)


class Lazy:
    """Stands for a module that is imported at the first look at an attribute, and is not installed."""

    def __getattr__(self, name):
        raise ImportError(f"no {name}: it is not installed")


lazy, LAZY_MODULE = Lazy(), types.ModuleType("lazy_module")
LAZY_MODULE.__getattr__ = Lazy().__getattr__


class Careful(Net):
    def forward(self, x):
        if x.dim() > 9:
            return lazy.act(x) + LAZY_MODULE.act(x)
        return super().forward(x)


def test_what_the_forward_does_not_import_is_not_imported():
    model, expected = Careful(), Careful()(X)
    (coupling,) = ecospa_fx.couplings(ecospa_fx.compile(model, example_inputs=(X,)))
    torch.testing.assert_close(model(X), expected)
    ecospa_fx.shrink(model, {coupling: torch.arange(3)})
    assert model(X).shape == X.shape
