"""Saliency that holds no value inside a region for backward, which computes it again: the same in less room."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

import ecospa_fx
from ecospa_fx.score.saliency import Saliency


class Wide(nn.Module):
    """A block whose inside is much larger than what goes in; it writes to its own values."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 128), nn.Linear(128, 8)

    def forward(self, x):
        return x + self.down(torch.relu_(self.up(x)).sin())


class Counting(Wide):
    """It writes to a buffer, and reads it: computed again, it would see another number."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        self.calls.add_(1)
        return x + self.down((self.up(x) * self.calls).sin())


class Drawing(Wide):
    """It draws in evaluation mode, too."""

    def forward(self, x):
        return x + self.down(dropout(self.up(x), 0.5, training=True).sin())


class Blocks(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(4))

    def forward(self, x):
        x = x * 1.0
        for block in self.blocks:
            x = block(x)
        return x


def read(block, again):
    """Entries of each coupling, gradients of weights, and the bytes that the forward holds for backward."""
    torch.manual_seed(0)
    model, x = Blocks(block).double().eval(), torch.randn(50, 8, dtype=torch.float64)
    ecospa_fx.compile(model, example_inputs=(x,), regions="blocks")
    saliency, held = Saliency(model), {}
    saliency.reader.computes_again = again

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        loss = model(x).square().sum()
    loss.backward()
    saliency.accumulate()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    entries = {c.name: saliency.entries(c) for c in ecospa_fx.couplings(model)}
    return entries, [p.grad for p in model.parameters()], sum(held.values()) - weights


@pytest.mark.parametrize("block", [Wide, Drawing])
def test_the_same_numbers_in_less_room(block):
    plain, again = read(block, False), read(block, True)
    assert plain[0] and plain[0].keys() == again[0].keys()
    for name, entries in plain[0].items():
        assert entries.abs().max() > 0
        assert torch.equal(again[0][name], entries)
    assert all(map(torch.equal, again[1], plain[1]))
    assert again[2] < plain[2] / 4


def test_what_writes_to_a_tensor_of_the_module_runs_once():
    plain, again = read(Counting, False), read(Counting, True)
    assert plain[0] and all(torch.equal(again[0][name], entries) for name, entries in plain[0].items())
    assert all(map(torch.equal, again[1], plain[1]))
    assert again[2] == plain[2]
