"""Adapters: low-rank weights put around layers, before or after a shrink."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ecospa_fx
from ecospa_fx.errors import CaptureError

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Adapted(nn.Module):
    """A frozen layer and a low-rank change to it, as LoRA (arXiv 2106.09685) has them."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        rows, columns = base_layer.weight.shape
        self.lora_a, self.lora_b = nn.Linear(columns, 2, bias=False), nn.Linear(2, rows, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 2 * self.lora_b(self.lora_a(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def adapted(model):
    model.up, model.down = Adapted(model.up), Adapted(model.down)
    return model


def test_adapters_from_before_shrink_along():
    torch.manual_seed(0)
    model = adapted(Net())
    small = copy.deepcopy(model)
    ecospa_fx.compile(model, example_inputs=(X,))
    (hidden,) = [c for c in ecospa_fx.couplings(model) if c.size == 8]
    keep = torch.tensor([0, 3, 4, 7])
    ecospa_fx.shrink(model, {hidden: keep})
    for layer, name, dim in (
        (small.up.base_layer, "weight", 0), (small.up.base_layer, "bias", 0), (small.up.lora_b, "weight", 0),
        (small.down.base_layer, "weight", 1), (small.down.lora_a, "weight", 1),
    ):  # fmt: skip
        held = getattr(layer, name)
        setattr(layer, name, nn.Parameter(held.detach().index_select(dim, keep), requires_grad=held.requires_grad))
    torch.testing.assert_close(model(X), small(X))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("regions", ["auto", "root"])
def test_graphs_refuse_them_after_a_shrink(regions):
    model = ecospa_fx.compile(Gated(), example_inputs=(X,), regions=regions)
    ecospa_fx.shrink(model, {c: torch.arange(4) for c in ecospa_fx.couplings(model) if c.size == 8})
    adapted(model)
    with pytest.raises(CaptureError) as caught:
        model(X)
    assert str(caught.value) == (
        "the model has shrunk, and its `up.weight` is not there any more, as where a module was wrapped (an adapter, a "
        "quantized layer). Wrap modules before `ecospa_fx.compile`, so that all shrinks together, or compile with "
        "execution='module', whose modules have the sizes that are left; or wrap those of ecospa_fx.restore(model), "
        "where its own Python can run with what is left"
    )


@pytest.mark.parametrize("execution", ["module", "graph"])
def test_after_a_shrink_modules_of_the_sizes_left_take_them(execution):
    """As graphs do where all that has shrunk is wrapped."""
    torch.manual_seed(0)
    model = ecospa_fx.compile(Net(), example_inputs=(X,), execution=execution)
    ecospa_fx.shrink(model, {c: torch.arange(4) for c in ecospa_fx.couplings(model) if c.size == 8})
    plain = Net()
    plain.up, plain.down = copy.deepcopy(model.up), copy.deepcopy(model.down)
    torch.manual_seed(1)
    adapted(model)
    torch.manual_seed(1)
    adapted(plain)
    assert model.up.lora_b.weight.shape == (4, 2)
    torch.testing.assert_close(model(X), plain(X))
