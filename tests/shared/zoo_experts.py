"""Mixtures of experts: the experts themselves are entries of an axis, and so are the hidden units of them all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from specimens import floats, pair, specimen
from torch import nn
from transformers.integrations import moe  # noqa: F401  (registers an op)


class Experts(nn.Module):
    """Eight experts of width 10 for tokens of width 6, two to a token; fused weights `[experts, ...]`."""

    D, K = 6, 2

    def __init__(self, experts=8, width=10):
        super().__init__()
        self.E = experts
        self.router = nn.Linear(self.D, experts)
        self.gate_up_matrix = nn.Parameter(torch.randn(experts, 2 * width, self.D))
        self.down_matrix = nn.Parameter(torch.randn(experts, self.D, width))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights, experts = self.route(self.router(tokens))
        return self.mix(tokens, weights, experts).view(x.shape)

    def route(self, logits):
        return logits.softmax(-1).topk(self.K, dim=-1)


HIDDEN = pair("glu", 10, "gate_up_matrix[1] down_matrix[2]")
EXPERTS = pair("experts", 8, "router[0] gate_up_matrix[0] down_matrix[0]")
WHY = "an expert whose logit is zero takes part in the softmax, and may be chosen"


@specimen(HIDDEN, EXPERTS, inputs=floats(6), zeroing=WHY, smaller=lambda: grouped_experts(4, 5))
class grouped_experts(Experts):
    """Tokens sorted by expert meet the matrix of their group."""

    def mix(self, tokens, weights, experts):
        order = experts.flatten().argsort(stable=True)
        ends = torch.histc(experts.flatten().float(), self.E, 0, self.E - 1).cumsum(0).int()
        rows = tokens[order // self.K]
        grouped = torch.ops.transformers.grouped_mm_fallback
        gate, up = grouped(rows, self.gate_up_matrix.transpose(1, 2), ends).chunk(2, dim=-1)
        rows = grouped(F.silu(gate) * up, self.down_matrix.transpose(1, 2), ends) * weights.flatten()[order, None]
        return torch.zeros_like(tokens).index_add_(0, order // self.K, rows)


@specimen(HIDDEN, EXPERTS, inputs=floats(6), zeroing=WHY, smaller=lambda: picked_experts(4, 5))
class picked_experts(Experts):
    """Every token picks its matrices."""

    def mix(self, tokens, weights, experts):
        rows = torch.einsum("td,tkfd->tkf", tokens, self.gate_up_matrix[experts])
        gate, up = rows.chunk(2, dim=-1)
        return torch.einsum("tkf,tkdf,tk->td", F.silu(gate) * up, self.down_matrix[experts], weights)


@specimen(HIDDEN, EXPERTS, inputs=floats(6), zeroing=WHY, smaller=lambda: dense_experts(4, 5))
class dense_experts(Experts):
    """Every expert sees every token; the router weighs them."""

    def mix(self, tokens, weights, experts):
        scores = torch.zeros(*tokens.shape[:-1], self.E, dtype=tokens.dtype).scatter(-1, experts, weights)
        gate, up = torch.bmm(tokens.expand(self.E, -1, -1), self.gate_up_matrix.transpose(1, 2)).chunk(2, dim=-1)
        each = torch.bmm(F.silu(gate) * up, self.down_matrix.transpose(1, 2))
        return (each * scores.t()[..., None]).sum(0)


@specimen(HIDDEN, EXPERTS, inputs=floats(6), zeroing=WHY, smaller=lambda: dispatched_experts(4, 5))
class dispatched_experts(Experts):
    """Every expert has room for three tokens; gates of a sigmoid, chosen with a bias, add up to one."""

    def __init__(self, experts=8, width=10):
        super().__init__(experts, width)
        self.correction = nn.Buffer(torch.randn(experts))

    def route(self, logits):
        gates = logits.sigmoid()
        experts = (gates + self.correction).topk(self.K, dim=-1)[1]
        chosen = gates.gather(-1, experts)
        return chosen / chosen.sum(-1, keepdim=True), experts

    def mix(self, tokens, weights, experts):
        marks = F.one_hot(experts, self.E)
        places = marks.flatten(0, 1).cumsum(0).view_as(marks) * marks - 1
        fits = (places >= 0) & (places < 3)
        sent = (F.one_hot(places.clamp(0, 2), 3) * fits[..., None]).to(tokens.dtype)
        gate, up = torch.einsum("tkec,td,efd->ecf", sent, tokens, self.gate_up_matrix).chunk(2, dim=-1)
        each = torch.bmm(F.silu(gate) * up, self.down_matrix.transpose(1, 2))
        return torch.einsum("tkec,tk,ecd->td", sent, weights, each)


@specimen(
    HIDDEN,
    pair("experts", 2, "router[0] gate_up_matrix[0] down_matrix[0]"),
    pair("experts", 4, "router[0] gate_up_matrix[0] down_matrix[0]"),
    inputs=floats(6),
    zeroing=WHY,
    smaller=lambda: experts_in_groups(1, 2, 5),
)
class experts_in_groups(Experts):
    """The best expert of the best group."""

    K = 1

    def __init__(self, groups=2, experts=4, width=10):
        super().__init__(groups * experts, width)
        self.groups = groups

    def route(self, logits):
        gates = logits.sigmoid()
        best = gates.view(-1, self.groups, self.E // self.groups).amax(-1).argmax(-1, keepdim=True)
        mask = torch.zeros(gates.shape[0], self.groups, dtype=torch.bool).scatter(1, best, True)
        inside = mask.unsqueeze(-1).expand(-1, -1, self.E // self.groups).reshape(gates.shape)
        experts = gates.masked_fill(~inside, float("-inf")).argmax(-1, keepdim=True)
        return gates.gather(1, experts), experts

    mix = picked_experts.mix


@specimen(
    HIDDEN,
    inputs=floats(6),
    refused={"router[0] gate_up_matrix[0] down_matrix[0]": "aten.add: positions along the axis are used as numbers"},
)
class counted_experts(picked_experts):
    """The number of an expert is a number, too."""

    def route(self, logits):
        weights, experts = super().route(logits)
        return weights + 0.01 * (experts + 1), experts


@specimen(
    HIDDEN,
    inputs=floats(6),
    refused={"router[0] gate_up_matrix[0] down_matrix[0]": "positions along it leave the region as output 1"},
)
class named_experts(picked_experts):
    """The numbers of the experts are a result."""

    def forward(self, x):
        return super().forward(x), self.route(self.router(x))[1].to(x.dtype)
