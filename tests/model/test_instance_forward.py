"""Forwards on the instance, which may go past the forward of the class, as trainers set them for their losses."""

import functools
import types

import pytest
import torch
from torch import nn

import ecospa_fx

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Stack(nn.Module):
    def __init__(self, hidden=32):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 8)) for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def hidden(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x

    def forward(self, x):
        return self.head(self.hidden(x))


class Scores(torch.autograd.Function):
    """Keeps its weight for backward, and writes into a view of the memory that it makes."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        out = x.new_empty(len(x), len(weight))
        return torch.mm(x, weight.T, out=out)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


def set_forward(model):
    """Set a forward on the instance that runs the one of the class unless it is asked for a loss."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, x, fused=False):
        return Scores.apply(self.hidden(x), self.head.weight).square().mean() if fused else original(x)

    model.forward = types.MethodType(forward, model)
    return model


def made():
    torch.manual_seed(0)
    return Stack().double()


@pytest.mark.parametrize("compiled_first", [True, False])
@pytest.mark.parametrize("execution", ["graph", "module"])
def test_a_call_past_the_forward_of_the_class_is_seen(compiled_first, execution):
    x, plain = X.double(), set_forward(made())
    if compiled_first:
        model = set_forward(ecospa_fx.compile(made(), execution=execution))
    else:
        model = ecospa_fx.compile(set_forward(made()), execution=execution)
    loss, expected = model(x, fused=True), plain(x, fused=True)
    assert torch.equal(loss, expected)
    loss.backward(), expected.backward()  # the capture since has left alone what backward needs
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None) and (
            mine.grad is None or torch.equal(mine.grad, theirs.grad)
        )
    kept = {c: torch.arange(0, c.size, 3) for c in ecospa_fx.couplings(model)}
    assert [c.name for c in kept] == ["blocks.0.ffn", "blocks.1.ffn"]
    ecospa_fx.shrink(model, kept)
    small = set_forward(Stack(hidden=11).double())
    small.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x, fused=True), small(x, fused=True))
    torch.testing.assert_close(model(x), small(x))


def test_a_trainer_made_before_the_first_call_trains_to_its_target():
    model = set_forward(ecospa_fx.compile(made()))
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5, interval=2, end=6)
    for _ in range(8):
        model(X.double(), fused=True).backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
    assert trainer.done
