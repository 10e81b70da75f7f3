"""Tiny models, each with the couplings and refusals that it has, written out by hand from its arithmetic.

`B` batch, `S` sequence, `D` model width, `H` heads, `K` key heads, `E` entries per head, `F` hidden width. Sizes differ
wherever a model can afford it, so that a wrong axis shows; `everything_equal` is the opposite on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[str, int, frozenset[str]]  # (kind, size, the parameter dims it runs along)


@dataclass(frozen=True)
class Specimen:
    """A model of the zoo.

    Attributes:
        build: makes it, with random weights.
        inputs: `inputs(batch, sequence)` are the arguments of a call.
        couplings: all it has.
        refusals: (parameter dims on one axis that cannot shrink, words that the reason contains); others may be there.
        missing: ops that have no rule.
        zeroing: whether zeroed weights are removed weights; else why not.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], tuple[Tensor, ...]]
    couplings: frozenset[Pair]
    refusals: tuple[tuple[frozenset[str], str], ...] = ()
    missing: frozenset[str] = frozenset()
    zeroing: str = ""

    def __repr__(self) -> str:
        return self.build.__name__


ZOO: dict[str, Specimen] = {}


def pair(kind: str, size: int, members: str) -> Pair:
    """A coupling: `q.weight[0]`; `q[0]` stands for `q.weight[0] q.bias[0]`."""
    return kind, size, _members(members)


def _members(text: str) -> frozenset[str]:
    names = []
    for member in text.split():
        if member.split("[")[0].rpartition(".")[2] in ("weight", "bias", "vector", "in_proj_weight", "in_proj_bias"):
            names.append(member)
        else:
            module, dim = member.split("[")
            names += [f"{module}.weight[{dim}", f"{module}.bias[{dim}"]
    return frozenset(names)


def floats(width: int) -> Callable[[int, int], tuple[Tensor, ...]]:
    return lambda batch, sequence: (torch.randn(batch, sequence, width),)


def images(channels: int) -> Callable[[int, int], tuple[Tensor, ...]]:
    return lambda batch, side: (torch.randn(batch, channels, side + 5, side + 5),)


def words(vocabulary: int) -> Callable[[int, int], tuple[Tensor, ...]]:
    return lambda batch, sequence: (torch.randint(vocabulary, (batch, sequence)),)


def specimen(
    *couplings: Pair,
    inputs: Callable[[int, int], tuple[Tensor, ...]],
    refused: dict[str, str] | None = None,
    missing: tuple[str, ...] = (),
    zeroing: str = "",
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Put a class into the zoo."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        refusals = tuple((_members(members), reason) for members, reason in (refused or {}).items())
        ZOO[cls.__name__] = Specimen(cls, inputs, frozenset(couplings), refusals, frozenset(missing), zeroing)
        return cls

    return register


# Perceptrons


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
)
class summed_sigmoids(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 10), nn.Linear(6, 10)

    def forward(self, x):
        return (torch.sigmoid(self.left(x)) * torch.sigmoid(self.right(x))).sum(-1)


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


# Attention


class Attention(nn.Module):
    """Separate projections; variants override `heads` (how projections become heads) or `mix` (how heads meet)."""

    D, H, K, E = 10, 3, 3, 4
    bias = True

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(self.D, self.H * self.E, bias=self.bias)
        self.k = nn.Linear(self.D, self.K * self.E, bias=self.bias)
        self.v = nn.Linear(self.D, self.K * self.E, bias=self.bias)
        self.o = nn.Linear(self.H * self.E, self.D, bias=self.bias)

    def heads(self, x):
        shape = *x.shape[:2], -1, self.E
        return tuple(project(x).view(shape).transpose(1, 2) for project in (self.q, self.k, self.v))

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x):
        mixed = self.mix(*self.heads(x))
        return self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], self.H * self.E))


def separate(heads: str = "heads", count: int = 3) -> tuple[Pair, ...]:
    """The couplings of plain attention with biases."""
    return (
        pair("qk", 4, "q[0] k[0]"), pair("vo", 4, "v[0] o.weight[1]"), pair(heads, count, "q[0] k[0] v[0] o.weight[1]"),
    )  # fmt: skip


@specimen(*separate(), inputs=floats(10))
class attention(Attention):
    pass


@specimen(
    pair("qk", 4, "q.weight[0] k.weight[0]"),
    pair("vo", 4, "v.weight[0] o.weight[1]"),
    pair("heads", 3, "q.weight[0] k.weight[0] v.weight[0] o.weight[1]"),
    inputs=floats(10),
)
class attention_without_bias(Attention):
    bias = False


@specimen(*separate(), inputs=floats(10))
class eager_attention(Attention):
    """Matmul, scale, mask, softmax; the scale is read off the shape."""

    def mix(self, q, k, v):
        score = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        causal = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril()
        return score.masked_fill(~causal, float("-inf")).softmax(-1) @ v


@specimen(*separate(), inputs=floats(10))
class einsum_attention(Attention):
    def heads(self, x):
        return tuple(project(x).unflatten(-1, (-1, self.E)) for project in (self.q, self.k, self.v))

    def mix(self, q, k, v):
        score = torch.einsum("bqhe,bkhe->bhqk", q, k) * self.E**-0.5
        return torch.einsum("bhqk,bkhe->bhqe", score.softmax(-1), v)


FUSED = (
    pair("qk", 4, "qkv[0]"), pair("vo", 4, "qkv[0] o.weight[1]"), pair("heads", 3, "qkv[0] o.weight[1]"),
)  # fmt: skip


class Fused(Attention):
    def __init__(self):
        nn.Module.__init__(self)
        self.qkv, self.o = nn.Linear(self.D, 3 * self.H * self.E), nn.Linear(self.H * self.E, self.D)


@specimen(*FUSED, inputs=floats(10))
class fused_segments(Fused):
    """q | k | v"""

    def heads(self, x):
        return tuple(t.view(*x.shape[:2], self.H, self.E).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))


@specimen(*FUSED, inputs=floats(10))
class fused_split(Fused):
    """q | k | v, by sizes"""

    def heads(self, x):
        parts = self.qkv(x).split(self.H * self.E, dim=-1)
        return tuple(t.unflatten(-1, (self.H, self.E)).permute(0, 2, 1, 3) for t in parts)


@specimen(*FUSED, inputs=floats(10))
class fused_per_head(Fused):
    """(h (q | k | v)), as GPT-NeoX has it"""

    def heads(self, x):
        return self.qkv(x).view(*x.shape[:2], self.H, 3 * self.E).transpose(1, 2).chunk(3, dim=-1)


@specimen(*FUSED, inputs=floats(10))
class fused_stacked(Fused):
    """((qkv) h e), as timm has it: one tensor for all three, taken apart again"""

    def heads(self, x):
        return self.qkv(x).reshape(*x.shape[:2], 3, self.H, self.E).permute(2, 0, 3, 1, 4).unbind(0)


@specimen(*FUSED, inputs=floats(10))
class fused_stacked_select(Fused):
    """((qkv) h e), taken apart by position"""

    def heads(self, x):
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.H, self.E).permute(2, 0, 3, 1, 4)
        return qkv[0], qkv[1], qkv[2]


@specimen(
    pair("qk", 4, "attn.in_proj_weight[0] attn.in_proj_bias[0]"),
    pair("vo", 4, "attn.in_proj_weight[0] attn.in_proj_bias[0] attn.out_proj.weight[1]"),
    pair("heads", 3, "attn.in_proj_weight[0] attn.in_proj_bias[0] attn.out_proj.weight[1]"),
    inputs=floats(12),
)
class torch_attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)
        # torch starts these at zero, where gradients would have nothing to show.
        nn.init.normal_(self.attn.in_proj_bias)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


@specimen(
    *separate(),
    inputs=lambda batch, sequence: (torch.randn(batch, sequence, 10), torch.randn(batch, sequence + 2, 7)),
)
class cross_attention(Attention):
    def __init__(self):
        super().__init__()
        self.k, self.v = nn.Linear(7, self.K * self.E), nn.Linear(7, self.K * self.E)

    def forward(self, x, memory):
        split = lambda t: t.unflatten(-1, (self.H, self.E)).transpose(1, 2)  # noqa: E731
        mixed = F.scaled_dot_product_attention(split(self.q(x)), split(self.k(memory)), split(self.v(memory)))
        return self.o(mixed.transpose(1, 2).flatten(-2))


def table(length: int, pairs: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device).to(like)[:, None] / 10.0 ** torch.arange(pairs).to(like)


class Rotary(Attention):
    """Rotates pairs of entries, i and i + E/2."""

    bias = False
    H, K, E = 4, 2, 6

    def rotate(self, x):
        angle = table(x.shape[-2], self.E // 2, x).repeat(1, 2)
        a, b = x[..., : self.E // 2], x[..., self.E // 2 :]
        return x * angle.cos() + torch.cat([-b, a], dim=-1) * angle.sin()

    def repeat(self, x):
        batch, heads, sequence, entries = x.shape
        x = x[:, :, None].expand(batch, heads, self.H // self.K, sequence, entries)
        return x.reshape(batch, self.H, sequence, entries)

    def mix(self, q, k, v):
        q, k = self.rotate(q), self.rotate(k)
        return F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v), is_causal=True)


ROTARY = (
    pair("qk", 3, "q.weight[0] k.weight[0]"),
    pair("vo", 6, "v.weight[0] o.weight[1]"),
    pair("heads", 2, "q.weight[0] k.weight[0] v.weight[0] o.weight[1]"),
    pair("groups", 2, "q.weight[0] o.weight[1]"),
)


@specimen(*ROTARY, inputs=floats(10))
class grouped_expand(Rotary):
    pass


@specimen(*ROTARY, inputs=floats(10))
class grouped_repeat_interleave(Rotary):
    def repeat(self, x):
        return x.repeat_interleave(self.H // self.K, dim=1)


@specimen(*ROTARY, inputs=floats(10))
class grouped_sdpa(Rotary):
    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=True)


@specimen(*ROTARY, inputs=floats(10))
class grouped_interleaved(Rotary):
    """Rotates neighbours, 2i and 2i + 1, as GPT-J does."""

    def rotate(self, x):
        angle = table(x.shape[-2], self.E // 2, x)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1).flatten(-2)


@specimen(
    pair("qk", 4, "q.weight[0] k.weight[0]"),
    pair("vo", 4, "v.weight[0] o.weight[1]"),
    pair("groups", 3, "q.weight[0] o.weight[1]"),
    inputs=floats(10),
)
class multi_query(Attention):
    """One key head for all: there is no key-head axis to shrink, only the queries'."""

    bias = False
    K = 1

    def mix(self, q, k, v):
        return ((q @ k.transpose(-2, -1)) * self.E**-0.5).softmax(-1) @ v


@specimen(
    pair("vo", 4, "v[0] o.weight[1]"),
    pair("heads", 3, "q[0] k[0] v[0] o.weight[1]"),
    inputs=floats(10),
    refused={"q.weight[0] k.weight[0] q_norm.weight[0] k_norm.weight[0]": "rms_norm: the statistics are averages"},
)
class normed_queries(Attention):
    """Qwen3's: the norm averages over the entries of a head."""

    def __init__(self):
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(self.E, eps=1e-6), nn.RMSNorm(self.E, eps=1e-6)

    def mix(self, q, k, v):
        return super().mix(self.q_norm(q), self.k_norm(k), v)


@specimen(
    pair("qk", 4, "attn.q[0] attn.k[0]"),
    pair("vo", 4, "attn.v[0] attn.o.weight[1]"),
    pair("heads", 3, "attn.q[0] attn.k[0] attn.v[0] attn.o.weight[1]"),
    pair("ffn", 11, "up[0] down.weight[1]"),
    inputs=floats(10),
    refused={
        # Not `norm1` and what it feeds: the stream comes in from outside, where nothing here produces it.
        "attn.o[0] norm2[0] up.weight[1] down[0]": "layer_norm: the statistics are averages over the axis",
        "attn.o[0] norm2[0] down[0]": "leaves the region as output 0",
    },
)
class transformer_block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(10), nn.LayerNorm(10), attention()
        self.up, self.down = nn.Linear(10, 11), nn.Linear(11, 10)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@specimen(
    pair("ffn", 4, "embed[0] up.weight[1]"),
    pair("ffn", 4, "up[0] down.weight[1]"),
    pair("ffn", 4, "down[0] attn.qkv.weight[1]"),
    pair("qk", 2, "attn.qkv[0]"),
    pair("vo", 2, "attn.qkv[0] attn.o.weight[1]"),
    pair("heads", 2, "attn.qkv[0] attn.o.weight[1]"),
    pair("ffn", 4, "attn.o[0] head.weight[1]"),
    inputs=floats(4),
)
class everything_equal(nn.Module):
    """Every width is 4, every factor 2, and so are batch and sequence: axes meet by position, never by size."""

    class Small(fused_segments):
        D, H, E = 4, 2, 2

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.attn = self.Small()

    def forward(self, x):
        x = self.down(F.relu(self.up(F.relu(self.embed(x)))))
        return self.head(self.attn(x))


# Convolutions


@specimen(pair("conv", 8, "conv1[0] norm[0] conv2.weight[1]"), inputs=images(3))
class conv_norm_conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 3)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        return self.conv2(F.relu(self.norm(self.conv1(x))))


@specimen(pair("conv", 8, "expand[0] depthwise[0] project.weight[1]"), inputs=images(3))
class depthwise_block(nn.Module):
    """MobileNet's: each channel has a kernel of its own in the middle."""

    def __init__(self):
        super().__init__()
        self.expand, self.project = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x):
        return self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))


@specimen(pair("conv", 8, "conv[0] head.weight[1]"), inputs=images(3))
class pooled_classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(F.relu(self.conv(x)), 1).flatten(1))


# Refused


@specimen(inputs=floats(6), refused={"up[0] down.weight[1]": "softmax: every entry along the axis feeds others"})
class softmax_features(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.down(self.up(x).softmax(-1))


@specimen(
    pair("ffn", 7, "down[0] head.weight[1]"),
    inputs=floats(6),
    refused={"up[0] down.weight[1]": "no axis rule for aten.fft_fft"},
    missing=("aten.fft_fft", "aten.real"),
)
class unknown_op(nn.Module):
    """A spectrum mixes all entries; nobody told the library, so what it touches stays whole."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 10), nn.Linear(10, 7), nn.Linear(7, 4)
        self.spectrum = nn.Linear(10, 7)

    def forward(self, x):
        x = self.up(x)
        return self.head(F.relu(self.down(x))) + self.spectrum(torch.fft.fft(x).real)[..., :4]


@specimen(
    pair("ffn", 7, "down[0] head.weight[1]"),
    inputs=floats(6),
    refused={"up[0] down.weight[1]": "no axis rule for aten.linalg_qr"},
    missing=("aten.linalg_qr",),
)
class unknown_op_of_many_outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 10), nn.Linear(10, 7), nn.Linear(7, 4)

    def forward(self, x):
        x = self.up(x)
        return self.head(F.relu(self.down(x))), torch.linalg.qr(x)[1]
