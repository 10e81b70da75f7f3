"""Class swaps: what user code does to the class of a compiled module is done to its own class."""

from __future__ import annotations

import copy
import pickle
from abc import ABC
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx


class Counting(nn.Module, ABC):
    calls = 0
    made: Any = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.made = (*cls.made, cls.__name__)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Net(Counting):
    @classmethod
    def count(cls) -> None:
        cls.calls += 1


@pytest.fixture
def net() -> Net:
    Net.calls = 0
    return ecospa_fx.compile(Net(), example_inputs=(torch.randn(2, 4),), regions="root")


def test_what_is_assigned_to_its_class_lands_on_the_original(net: Net) -> None:
    assert type(net) is not Net and type(net).__name__ == "Net"
    type(net).calls += 1
    net.__class__.calls += 1
    net.count()
    assert Net.calls == type(net).calls == net.calls == 3 and Counting.calls == 0
    type(net).late = 5
    assert Net.late == 5
    del type(net).late
    assert not hasattr(Net, "late")


def test_the_original_is_not_touched_by_making_the_class(net: Net) -> None:
    """A class of transformers writes into each of its subclasses as they are made."""
    assert Net.made == ("Net",) and type(net).made == ("Net", "Net")


def test_it_is_copied_and_pickled_as_before(net: Net) -> None:
    x = torch.randn(3, 4)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert isinstance(other, Net) and torch.equal(other(x), net(x))


def test_a_subclass_of_a_swapped_class_is_its_own() -> None:
    model = ecospa_fx.compile(Net(), example_inputs=(torch.randn(2, 4),), regions="root")
    inner = type("Inner", (type(model),), {})
    inner.calls = 9
    assert Net.calls != 9


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor):
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("regions", ["root", "blocks"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_script_or_a_symbolic_trace_is_right_or_refused(regions):
    x = torch.randn(3, 4)
    for execution in ("module", "graph"):
        model = nn.Sequential(Doubled(), Doubled())
        model = ecospa_fx.compile(model, example_inputs=(x,), regions=regions, execution=execution)
        ecospa_fx.shrink(model, {c: torch.arange(3) for c in ecospa_fx.couplings(model)})
        if execution == "module":
            torch.testing.assert_close(torch.jit.script(model)(x), model(x))
            torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
            continue
        for way in (torch.jit.script, torch.fx.symbolic_trace):
            with pytest.raises(
                ecospa_fx.errors.CaptureError, match=r"runs as generated code, into which torch\..* does"
            ):
                way(model)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


class Registered(nn.Module):
    """A layer whose subclasses have names in a register, and must say theirs."""

    register: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, name: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.register[name] = cls


class Halves(Registered, name="halves"):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("execution", ["graph", "module"])
def test_classes_that_ask_their_subclasses_for_arguments_know_of_no_stand_in(execution):
    """Nobody but the author of a subclass knows what to say."""
    model = ecospa_fx.compile(nn.Sequential(Halves(), Halves()), execution=execution)
    x = torch.randn(3, 4)
    model(x)
    ecospa_fx.shrink(model, {coupling: torch.arange(2) for coupling in ecospa_fx.couplings(model)})
    assert model(x).shape == (3, 4)
    assert Registered.register == {"halves": Halves}
    registered = Registered.register.copy()

    class Other(type(model[0]), name="other"):
        """A subclass that somebody else makes is registered as ever."""

    assert Registered.register.pop("other") is Other
    assert Registered.register == registered
