"""Results that are dataclasses, made anew at each call, handed on, or kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.errors import CaptureError

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(3, 8)


@dataclass
class Traced:
    hidden: Tensor
    number: int = 3
    more: Any = None
    seen: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.twice = 2 * self.hidden


@dataclass(frozen=True)
class Frozen:
    hidden: Tensor
    more: Any = None


@dataclass(slots=True)
class Slots:
    hidden: Tensor
    more: Any = None


class Base:
    def tripled(self) -> Tensor:
        return 3 * self.hidden  # type: ignore[attr-defined, no-any-return]


@dataclass
class Derived(Base):
    hidden: Tensor
    more: Any = None


class Block(nn.Module):
    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__()
        self.make = make
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.down(torch.tanh(self.up(x)))
        return x + y, self.make(y)


class Net(nn.Module):
    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList(Block(make) for _ in range(2)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        traces = []
        for block in self.blocks:
            x, trace = block(x)
            traces.append(trace)
        return self.head(x), traces


MAKES: dict[str, Callable[[Tensor], Any]] = {
    "of defaults": lambda y: Traced(y),
    "with a list": lambda y: Traced(y.exp(), seen=[y, y + 1]),
    "nested": lambda y: Traced(y, more={"inner": Frozen(y * 2, more=(Slots(y + 1), None))}),
    "frozen": lambda y: Frozen(y, more="text"),
    "slots": lambda y: Slots(y),
    "derived": lambda y: Derived(y),
    "replaced": lambda y: replace(Traced(y), number=5),
}


def leaves(value: Any) -> list[Any]:
    """All that results hold, with the classes on the way, by plain Python."""
    if isinstance(value, (list, tuple)):
        return [type(value), *(leaf for item in value for leaf in leaves(item))]
    if isinstance(value, dict):
        return [type(value), *(leaf for key, item in value.items() for leaf in [key, *leaves(item)])]
    names = [*getattr(value, "__dict__", {})] if hasattr(value, "__dict__") else getattr(type(value), "__slots__", ())
    if isinstance(value, Tensor) or not names:
        return [value]
    return [type(value), *(leaf for name in names for leaf in [name, *leaves(getattr(value, name))])]


def assert_equal(mine: Any, theirs: Any) -> None:
    a, b = leaves(mine), leaves(theirs)
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
            assert one.requires_grad == other.requires_grad
        else:
            assert one == other


@pytest.mark.parametrize("name", MAKES)
def test_a_dataclass_that_a_block_makes_leaves_its_region(name: str) -> None:
    plain = Net(MAKES[name]).double()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(X,), regions="blocks")
    assert [c.name for c in ecospa_fx.couplings(model)] == ["blocks.0.ffn", "blocks.1.ffn"]
    first, second = model(X), model(X)
    assert_equal(first, plain(X))
    assert first[1][0] is not second[1][0]
    keep = torch.tensor([0, 2, 5])
    ecospa_fx.shrink(model, {"blocks.0.ffn": keep})
    gone = torch.ones(6, dtype=torch.bool).index_fill(0, keep, False)
    with torch.no_grad():
        plain.blocks[0].down.weight[:, gone] = 0
    assert_equal(model(X), plain(X))


def test_across_regions_and_by_the_root_too() -> None:
    plain = Net(MAKES["nested"]).double()
    for regions in ("joined", "root"):
        model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(X,), regions=regions)
        assert_equal(model(X), plain(X))
        assert len(ecospa_fx.couplings(model)) == 2  # what leaves the model pins the stream
        assert ecospa_fx.verify(model, example_inputs=(X,)).ok


def test_joints_see_tensors_inside() -> None:
    class Through(Net):
        def __init__(self, make: Callable[..., Any]) -> None:
            super().__init__(make)
            self.stem = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)[1].hidden
            return self.head(x)

    model = ecospa_fx.compile(Through(MAKES["frozen"]).double(), example_inputs=(X,), regions="joined")
    assert {c.name for c in ecospa_fx.couplings(model)} == {"residual", "blocks.0.ffn", "blocks.1.ffn"}
    assert ecospa_fx.verify(model, example_inputs=(X,)).ok


class Keeps(Block):
    """Blocks whose result something else holds: the next call returns it again, or somebody changes it."""

    def __init__(self, how: str) -> None:
        super().__init__(Frozen)
        self.how, self.template, self.log = how, Traced(torch.zeros(2)), []

    def forward(self, x: Tensor) -> Any:
        y = self.down(torch.tanh(self.up(x)))
        made = Traced(y)
        if self.how == "an attribute":
            return x + y, self.template
        if self.how == "a global":
            return x + y, HELD
        return x + y, [made, made]


HELD = Frozen(torch.zeros(2))


@pytest.mark.parametrize("how", ["an attribute", "a global", "twice"])
def test_one_that_a_graph_would_make_another_of_is_refused(how: str) -> None:
    class Kept(Net):
        def __init__(self) -> None:
            super().__init__(Frozen)
            self.blocks = nn.ModuleList(Keeps(how) for _ in range(2))

    wanted = r"returns a Traced, which cannot go" if how == "twice" else r"returns a \w+ that something else holds too"
    with pytest.raises(CaptureError, match=wanted):
        ecospa_fx.compile(Kept().double(), example_inputs=(X,), regions=["blocks.0"])


def test_one_that_a_block_was_given_is_that_very_object() -> None:
    class Passes(Block):
        def forward(self, x: Tensor, trace: Any) -> Any:
            y = self.down(torch.tanh(self.up(x)))
            return x + y, trace

    class Given(Net):
        def __init__(self) -> None:
            super().__init__(Frozen)
            self.blocks = nn.ModuleList(Passes(Frozen) for _ in range(2))

        def forward(self, x: Tensor) -> Any:
            trace = given = Traced(x)
            for block in self.blocks:
                x, trace = block(x, trace)
            return self.head(x), trace is given

    model = ecospa_fx.compile(Given().double(), example_inputs=(X,), regions="blocks")
    assert len(ecospa_fx.couplings(model)) == 2 and model(X)[1]
