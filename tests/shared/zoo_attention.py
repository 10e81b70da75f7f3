"""Attention in its spellings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from specimens import Pair, floats, pair, specimen
from torch import Tensor, nn


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


class Folded(Attention):
    """Heads folded into the batch, and a bias per head that comes folded like them."""

    def heads(self, x):
        return tuple(self.fold(t) for t in super().heads(x))

    def mix(self, q, k, v):
        keys, batch = k.shape[1], q.shape[0] // self.H
        slope = torch.arange(1.0, self.H + 1, dtype=q.dtype, device=q.device)[:, None]
        bias = self.fold((slope * torch.arange(keys, dtype=q.dtype)).expand(batch, self.H, keys))
        score = torch.baddbmm(bias.unsqueeze(1), q, k.transpose(1, 2)).softmax(-1)
        return self.unfold(score @ v)


@specimen(*separate(), inputs=floats(10))
class folded_attention(Folded):
    def fold(self, t):
        return t.reshape(-1, *t.shape[2:])

    def unfold(self, t):
        return t.unflatten(0, (-1, self.H))


@specimen(*separate(), inputs=floats(10))
class attention_folded_heads_first(Folded):
    def fold(self, t):
        return t.transpose(0, 1).reshape(-1, *t.shape[2:])

    def unfold(self, t):
        return t.unflatten(0, (self.H, -1)).transpose(0, 1)


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
    pair("qk", 4, "qkv[0]"), pair("vo", 4, "qkv[0] o.weight[1]"), pair("groups", 3, "qkv[0] o.weight[1]"),
    inputs=floats(10),
)  # fmt: skip
class fused_multi_query(Fused):
    """((h | k | v) e), as Falcon has it, taken apart by a slice and lists of one number"""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(self.D, (self.H + 2) * self.E)

    def heads(self, x):
        qkv = self.qkv(x).view(*x.shape[:2], self.H + 2, self.E)
        return tuple(t.transpose(1, 2) for t in (qkv[..., :-2, :], qkv[..., [-2], :], qkv[..., [-1], :]))

    def mix(self, q, k, v):
        return ((q @ k.transpose(-2, -1)) * self.E**-0.5).softmax(-1) @ v


@specimen(
    pair("qk", 4, "qkv[0]"), pair("vo", 4, "qkv[0] o.weight[1]"),
    pair("heads", 2, "qkv[0] o.weight[1]"), pair("groups", 3, "qkv[0] o.weight[1]"),
    inputs=floats(10),
)  # fmt: skip
class fused_groups(Fused):
    """(k (g | 1 | 1) e), as the larger Falcon has it: keys and values are repeated for the queries of their group"""

    H, K = 6, 2

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(self.D, (self.H + 2 * self.K) * self.E)

    def heads(self, x):
        qkv = self.qkv(x).view(*x.shape[:2], self.K, self.H // self.K + 2, self.E)
        q, k, v = qkv[..., :-2, :], qkv[..., [-2], :], qkv[..., [-1], :]
        return tuple(t.expand(q.shape).flatten(2, 3).transpose(1, 2) for t in (q, k, v))


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
    pair("qk", 4, "q[0] k[0] q_norm.weight[0] k_norm.weight[0]"),
    pair("vo", 4, "v[0] o.weight[1]"),
    pair("heads", 3, "q[0] k[0] v[0] o.weight[1]"),
    inputs=floats(10),
    zeroing="averages are over what is left of a head",
    smaller=lambda: normed_queries(1, 2),
)
class normed_queries(Attention):
    """Qwen3's: the norm averages over the entries of a head."""

    def __init__(self, heads=3, dims=4):
        self.H, self.K, self.E = heads, heads, dims
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(self.E, eps=1e-6), nn.RMSNorm(self.E, eps=1e-6)
        nn.init.normal_(self.q_norm.weight)

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, is_causal=True, scale=0.5)


@specimen(
    pair("qk", 4, "attn.q[0] attn.k[0]"),
    pair("vo", 4, "attn.v[0] attn.o.weight[1]"),
    pair("heads", 3, "attn.q[0] attn.k[0] attn.v[0] attn.o.weight[1]"),
    pair("ffn", 11, "up[0] down.weight[1]"),
    inputs=floats(10),
    refused={
        # Not `norm1` and what it feeds: the stream comes in from outside, where nothing here produces it.
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
