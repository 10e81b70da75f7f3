"""Other dtypes: a model whose weights are cast after its first call computes what the plain one does in that dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx.model.lookup import regions_of

IDS = torch.tensor([[1, 5, 2, 7], [3, 3, 0, 4]])  # integers: no argument tells the dtype


class Net(nn.Module):
    """Numbers that it takes from the dtype of its weights, and tensors that it makes in it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(8, 6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, ids):
        h = torch.relu(self.up(self.embed(ids)))
        place = torch.arange(ids.shape[1]).to(self.down.weight.dtype)[:, None] / 7
        seen = torch.finfo(h.dtype).eps + torch.finfo(self.scale.dtype).eps
        return (self.down(h) + place) * self.scale * (1 + 1e6 * seen)


def cast_data(model):
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.double()


CASTS = {
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "data": cast_data,
    "a buffer": lambda m: setattr(m, "scale", m.scale.double()),
}


def nets():
    torch.manual_seed(0)
    plain = Net()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(IDS,), regions="root")
    return plain, model


def assert_equal(plain, model, call=None):
    expected, got = plain(IDS), (model if call is None else call)(IDS)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("cast", CASTS)
def test_the_next_call_is_in_it(cast):
    plain, model = nets()
    for _ in range(3):
        assert_equal(plain, model)  # by a route that is remembered
    before = plain(IDS)
    for each in (plain, model):
        CASTS[cast](each)
    assert_equal(plain, model)
    assert not torch.allclose(before.double(), plain(IDS).double(), rtol=1e-9)
    assert len(regions_of(model)[""].specializations) == 2
    for _ in range(2):
        for each in (plain, model):
            each.float()
        assert_equal(plain, model)
        for each in (plain, model):
            CASTS[cast](each)
        assert_equal(plain, model)
    assert len(regions_of(model)[""].specializations) == 2  # both are there already


@pytest.mark.parametrize("cast", CASTS)
def test_after_a_shrink(cast):
    plain, model = nets()
    hidden = next(c for c in ecospa_fx.couplings(model) if c.size == 12)
    ecospa_fx.shrink(model, {hidden: torch.arange(0, 12, 2)})
    with torch.no_grad():
        plain.down.weight[:, 1::2] = 0
    assert_equal(plain, model)
    for each in (plain, model):
        CASTS[cast](each)
    assert_equal(plain, model)
    model(IDS).sum().backward()
    assert model.up.weight.grad.dtype == model.up.weight.dtype and model.up.weight.shape[0] == 6


def test_compiled_code():
    plain, model = nets()
    torch._dynamo.reset()
    call = torch.compile(model, backend="eager")
    assert_equal(plain, model, call)
    for each in (plain, model):
        each.double()
    assert_equal(plain, model, call)


def test_many_values_that_are_made_anew_and_another_dtype():
    plain, model = nets()
    for _ in range(40):  # more than there are guards for: every call looks at all values
        for each in (plain, model):
            each.up._forward_hooks = type(each.up._forward_hooks)()
            each._modules = dict(each._modules)
        assert_equal(plain, model)
    for each in (plain, model):
        each.double()
    assert_equal(plain, model)


@pytest.mark.parametrize("regions", ["root", "blocks"])
def test_a_cast_model_is_restored(regions):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)) for _ in range(2)]
    model, x = nn.Sequential(*blocks), torch.randn(3, 6)
    ecospa_fx.compile(model, example_inputs=(x,), regions=regions)
    hidden = [c for c in ecospa_fx.couplings(model) if c.size == 12]
    ecospa_fx.shrink(model, {c: torch.arange(5) for c in hidden})
    model.double()
    expected = model(x.double())
    torch.testing.assert_close(ecospa_fx.restore(copy.deepcopy(model))(x.double()), expected)
