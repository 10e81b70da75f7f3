"""Sizes of which a graph holds only where they are one: an image of one patch, attended to by queries."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ecospa_fx


class Queries(nn.Module):
    """Learned queries that look at the patches of an image, in heads."""

    def __init__(self):
        super().__init__()
        self.patches, self.asked = nn.Conv2d(3, 8, 3, stride=4), nn.Parameter(torch.randn(5, 8))
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, image):
        seen = self.patches(image).flatten(2).transpose(1, 2)
        seen = seen + torch.zeros(1, seen.shape[1], 1)
        asked = self.asked.expand(len(image), -1, -1)
        q, k, v = (
            layer(x).view(len(image), x.shape[1], -1, 2).transpose(1, 2)
            for layer, x in ((self.q, asked), (self.k, seen), (self.v, seen))
        )
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("side", [5, 11])
def test_one_patch_is_no_obstacle_to_heads(side):
    torch.manual_seed(0)
    plain = Queries()
    model = ecospa_fx.compile(copy.deepcopy(plain), example_inputs=(torch.randn(2, 3, side, side),))
    sizes = {c.kind: c.size for c in ecospa_fx.couplings(model) if c.kind != "conv"}
    assert sizes == {"heads": 4, "qk": 2, "vo": 2}
    (heads,) = [c for c in ecospa_fx.couplings(model) if c.kind == "heads"]
    ecospa_fx.shrink(model, {heads: torch.tensor([0, 2])})
    with torch.no_grad():
        plain.o.weight[:, [2, 3, 6, 7]] = 0
    for other in (5, 6, 11, 8):  # one patch, one, nine, four
        image = torch.randn(3, 3, other, other)
        torch.testing.assert_close(model(image), plain(image))
