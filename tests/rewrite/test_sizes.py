"""Sizes among arguments: an op that names the size of its result names the one that is left after a shrink."""

import pytest
import torch
from torch import nn

import ecospa_fx

# Each takes the hidden values `[batch, 3, width]` and gives `[batch, 3, any]`, with all sizes written into the call.
OPS = {
    "repeat_interleave": lambda h: h.repeat_interleave(2, -1),
    "repeat_interleave with its result's size": lambda h: h.repeat_interleave(2, -1, output_size=2 * h.shape[-1]),
    "repeat_interleave over another dim": lambda h: h.repeat_interleave(2, 1, output_size=6)[:, ::2],
    "repeat": lambda h: h.repeat(1, 1, 3),
    "tile": lambda h: h.tile(2),
    "expand": lambda h: h[..., None].expand(h.shape[0], 3, h.shape[-1], 2).flatten(2),
    "unflatten": lambda h: h.unflatten(-1, (h.shape[-1] // 4, 4)).sum(-1),
    "sum_to_size": lambda h: (h + h.mean(0, keepdim=True)).sum_to_size(h.shape[0], 3, h.shape[-1]),
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, name: str, width: int = 16) -> None:
        super().__init__()
        self.op, self.up = OPS[name], nn.Linear(5, width)
        self.down = nn.Linear(self.op(torch.zeros(1, 3, width)).shape[-1], 4)

    def forward(self, x):
        return self.down(self.op(self.up(x).tanh()))


@pytest.mark.parametrize("name", OPS)
def test_an_op_that_names_sizes(name):
    torch.manual_seed(0)
    model, x = Net(name).double(), torch.randn(2, 3, 5).double()
    model = ecospa_fx.compile(model, example_inputs=(x,))
    (coupling,) = ecospa_fx.couplings(model)
    assert ecospa_fx.verify(model, example_inputs=(x,)).ok
    keep = torch.arange(coupling.size)[: max(1, coupling.size // 2)]
    ecospa_fx.shrink(model, {coupling: keep})
    small = Net(name, model.up.weight.shape[0]).double()
    small.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), small(x), rtol=0, atol=0)
    assert model(torch.randn(5, 3, 5).double()).shape == (5, 3, 4)
