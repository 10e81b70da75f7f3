"""Weights that each module fetches when it is called, and that lie nowhere in between, as offloading leaves them."""

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx.errors import CaptureError

SAYS = r"the weights of `0` are offloaded: they are on the meta device, and a forward on the instance fetches them"


def offload(model):
    """Leave the weights of linear layers on the meta device; a forward on the instance puts them back for a call."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            held = {name: p.detach() for name, p in module._parameters.items()}

            def forward(*args, module=module, held=held):
                away = dict(module._parameters)
                module._parameters.update({name: nn.Parameter(value, False) for name, value in held.items()})
                try:
                    return type(module).forward(module, *args)
                finally:
                    module._parameters.update(away)

            module._parameters.update({name: nn.Parameter(p.to("meta"), False) for name, p in held.items()})
            module.forward = forward
    return model


def feed_forward(hidden=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, hidden), nn.GELU(), nn.Linear(hidden, 6)).eval()


def shrunk(**how):
    """Return a shrunk model, and one of plain torch that was made at its sizes."""
    model = ecospa_fx.compile(feed_forward(), example_inputs=(torch.randn(2, 6),), **how)
    ecospa_fx.shrink(model, {"ffn": torch.arange(0, 12, 2)})
    plain = feed_forward(6)
    plain.load_state_dict(model.state_dict())
    return model, plain


def test_a_graph_does_not_fetch_them():
    model, _ = shrunk()
    offload(model)
    with pytest.raises(CaptureError, match=SAYS):
        model(torch.randn(2, 6))


@torch.no_grad()
def test_its_own_python_does():
    x = torch.randn(3, 6)
    model, plain = shrunk(execution="module")
    assert torch.equal(offload(model)(x), plain(x))
    model, plain = shrunk()
    assert torch.equal(offload(ecospa_fx.restore(model))(x), plain(x))


@torch.no_grad()
def test_whole_it_runs_its_own_python(caplog):
    x = torch.randn(3, 6)
    model = ecospa_fx.compile(feed_forward(), example_inputs=(x,))
    torch.testing.assert_close(offload(model)(x), feed_forward()(x))
    assert "are offloaded" in caplog.text


def test_offloaded_before_it_was_called():
    model = ecospa_fx.compile(feed_forward())
    offload(model)
    with pytest.raises(CaptureError, match=SAYS):
        model(torch.randn(2, 6))
