"""Branches on sizes: a graph serves the calls for which the forward takes the branches that it took when traced."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx.errors import CaptureError
from ecospa_fx.model.compiled import MODEL

BRANCHES = {
    "parity": lambda b, t: t % 2 == 0,
    "order": lambda b, t: t > b,
    "bound": lambda b, t: t * 3 > 20,
    "product": lambda b, t: b * t <= 12,
    "ratio": lambda b, t: t / b > 2.5,
    "a rounded ratio": lambda b, t: round(t / 4) < b and math.ceil(t / 3) > 1,
    "two together": lambda b, t: t % b == 0 and t // b < 4,
}


class Branching(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.branch = branch

    def forward(self, x):
        y = self.a(x).relu()
        return self.b(y * 2 if BRANCHES[self.branch](*x.shape[:2]) else y + 1)


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_branch_on_sizes(branch):
    torch.manual_seed(0)
    plain = Branching(branch).double()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(torch.randn(2, 6, 4).double(),))
    twin = copy.deepcopy(plain)
    region = model.__dict__[MODEL].regions[""]
    taken = set()
    for shrunk, (b, t) in itertools.product((False, True), itertools.product((2, 3, 5), (2, 3, 4, 6, 7, 9))):
        if shrunk and b == t == 2:
            (coupling,) = ecospa_fx.couplings(model)
            ecospa_fx.shrink(model, {coupling: torch.arange(0, 8, 3)})
            twin.b.weight.data[:, [1, 2, 4, 5, 7]] = 0.0
        x = torch.randn(b, t, 4).double()
        torch.testing.assert_close(model(x), twin(x))
        taken.add(BRANCHES[branch](b, t))
    assert taken == {False, True}
    assert len(region.specializations) <= 4  # one per combination of answers, not one per size


def test_the_checks_of_calls_with_objects_are_those_of_others():
    """`checker` says of sizes what `mismatch` says; its code runs where a cache grows by a token at each call."""
    model = ecospa_fx.compile(Branching("two together"), example_inputs=(torch.randn(2, 6, 4),))
    signature = model.__dict__[MODEL].regions[""].specializations[0].captured.signature
    assert signature.guards.symbols
    fits, said = signature.checker((), len(signature.tensors)), set()
    for b, t in itertools.product(range(1, 9), range(1, 20)):
        x = torch.empty(b, t, 4)
        said.add(fits([x]))
        assert fits([x]) == (signature.mismatch(signature.spec, [x], signature.training) is None)
    assert said == {False, True}
    why = signature.mismatch(signature.spec, [torch.empty(5, 12, 4)], signature.training)
    assert why in {
        f"the forward decides by sizes, and for these ({sizes}) not as in the call that was captured"
        for sizes in ("5, 12", "12, 5")
    }


class Flagged(nn.Module):
    """An attention that is causal where there is more than one position, as loops over tokens have it."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        heads = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(*heads, is_causal=x.shape[1] > 1)
        return self.o(y.transpose(1, 2).flatten(2))


def test_a_comparison_of_sizes_is_a_flag_of_an_op():
    """Such a comparison is a symbol that the op refuses; once settled, lengths stay dynamic."""
    torch.manual_seed(0)
    plain = Flagged().double()
    model = ecospa_fx.compile(copy.deepcopy(plain))
    for length in (5, 7, 4, 1, 9):
        x = torch.randn(2, length, 8).double()
        torch.testing.assert_close(model(x), plain(x))
    assert len(model.__dict__[MODEL].regions[""].specializations) == 2  # one position, and more


class Stubborn(nn.Module):
    """A layer that no tracing gets through, for two reasons."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        if not isinstance(x.shape[1], int):
            raise RuntimeError("a size is a symbol")
        if torch.compiler.is_exporting():
            raise RuntimeError("this cannot be traced")
        return self.layer(x)


def test_a_refusal_says_what_is_left_without_symbols():
    """Each attempt of torch.export has fewer symbols; the reason is that of the last, not of the first."""
    with pytest.raises(CaptureError, match="this cannot be traced"):
        ecospa_fx.compile(Stubborn(), example_inputs=(torch.randn(2, 5, 8),), regions="root")


class Deciding(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        y = self.layer(x)
        if torch.all(y > 0):
            return y
        return y * 2


def test_a_forward_that_decides_by_values_is_refused_with_its_line():
    line = Deciding.forward.__code__.co_firstlineno + 2
    with pytest.raises(CaptureError) as error:
        ecospa_fx.compile(Deciding(), example_inputs=(torch.randn(2, 5, 8),), regions="root")
    assert str(error.value) == (
        "torch.export cannot capture the model (Deciding): what its forward does next depends on the values of a "
        f"tensor at test_size_guards.py:{line} (`if torch.all(y > 0):`), and a graph is the same for all values. Use "
        "torch.where, or numbers that are known before the call"
    )
