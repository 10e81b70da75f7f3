"""Sizes that differ between calls: what an op cannot do with one leaves the other axes alone, and is told in words."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.passes.axes.algebra import atoms_of
from ecospa_fx.passes.capture.capture import capture
from ecospa_fx.passes.infer.infer import infer_axes

DYNAMIC: dict[str, Callable[[Tensor], Tensor]] = {
    "every second token": lambda x: x[:, ::2],
    "every second but the last": lambda x: x[:, :-1:2],
    "every third sample, every second token": lambda x: x[1::3, ::2],
    "even and odd tokens": lambda x: x[:, :-1:2] + x[:, 1::2],
    "a gate along time": lambda x: F.glu(torch.cat([x, x], 1), 1),
    "a grid of tokens, every second": lambda x: x.view(-1, 3, 3, 8)[:, ::2, ::2].flatten(1, 2),
    "every second row of a flat batch": lambda x: x.reshape(-1, 8)[::2],
    "repeated and cut": lambda x: x[:, ::2].repeat_interleave(2, 1)[:, : x.shape[1]],
    "parted": lambda x: x[:, ::2].chunk(2, 1)[0],
    "sections": lambda x: x.tensor_split(2, 1)[1],
}


class Between(nn.Module):
    """Two linears, and an op on the tokens between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.function, self.second = nn.Linear(6, 8), function, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(torch.relu(self.first(x))))


@pytest.mark.parametrize("function", DYNAMIC.values(), ids=DYNAMIC)
def test_an_op_on_a_dynamic_dim_leaves_the_others_alone(function: Callable[[Tensor], Tensor]) -> None:
    facts = infer_axes(capture(Between(function), (torch.randn(4, 9, 6),), {}))
    (columns,) = (set(atoms_of(facts.parameters["first.weight"][0])),)
    pinned = [fact for fact in facts.facts if fact.role == "pinned"]
    assert not columns & {atom for fact in pinned for atom in atoms_of(fact.expr)}
    assert not [fact.reason for fact in pinned if re.search(r"\bs\d+\b", fact.reason)]


def flat(y: Tensor) -> Tensor:
    return y.reshape(y.shape[0], -1)


def twice(y: Tensor) -> Tensor:
    return torch.cat([flat(y), flat(y)], 1)


def rows(y: Tensor, flattened: Tensor) -> Tensor:
    return flattened.view(y.shape[0], -1, 8)


# Numbers among an op's arguments that are dynamic, and follow a shrink of what they count.
COUNTED: dict[str, Callable[[Tensor], Tensor]] = {
    "a slice up to": lambda y: rows(y, twice(y)[:, : y.shape[1] * 8]),
    "a slice from": lambda y: rows(y, twice(y)[:, y.shape[1] * y.shape[2] :]),
    "a slice up to the end but": lambda y: rows(y, twice(y)[:, : -y.shape[1] * 8]),
    "a slice of a dynamic axis": lambda y: rows(y, flat(y)[:, 8:-8]),
    "narrow": lambda y: rows(y, twice(y).narrow(1, y.shape[1] * 8, y.shape[1] * 8)),
    "split": lambda y: rows(y, twice(y).split(y.shape[1] * 8, 1)[1]),
    "split into sizes": lambda y: rows(y, twice(y).split([y.shape[1] * 8, y.shape[1] * 8], 1)[0]),
    "chunks that come out unequal": lambda y: torch.cat(
        [part.view(y.shape[0], -1, 4) for part in torch.cat([flat(y[..., :4]), flat(y[..., 4:])], 1).chunk(2, 1)], -1
    ),
    "groups": lambda y: (
        F.conv1d(
            y.transpose(1, 2).reshape(1, -1, y.shape[1]),
            y.mean(1).reshape(-1, 1, 1).repeat(1, 1, 3),
            padding=1,
            groups=y.shape[0] * y.shape[2],
        )
        .view(y.shape[0], 8, -1)
        .transpose(1, 2)
    ),
}


def zeroed(plain: nn.Module, plan: ecospa_fx.Plan) -> nn.Module:
    """The plain module, with zeros where a plan has removed entries."""
    with torch.no_grad():
        for (name, dim), kept in plan.kept.items():
            weight = plain.get_parameter(name)
            gone = torch.ones(weight.shape[dim], dtype=torch.bool).index_fill(0, kept, False)
            weight.index_fill_(dim, gone.nonzero().flatten(), 0.0)
    return plain


@pytest.mark.parametrize("function", COUNTED.values(), ids=COUNTED)
def test_dynamic_numbers_follow_a_shrink(function: Callable[[Tensor], Tensor]) -> None:
    plain = Between(function).double()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(torch.randn(3, 7, 6).double(),))
    first = ecospa_fx.couplings(model)[0]
    ecospa_fx.shrink(model, {first: torch.arange(0, first.size, 2)})
    dense = zeroed(plain, ecospa_fx.plan(model))
    for batch, tokens in ((3, 7), (4, 5)):
        x = torch.randn(batch, tokens, 6).double()
        torch.testing.assert_close(model(x), dense(x))


class Modulated(nn.Module):
    """A convolution with weights of their own for each sample, which are its groups."""

    def __init__(self, inputs: int, outputs: int, transposed: bool) -> None:
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(outputs, inputs, 3, 3)), nn.Linear(6, inputs)
        self.transposed = transposed

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        (batch, channels, height, width), outputs = x.shape, self.weight.shape[0]
        kernels = self.weight * self.style(style)[:, None, :, None, None]
        kernels = kernels * torch.rsqrt(kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        x = x.reshape(1, batch * channels, height, width)
        if self.transposed:
            kernels = kernels.transpose(1, 2).reshape(batch * channels, outputs, 3, 3)
            return F.conv_transpose2d(x, kernels, padding=1, groups=batch).view(batch, outputs, height, width)
        kernels = kernels.view(batch * outputs, channels, 3, 3)
        return F.conv2d(x, kernels, padding=1, groups=batch).view(batch, outputs, height, width)


class Generator(nn.Module):
    """Two of them, after a first convolution."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Conv2d(3, 8, 1), Modulated(8, 10, False), Modulated(10, 6, transposed)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = torch.relu(self.one(torch.relu(self.first(x)), style))
        return self.last(torch.relu(self.two(x, style)))


@pytest.mark.parametrize("transposed", [False, True])
def test_samples_that_are_groups_of_a_convolution_stay_whole(transposed: bool) -> None:
    plain = Generator(transposed).double()
    inputs = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 6).double()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=inputs)
    found = ecospa_fx.couplings(model)
    assert sorted(each.size for each in found) == [8, 10]
    ecospa_fx.shrink(model, {each: torch.arange(0, each.size, 2) for each in found})
    dense = zeroed(plain, ecospa_fx.plan(model))
    for batch in (2, 3):
        x, style = torch.randn(batch, 3, 4, 4).double(), torch.randn(batch, 6).double()
        torch.testing.assert_close(model(x, style), dense(x, style))
