"""Forwards that turn autocast on or off for a part of themselves, and autocast around shrinks and comparisons."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ecospa_fx

X = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
HALF = torch.bfloat16


class Block(nn.Module):
    """Attention in autocast that is on or off; a gated network of which a part is."""

    def __init__(self, on):
        super().__init__()
        self.on, self.norm = on, nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x):
        with torch.autocast("cpu", HALF, enabled=self.on):
            y = self.norm(x)
            q, k, v = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            gate = self.gate(self.norm(x))
        return x + self.down(F.silu(gate.float()) * self.up(x).float())


def net(on):
    torch.manual_seed(0)
    return nn.Sequential(Block(on), Block(on))


def smaller(on):
    """A plain one whose gated networks keep the first 25 entries."""
    model = net(on)
    for block in model:
        for layer in (block.gate, block.up):
            layer.weight, layer.bias = nn.Parameter(layer.weight[:25]), nn.Parameter(layer.bias[:25])
        block.down.weight = nn.Parameter(block.down.weight[:, :25])
    return model


def gradients(model):
    model.zero_grad()
    model(X).float().square().sum().backward()
    return [p.grad for p in model.parameters()]


def close(a, b):
    assert a.shape == b.shape and float((a - b).detach().abs().max()) <= 2e-2 * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("execution", ["graph", "module"])
@pytest.mark.parametrize("around", [False, True], ids=["plain", "under autocast"])
@pytest.mark.parametrize("on", [False, True], ids=["off", "on"])
def test_it_is_on_where_the_forward_says_so(on, around, execution):
    """The shrink too may come inside of autocast, whose cache holds casts of weights by object, of any size."""
    model, plain = net(on), smaller(on)
    with torch.autocast("cpu", HALF, enabled=around):
        result = model(X)
        ecospa_fx.compile(model, example_inputs=(X,), execution=execution)
        close(model(X), result)
        names = [coupling.name for coupling in ecospa_fx.couplings(model)]
        assert [name for name in names if name.endswith("glu")] == ["0.glu", "1.glu"]
        if execution == "graph":
            assert {name.rpartition(".")[2] for name in names} == {"heads", "qk", "vo", "glu"}
        assert ecospa_fx.verify(model, example_inputs=(X,)).ok
        ecospa_fx.shrink(model, {name: torch.arange(25) for name in names if name.endswith("glu")})
        assert model(X).dtype == plain(X).dtype
        close(model(X), plain(X))
        for mine, theirs in zip(gradients(model), gradients(plain), strict=True):
            close(mine, theirs)
        close(ecospa_fx.restore(copy.deepcopy(model))(X), plain(X))
    close(model(X), plain(X))
    code = torch.compile(model, backend="eager", fullgraph=True)
    close(code(X), plain(X))


@pytest.mark.parametrize("on", [False, True], ids=["off", "on"])
def test_an_error_inside_leaves_autocast_as_it_was(on):
    model = ecospa_fx.compile(net(on), example_inputs=(X,))
    ecospa_fx.shrink(model, {"0.glu": torch.arange(25)})

    def breaks(*_):
        raise MemoryError

    for broken in ("o", "gate"):
        handle = model[0].get_submodule(broken).register_forward_pre_hook(breaks)
        for around in (False, True):
            with torch.autocast("cpu", HALF, enabled=around):
                with pytest.raises(MemoryError):
                    model(X)
                assert torch.is_autocast_enabled("cpu") == around
            assert not torch.is_autocast_enabled("cpu")
            assert torch.autocast_increment_nesting() == 1 and torch.autocast_decrement_nesting() == 0
        handle.remove()
