"""Perceptrons, gated and not; residual streams; tied weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from specimens import floats, pair, specimen, words
from torch import nn


@specimen(pair("ffn", 10, "up[0] down.weight[1]"), inputs=floats(6))
class mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


@specimen(
    pair("ffn", 8, "0[0] 2.weight[1]"),
    pair("ffn", 9, "2[0] 4.weight[1]"),
    pair("ffn", 7, "4.weight[0] 6.weight[1]"),
    inputs=floats(6),
)
class deep_mlp(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 7, bias=False), nn.Sigmoid(),
            nn.Linear(7, 4),
        )  # fmt: skip


@specimen(pair("glu", 10, "gate.weight[0] up.weight[0] down.weight[1]"), inputs=floats(6))
class glu(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False)
        self.down = nn.Linear(10, 6, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@specimen(pair("glu", 10, "both[0] down.weight[1]"), inputs=floats(6))
class fused_glu(nn.Module):
    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(6, 20), nn.Linear(10, 6)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * up)


@specimen(
    pair("ffn", 5, "left[0] head.weight[1]"), pair("ffn", 7, "right[0] head.weight[1]"), inputs=floats(6)
)  # fmt: skip
class concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 5), nn.Linear(6, 7), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(torch.cat([F.relu(self.left(x)), torch.tanh(self.right(x))], dim=-1))


@specimen(
    pair(
        "residual", 8, "embed[0] head.weight[1] "
        "blocks.0.up.weight[1] blocks.0.down[0] blocks.1.up.weight[1] blocks.1.down[0]",
    ),
    pair("ffn", 10, "blocks.0.up[0] blocks.0.down.weight[1]"),
    pair("ffn", 10, "blocks.1.up[0] blocks.1.down.weight[1]"),
    inputs=floats(6),
)  # fmt: skip
class residual_stream(nn.Module):
    """Nothing pins the stream: it shrinks through all blocks at once."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 8)

        def forward(self, x):
            return x + self.down(F.relu(self.up(x)))

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@specimen(
    pair("ffn", 10, "up[0] down.weight[1]"),
    inputs=floats(6),
    refused={"down.weight[0] up.weight[1]": "leaves the region"},
)
class applied_twice(nn.Module):
    """One pair of weights, used in two places."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        x = x + self.down(F.relu(self.up(x)))
        return x + self.down(F.relu(self.up(x)))


@specimen(pair("ffn", 10, "up[0] down.weight[1]"), inputs=floats(6))
class unused_submodule(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)
        self.idle = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
        self.idle_vector = nn.Parameter(torch.randn(10))

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


@specimen(pair("ffn", 10, "up[0] vector[0] down.weight[1]"), inputs=floats(6))
class scaled_hidden(nn.Module):
    """A vector that multiplies the hidden entries goes with them."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.vector = nn.Linear(6, 10), nn.Linear(10, 6), nn.Parameter(torch.randn(10))

    def forward(self, x):
        return x + self.down(self.up(x) * self.vector)


@specimen(pair("ffn", 5, "up[0] down.weight[1]"), inputs=lambda batch, _: (torch.randn(batch, 7, 6),))
class token_mlp(nn.Module):
    """MLP-Mixer's: along positions, the channels being a batch."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(7, 5), nn.Linear(5, 7)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


@specimen(
    pair("glu", 10, "left[0] right[0]"),
    inputs=floats(6),
    zeroing="sigmoid(0) is 1/2 and a plain sum, in which there is no weight to zero, consumes it",
    smaller=lambda: summed_sigmoids(5),
)
class summed_sigmoids(nn.Module):
    def __init__(self, width=10):
        super().__init__()
        self.left, self.right = nn.Linear(6, width), nn.Linear(6, width)

    def forward(self, x):
        return (torch.sigmoid(self.left(x)) * torch.sigmoid(self.right(x))).sum(-1)


@specimen(
    pair("ffn", 10, "up[0] down.weight[1]"),
    inputs=floats(6),
    zeroing="exp(0) is 1",
    smaller=lambda: softmax_features(5),
)
class softmax_features(nn.Module):
    """Shares of what is left."""

    def __init__(self, width=10):
        super().__init__()
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 4)

    def forward(self, x):
        return self.down(self.up(x).softmax(-1))


@specimen(
    pair("residual", 12, "words.weight[1] norm1[0] up.weight[1] down[0] norm2[0] head.weight[1]"),
    pair("ffn", 14, "up[0] down.weight[1]"),
    inputs=words(11),
    zeroing="averages are over what is left",
    smaller=lambda: normed_stream(6, 7),
)
class normed_stream(nn.Module):
    """A residual stream behind layer norms, one of them spelled out."""

    def __init__(self, width=12, inner=14):
        super().__init__()
        self.words = nn.Embedding(11, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, inner), nn.Linear(inner, width), nn.Linear(width, 5)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.words(x)
        x = x + self.down(F.gelu(self.up(self.norm1(x))))
        centred = x - x.mean(-1, keepdim=True)
        spread = torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)
        return self.head(centred * spread * self.norm2.weight + self.norm2.bias)


_HIDDEN = "weight_ih_l0[0] weight_hh_l0[0] weight_hh_l0[1] bias_ih_l0[0] bias_hh_l0[0]"


@specimen(
    pair("ffn", 7, "up[0] down.weight[1]"),
    pair("ffn", 6, "down[0] rnn.weight_ih_l0[1]"),
    pair("recurrent", 5, f"{' '.join(f'rnn.{name}' for name in _HIDDEN.split())} head.weight[1]"),
    inputs=floats(6),
)
class recurrent(nn.Module):
    """A hidden unit is a row of every gate, a column of the recurrent matrix and a column of the head."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6)
        self.rnn, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.rnn(self.down(F.relu(self.up(x))))[0])


@specimen(
    pair("ffn", 6, "down[0] rnn.weight_ih_l0[1] rnn.weight_ih_l0_reverse[1]"),
    pair(
        "recurrent", 5, " ".join(
            f"rnn.{part.replace('l0', f'l{layer}{way}')}"
            for part in _HIDDEN.split() for layer in (0, 1) for way in ("", "_reverse")
        ) + " rnn.weight_ih_l1[1] rnn.weight_ih_l1_reverse[1] head.weight[1]",
    ),
    inputs=floats(6),
)  # fmt: skip
class stacked_recurrent(nn.Module):
    """Two layers and two directions: their states lie in one tensor, so they have their hidden units in common."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(6, 6)
        self.rnn = nn.GRU(6, 5, batch_first=True, num_layers=2, bidirectional=True)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        return self.head(self.rnn(F.relu(self.down(x)))[0])


# Tied weights


@specimen(
    pair("residual", 8, "embed.weight[1] up.weight[1] down[0]"),
    pair("ffn", 10, "up[0] down.weight[1]"),
    inputs=words(11),
)
class tied_head(nn.Module):
    """The head is the embedding: one parameter under two names, named once."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 8)
        self.head.weight = self.embed.weight

    def forward(self, words):
        x = self.embed(words)
        return self.head(x + self.down(F.relu(self.up(x))))


@specimen(
    pair("ffn", 8, "first[0] first.weight[1] second.bias[0] last.weight[1]"),
    inputs=floats(8),
)
class tied_linears(nn.Module):
    """One square matrix twice in a row: its rows and its columns are one axis."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(F.relu(self.second(F.relu(self.first(x)))))


@specimen(pair("glu", 10, "both[0] down.weight[1]"), inputs=floats(6))
class torch_glu(nn.Module):
    """One op for both halves."""

    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(6, 20), nn.Linear(10, 6)

    def forward(self, x):
        return self.down(F.glu(self.both(x)))
