"""Nested sizes: several models in one, judged by plain modules with zeros in the place of what each size lacks."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ecospa_fx
from ecospa_fx import errors

GENERATOR = torch.Generator().manual_seed(5)
BATCHES = [torch.randn(8, 6, generator=GENERATOR) for _ in range(3)]
WANTED = [torch.randn(8, 6, generator=GENERATOR) for _ in range(3)]


class Perceptrons(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 6)]) for _ in range(2))

    def forward(self, x, masks=None):
        for number, (up, down) in enumerate(self.layers):
            hidden = F.gelu(up(x))
            x = x + down(hidden if masks is None else hidden * masks[number])
        return x


def nested(targets=(0.4, 0.8, 0.6), **settings):
    model = Perceptrons()
    ecospa_fx.compile(model, example_inputs=(BATCHES[0],), **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.8)
    F.mse_loss(model(BATCHES[0]), WANTED[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, trainer.nested(BATCHES, targets=list(targets))


def masks_of(sizes):
    """What each size keeps of the largest, as masks over its hidden units."""
    widths = {c.name: c.size for c in ecospa_fx.couplings(sizes.model)}
    found = []
    for size in sizes.sizes:
        masks = [torch.zeros(width) for width in widths.values()]
        for mask, (name, width) in zip(masks, widths.items(), strict=True):
            mask[size.keeps.get(name, torch.arange(width))] = 1
        found.append(masks)
    return found


@pytest.mark.parametrize("execution", ["graph", "module"])
def test_each_is_a_part_of_the_next_larger_one(execution):
    model, _, sizes = nested(execution=execution)
    parameters = sum(p.numel() for p in Perceptrons().parameters())
    assert [size.target for size in sizes.sizes] == [0.8, 0.6, 0.4]
    for size in sizes.sizes:
        assert size.target <= size.parameters / parameters < size.target + 0.06  # less than an entry of each
    masks = masks_of(sizes)
    for larger, smaller in pairwise(masks):
        assert all((a >= b).all() for a, b in zip(larger, smaller, strict=True))
    plain = Perceptrons()
    for mine, theirs in zip(plain.layers, model.layers, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            a.weight, a.bias = copy.deepcopy(b.weight), copy.deepcopy(b.bias)
    before = copy.deepcopy(model.state_dict())
    for number, mask in enumerate(masks):
        with sizes.at(number), torch.no_grad():
            torch.testing.assert_close(model(BATCHES[0]), plain(BATCHES[0], mask))
            assert sum(p.numel() for p in model.parameters()) == sizes.sizes[number].parameters
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    losses = [F.mse_loss(plain(BATCHES[1], mask), WANTED[1]) for mask in masks]
    sum(losses).div(3).backward()
    found = sizes.backward(lambda model: F.mse_loss(model(BATCHES[1]), WANTED[1]))
    assert found == pytest.approx([float(loss.detach()) for loss in losses])
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_trained_saved_and_loaded(tmp_path):
    model, optimizer, sizes = nested()
    for step in range(6):
        batch, wanted = BATCHES[step % 3], WANTED[step % 3]
        sizes.backward(lambda model, batch=batch, wanted=wanted: F.mse_loss(model(batch), wanted))
        optimizer.step()
        optimizer.zero_grad()
    ecospa_fx.save(model, tmp_path / "run", nested=sizes)
    ecospa_fx.save(model, tmp_path / "alone")
    files = {path.name for path in (tmp_path / "run").rglob("*.safetensors")}
    assert files == {path.name for path in (tmp_path / "alone").rglob("*.safetensors")}  # weights are there once
    for number, size in enumerate(sizes.sizes):
        loaded = ecospa_fx.load(tmp_path / "run", Perceptrons, size=size.target)
        with sizes.at(number), torch.no_grad():
            assert torch.equal(loaded(BATCHES[2]), model(BATCHES[2]))
        assert sum(p.numel() for p in loaded.parameters()) == size.parameters
    assert torch.equal(ecospa_fx.load(tmp_path / "run", Perceptrons)(BATCHES[2]), model(BATCHES[2]))
    with pytest.raises(errors.CheckpointError, match=r"has no size 0\.5; it has 0\.8, 0\.6, 0\.4"):
        ecospa_fx.load(tmp_path / "run", Perceptrons, size=0.5)
    with pytest.raises(errors.CheckpointError, match="none but the one"):
        ecospa_fx.load(tmp_path / "alone", Perceptrons, size=0.5)
    with pytest.raises(errors.EcoSpaError, match="another Perceptrons"):
        ecospa_fx.save(nested()[0], tmp_path / "other", nested=sizes)


def test_what_is_wrong_is_said():
    for targets, words in (([], "targets is empty"), ([0.5, 0.01], "reach down to"), ([2], "out of range")):
        with pytest.raises(errors.TargetError, match=words):
            nested(targets)
    model, _, sizes = nested()
    with pytest.raises(errors.EcoSpaError, match="sizes are 0 to 2"), sizes.at(3):
        pass
    grads = [p.grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), sizes.at(2):
        raise ZeroDivisionError
    assert [p.grad for p in model.parameters()] == grads
    (coupling, *_) = ecospa_fx.couplings(model)
    ecospa_fx.shrink(model, {coupling: torch.arange(coupling.size - 1)})
    with pytest.raises(errors.EcoSpaError, match="has shrunk since"):
        sizes.backward(lambda model: model(BATCHES[0]).sum())
