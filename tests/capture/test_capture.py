"""Capture of regions that torch.export alone would not give in the form that is needed."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx.passes.capture import export
from ecospa_fx.passes.capture.capture import capture


class Windows(nn.Module):
    """Pads images to whole windows of 3 x 3, which attend inside, stage after stage."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(4, 4) for _ in range(stages))

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
            b, h, w, c = x.shape
            y = nn.functional.pad(x, (0, 0, 0, -w % 3, 0, -h % 3))
            rows, columns = y.shape[1] // 3, y.shape[2] // 3
            y = y.view(b, rows, 3, columns, 3, c).transpose(2, 3).reshape(-1, 9, c).softmax(1)
            y = y.view(b, rows, columns, 3, 3, c).transpose(2, 3).reshape(b, 3 * rows, 3 * columns, c)
            x = x + y[:, :h, :w]
        return x


def test_dims_that_raise_too_many_questions_are_specialised(monkeypatch) -> None:
    """Left dynamic, height and width take torch.export minutes, and hours in a model of several stages."""
    monkeypatch.setattr(export, "GUARDS", 4)
    captured = capture(Windows(2), (torch.randn(2, 16, 16, 4),), {})
    ((_, _, (batch, *others)),) = captured.signature.tensors
    assert type(batch) is not int
    assert others == [16, 16, 4]


class Precise(nn.Module):
    """Keeps autocast out of its hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            hidden = self.up(x.float()).relu()
        return self.down(hidden)


def test_weights_meet_in_parts_without_autocast_which_stay_without() -> None:
    x = torch.randn(3, 4)
    model = ecospa_fx.compile(Precise(), example_inputs=(x,))
    (ffn,) = ecospa_fx.couplings(model)
    assert (ffn.kind, ffn.size) == ("ffn", 6)
    assert ecospa_fx.verify(model, example_inputs=(x,)).ok
    ecospa_fx.shrink(model, {ffn: torch.tensor([0, 2, 5])})
    seen = []
    handle = model.up.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    handle.remove()
    assert set(seen) == {torch.float32}


class Chunked(nn.Module):
    """Finds its number of chunks by a tensor, as Longformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        chunks = torch.div(x.shape[1], 3, rounding_mode="trunc")
        x = x.view(x.shape[0], chunks, 3, 4)
        if x.shape[1] > 1:
            x = x - x.mean(1, keepdim=True)
        return self.down(self.up(x).relu())


def test_sizes_that_go_through_a_tensor_are_specialised() -> None:
    x = torch.randn(2, 6, 4)
    captured = capture(Chunked(), (x,), {})
    ((_, _, (batch, *others)),) = captured.signature.tensors
    assert type(batch) is not int
    assert others == [6, 4]
    model = ecospa_fx.compile(Chunked(), example_inputs=(x,))
    assert ecospa_fx.verify(model, example_inputs=(x,)).ok
    assert model(torch.randn(5, 9, 4)).shape == (5, 3, 3, 4)


def test_a_region_graph_is_frozen():
    captured = capture(Windows(2), (torch.randn(2, 16, 16, 4),), {})
    for field in dataclasses.fields(captured):
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"cannot assign to field '{field.name}'"):
            setattr(captured, field.name, getattr(captured, field.name))
    for kind in (list, set):
        assert not [f.name for f in dataclasses.fields(captured) if isinstance(getattr(captured, f.name), kind)]
    other = dataclasses.replace(captured, region="other")
    assert (captured.region, other.region, other.graph) == ("", "other", captured.graph)
    assert other._plain_result == captured._plain_result == "tensor"


class AskingItself(nn.Module):
    """A forward that asks for gradients of its input itself, for checkpoints of activations behind frozen layers."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = x[:, None]
        if self.training:
            x.requires_grad = True
        return self.down(self.up(x).relu())


def test_a_forward_that_asks_for_gradients_of_its_input() -> None:
    torch.manual_seed(0)
    plain, x = AskingItself(), torch.randn(3, 4)
    model = ecospa_fx.compile(copy.deepcopy(plain), regions="root")
    assert torch.equal(model(x), plain(x))
    (ffn,) = (c for c in ecospa_fx.couplings(model) if c.kind == "ffn")
    ecospa_fx.shrink(model, {ffn: torch.arange(5)})
    with torch.no_grad():
        plain.down.weight[:, 5:] = 0
    for each in (plain, model):
        each(x).square().sum().backward()
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model.up.weight.grad, plain.up.weight.grad[:5])


class HandingOn(AskingItself):
    """A forward that returns zeros that ask for gradients beside its result, as biases of positions do."""

    def forward(self, x):
        return torch.zeros(2, 3, requires_grad=self.training), self.down(self.up(x).relu())


def test_a_forward_that_returns_a_constant_that_asks_for_gradients() -> None:
    x, model = torch.randn(3, 4), HandingOn()
    ecospa_fx.compile(model, regions="root")
    assert model(x)[1].requires_grad and {c.kind for c in ecospa_fx.couplings(model)} == {"ffn"}
