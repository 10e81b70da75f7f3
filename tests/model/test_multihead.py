"""nn.MultiheadAttention: one parameter for three projections, of one input or of three."""

import copy

import pytest
import torch
from torch import nn
from twin import assert_equals_twin, half, kept_positions, zeroed

import ecospa_fx


class Attending(nn.Module):
    """`apart`: queries, keys and values come from three tensors, so the weight is cut, not the product."""

    def __init__(self, apart: bool, need_weights: bool):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(24), nn.MultiheadAttention(24, 3, batch_first=True)
        self.apart, self.need_weights = apart, need_weights

    def forward(self, x):
        q = self.norm(x)
        k, v = (self.norm(x), self.norm(x)) if self.apart else (q, q)
        return x + self.attention(q, k, v, need_weights=self.need_weights)[0]


@pytest.mark.parametrize("need_weights", [False, True], ids=["sdpa", "weights"])
@pytest.mark.parametrize("apart", [False, True], ids=["one input", "three inputs"])
def test_queries_and_keys_come_apart_from_values(apart, need_weights):
    torch.manual_seed(0)
    plain, x = Attending(apart, need_weights), torch.randn(2, 5, 24)
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(x,))
    assert {(c.kind, c.size) for c in ecospa_fx.couplings(model)} >= {("qk", 8), ("vo", 8)}
    ecospa_fx.verify(model, example_inputs=(x,)).raise_if_failed()
    keeps = {c: half(c.size, i) for i, c in enumerate(ecospa_fx.couplings(model))}
    positions = kept_positions(plain, keeps)
    ecospa_fx.shrink(model, keeps)
    assert_equals_twin(model, zeroed(plain, positions), positions, (x,), {}, "all together")
