"""Widths of the adaptive policy: uneven as far as it pays, and no further than the mean share of a kind allows."""

import torch
from torch import nn

import ecospa_fx
from ecospa_fx.train.adaptive import MOST_UNEVEN, AdaptiveSparsifier


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 40), nn.GELU(), nn.Linear(40, 8)) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def widths(worths, target):
    torch.manual_seed(0)
    model = ecospa_fx.compile(Three(), example_inputs=(torch.randn(4, 8),))
    found = ecospa_fx.couplings(model)
    sparsifier = AdaptiveSparsifier(model, target=target, among="prunable")
    at_most = sparsifier.target_size(sparsifier.sizes())
    worth = {c: torch.tensor(w, dtype=torch.float64).sort().values for c, w in zip(found, worths, strict=True)}
    after = sparsifier.widths(worth, at_most)
    return [after.get(c, c.size) for c in found]


def test_one_that_seems_cheap_loses_little_more_than_the_others():
    cheap, dear = [0.1] * 40, [1.0 + i for i in range(40)]
    kept = widths([cheap, dear, dear], 0.6)
    assert kept[0] == 40 - int(MOST_UNEVEN * 0.4 * 40) and sum(kept) in range(72, 74)
    assert kept[0] < min(kept[1:]) and abs(kept[1] - kept[2]) <= 1


def test_entries_that_do_nothing_go_wherever_they_are():
    dear = [1.0 + i for i in range(40)]
    kept = widths([[0.0] * 30 + dear[:10], dear, dear], 0.75)
    assert kept == [10, 40, 40]


def test_within_the_limit_the_price_decides():
    first, second = [float(i) for i in range(1, 41)], [float(i) + 2 for i in range(1, 41)]
    kept = widths([first, second, second], 0.5)
    assert kept[0] < kept[2] and abs(kept[1] - kept[2]) <= 1 and sum(kept) in range(60, 63)
