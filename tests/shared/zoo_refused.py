"""Models that cannot shrink, with the reasons."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from specimens import floats, pair, specimen
from torch import Tensor, nn


@torch.library.custom_op("specimens::centred", mutates_args=())
def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


centred.register_fake(torch.empty_like)
centred.register_autograd(lambda _, gradient: gradient - gradient.mean(-1, keepdim=True))


@torch.library.custom_op("specimens::both", mutates_args=())
def both(x: Tensor) -> tuple[Tensor, Tensor]:
    return x - x.mean(-1, keepdim=True), x.sum(-1)


both.register_fake(lambda x: (torch.empty_like(x), x.new_empty(x.shape[:-1])))
both.register_autograd(lambda _, first, second: first - first.mean(-1, keepdim=True) + second[..., None])


@specimen(
    pair("ffn", 7, "down[0] head.weight[1]"),
    inputs=floats(6),
    refused={"up[0] spectrum.weight[1]": "every frequency depends on all entries along the axis"},
)
class fourier_mixing(nn.Module):
    """FNet's: what a transform runs along stays whole, and what it does not touch shrinks."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 10), nn.Linear(10, 7), nn.Linear(7, 4)
        self.spectrum = nn.Linear(10, 4)

    def forward(self, x):
        x = self.up(x)
        return self.head(F.relu(self.down(x))) + self.spectrum(torch.fft.fft(x).real)


@specimen(
    inputs=floats(6),
    refused={"up[0] down.weight[1]": "entries along the axis are sorted"},
)
class sorted_features(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.down(self.up(x).sort(-1).values)


@specimen(
    pair("ffn", 7, "down[0] head.weight[1]"),
    inputs=floats(6),
    refused={"up[0] down.weight[1]": "no axis rule for specimens.centred"},
    missing=("specimens.centred",),
)
class unknown_op(nn.Module):
    """Its op mixes all entries; nobody told the library, so what it touches stays whole."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 10), nn.Linear(10, 7), nn.Linear(7, 4)
        self.highest = nn.Linear(10, 7)

    def forward(self, x):
        x = self.up(x)
        return self.head(F.relu(self.down(x))) + self.highest(centred(x))[..., :4]


@specimen(
    pair("ffn", 7, "down[0] head.weight[1]"),
    inputs=floats(6),
    refused={"up[0] down.weight[1]": "no axis rule for specimens.both"},
    missing=("specimens.both",),
)
class unknown_op_of_many_outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 10), nn.Linear(10, 7), nn.Linear(7, 4)

    def forward(self, x):
        x = self.up(x)
        return self.head(F.relu(self.down(x))), both(x)[1]
