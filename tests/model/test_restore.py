"""restore: a plain module with the weights that are left, or a reason why its own forward cannot run them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from living import Lives, each_way
from torch import nn

import ecospa_fx
from ecospa_fx import errors


def assert_plain(model, like):
    assert [type(m) for m in model.modules()] == [type(m) for m in like.modules()]
    assert not [key for m in model.modules() for key in m.__dict__ if "ecospa" in key]
    assert list(model.state_dict()) == list(like.state_dict())


@each_way
@pytest.mark.parametrize("name", ["net", "llama"])
def test_what_has_not_shrunk_comes_back_as_it_was(name, regions):
    it = Lives(name, regions, shrunk=False)
    identities = [id(p) for p in it.model.parameters()]
    assert ecospa_fx.restore(it.model) is it.model
    assert_plain(it.model, it.plain)
    assert identities == [id(p) for p in it.model.parameters()]
    assert all(m.__dict__.keys() == n.__dict__.keys() for m, n in zip(it.model.modules(), it.plain.modules()))
    assert all(repr(m) == repr(n) for m, n in zip(it.model.modules(), it.plain.modules()))
    it.agree()
    ecospa_fx.compile(it.model, example_kwargs=it.kwargs, regions=regions)  # and may be compiled again
    assert ecospa_fx.couplings(it.model)


def test_a_model_that_waits_for_its_first_call():
    it = Lives(shrunk=False)
    model = ecospa_fx.restore(ecospa_fx.compile(copy.deepcopy(it.plain)))
    assert_plain(model, it.plain)
    it.agree(model=model)


@each_way
def test_a_forward_that_can_run_what_is_left(regions):
    """The MLPs of the net read their width off their weights; its batch norms are told theirs."""
    it = Lives(regions=regions, shrunk=False)
    it.model.eval()(**it.kwargs)
    ecospa_fx.shrink(it.model, {"layers.0.ffn": torch.arange(0, 20, 2), "layers.1.ffn": torch.arange(5)})
    outs = [it.model.train(training)(**it.kwargs).detach() for training in (False, True)]
    for buffer in (b for b in it.model.buffers() if b.is_floating_point()):
        buffer.data.copy_(buffer.data)
    sizes = {name: p.shape for name, p in it.model.named_parameters()}
    model = ecospa_fx.restore(it.model)
    assert_plain(model, it.plain)
    assert sizes == {name: p.shape for name, p in model.named_parameters()}
    up, norm, down = model.layers[1].up, model.layers[1].norm, model.layers[1].down
    assert (up.out_features, norm.num_features, down.in_features) == (5, 5, 5)
    assert up.__dict__["out_features"] == 5 and "out_features=5" in repr(up)
    torch.testing.assert_close(model.train()(**it.kwargs), outs[1], rtol=1e-5, atol=1e-6)
    model.eval()
    assert torch.isfinite(model(**it.kwargs)).all() and outs[0].shape == outs[1].shape
    program = torch.export.export(model, (), it.kwargs, strict=False)  # nothing of ours is in the way
    torch.testing.assert_close(program.module()(**it.kwargs), model(**it.kwargs))


def state(model):
    return (
        [type(m) for m in model.modules()],
        [{k: v for k, v in m.__dict__.items() if isinstance(v, (int, tuple))} for m in model.modules()],
        {name: t.clone() for name, t in model.state_dict().items()},
    )


def assert_same_state(a, b):
    assert a[:2] == b[:2]
    assert all(torch.equal(t, b[2][name]) for name, t in a[2].items())


@each_way
def test_a_forward_that_cannot(regions):
    """Whole heads and head widths: the net views by a number of heads that it holds."""
    it = Lives(regions=regions, shrunk=False)
    ecospa_fx.shrink(it.model, {"layers.0.ffn": torch.arange(5), "layers.1.vo": torch.arange(2)})
    before, out = state(it.model), it.model(**it.kwargs)
    before = state(it.model)
    with pytest.raises(errors.RestoreError) as caught:
        ecospa_fx.restore(it.model)
    where = {"blocks": "`layers.1` (Block) fails", "root": "the model (Net) fails in `layers.1` (Block)"}[regions]
    assert str(caught.value).startswith(f"with the weights that are left, {where}: shape ")
    assert str(caught.value).endswith(
        "It reads a size from an attribute; keep the model compiled, or change that attribute in a class of yours"
    )
    assert_same_state(before, state(it.model))
    assert it.model(**it.kwargs).shape == out.shape


class Attention(nn.Module):
    """Scales by the width of a head, which it reads off what it is given."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


def test_a_forward_that_runs_and_gives_something_else():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 5, 8)
    with torch.no_grad():
        model.q.weight.mul_(4)
    ecospa_fx.compile(model, example_inputs=(x,))
    ecospa_fx.shrink(model, {"qk": torch.arange(2)})
    before = state(model)
    with pytest.raises(errors.RestoreError) as caught:
        ecospa_fx.restore(model)
    message = str(caught.value)
    assert message.startswith(
        "with the weights that are left, the model (Attention) runs, but gives results that differ by"
    )
    assert message.endswith(". It derives a number from their sizes (a scale, a split); keep the model compiled")
    assert_same_state(before, state(model))


def test_a_model_that_was_loaded_and_not_called(tmp_path):
    it = Lives(shrunk=False)
    ecospa_fx.shrink(it.model, {"layers.0.ffn": torch.arange(5)})
    ecospa_fx.save(it.model, tmp_path / "run")
    loaded = ecospa_fx.load(tmp_path / "run", lambda: copy.deepcopy(it.plain))
    with pytest.raises(errors.NoInputsError) as caught:
        ecospa_fx.restore(loaded)
    assert str(caught.value) == (
        "`layers.0` (Block) has shrunk and not been called since it was loaded, so that its own forward cannot be "
        "tried; pass example_inputs=(x,)"
    )
    plain = ecospa_fx.restore(loaded, example_kwargs=it.kwargs)
    assert_plain(plain, it.plain)
    torch.testing.assert_close(plain(**it.kwargs), it.model(**it.kwargs), rtol=1e-5, atol=1e-6)


def test_layers_that_hold_the_sizes_of_their_weights():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    x = torch.randn(2, 3, 9, 9)
    ecospa_fx.compile(model, example_inputs=(x,), regions="root")
    keeps = {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model)}
    assert keeps
    ecospa_fx.shrink(model, keeps)
    out = model(x)
    ecospa_fx.restore(model)
    conv, norm, depthwise, _, last = model
    assert (conv.out_channels, norm.num_features, depthwise.groups, last.in_channels) == (4, 4, 4, 4)
    torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-6)


def test_not_compiled():
    with pytest.raises(errors.EcoSpaError, match="Linear is not compiled; there is nothing to restore"):
        ecospa_fx.restore(nn.Linear(2, 2))


class Skip(nn.Module):
    """Half the resolution and back: what goes back must meet what went around it."""

    def __init__(self):
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 2, 2)
        self.up, self.last = nn.ConvTranspose2d(12, 8, 2, 2), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        around = self.first(x).relu()
        return self.last((self.up(self.down(around).relu()) + around).relu())


class Flattened(nn.Module):
    """As many pixels as a linear layer takes, of any shape."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6 * 16, 5)

    def forward(self, x):
        return self.c(F.max_pool2d(self.b(F.max_pool2d(self.a(x).relu(), 2)).relu(), 2).view(x.shape[0], -1))


class Depths(nn.Module):
    """Two by two pixels side by side in the channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(16, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        y = self.a(x)
        b, c, h, w = y.shape
        y = y.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)
        return self.c(self.b(y).relu())


class Pair(nn.Module):
    """Two inputs of one batch, one of them twice as long and long enough."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x, y):
        if x.shape[1] < 6 or y.shape[1] != 2 * x.shape[1]:
            raise ValueError("too short")
        return self.c((self.a(x) + self.b(y)[:, ::2]).relu())


DEPENDENT = {
    "skip": (Skip, [(2, 3, 8, 8)]),
    "flattened": (Flattened, [(2, 1, 22, 22)]),
    "depths": (Depths, [(2, 3, 8, 6)]),
    "pair": (Pair, [(3, 7, 4), (3, 14, 5)]),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_a_call_is_made_up_whose_sizes_fit_each_other(name):
    """For a trial: in module execution, and when a model is restored."""
    cls, shapes = DEPENDENT[name]
    torch.manual_seed(0)
    inputs = tuple(torch.randn(*shape) for shape in shapes)
    followed = ecospa_fx.compile(cls(), example_inputs=inputs, execution="module")
    model = ecospa_fx.compile(cls(), example_inputs=inputs)
    couplings = ecospa_fx.couplings(model)
    assert couplings
    assert len(ecospa_fx.couplings(followed)) >= len([c for c in couplings if c.kind in ("ffn", "channels")])
    keeps = {c: torch.arange(0, c.size, 2) for c in couplings if name != "depths" or c.size == 6}
    ecospa_fx.shrink(model, keeps)
    expected = model(*inputs)
    torch.testing.assert_close(ecospa_fx.restore(model)(*inputs), expected)
    assert type(model) is cls
