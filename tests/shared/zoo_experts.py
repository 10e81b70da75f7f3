"""Mixtures of experts: which expert a token meets depends on values, what an expert is made of does not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from specimens import floats, pair, specimen
from torch import nn
from transformers.integrations import moe  # noqa: F401  (registers an op)


class Experts(nn.Module):
    """Three experts of width 5 for tokens of width 6, two to a token; fused weights `[experts, ...]`."""

    E, D, F, K = 3, 6, 5, 2

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(self.D, self.E)
        self.gate_up_matrix = nn.Parameter(torch.randn(self.E, 2 * self.F, self.D))
        self.down_matrix = nn.Parameter(torch.randn(self.E, self.D, self.F))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights, experts = self.router(tokens).softmax(-1).topk(self.K, dim=-1)
        return self.mix(tokens, weights, experts).view(x.shape)


GLU = pair("glu", 5, "gate_up_matrix[1] down_matrix[2]")


@specimen(GLU, inputs=floats(6))
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


@specimen(GLU, inputs=floats(6))
class picked_experts(Experts):
    """Every token picks its matrices."""

    def mix(self, tokens, weights, experts):
        rows = torch.einsum("td,tkfd->tkf", tokens, self.gate_up_matrix[experts])
        gate, up = rows.chunk(2, dim=-1)
        return torch.einsum("tkf,tkdf,tk->td", F.silu(gate) * up, self.down_matrix[experts], weights)


@specimen(GLU, inputs=floats(6))
class dense_experts(Experts):
    """Every expert sees every token; the router weighs them."""

    def mix(self, tokens, weights, experts):
        scores = torch.zeros(*tokens.shape[:-1], self.E, dtype=tokens.dtype).scatter(-1, experts, weights)
        gate, up = torch.bmm(tokens.expand(self.E, -1, -1), self.gate_up_matrix.transpose(1, 2)).chunk(2, dim=-1)
        each = torch.bmm(F.silu(gate) * up, self.down_matrix.transpose(1, 2))
        return (each * scores.t()[..., None]).sum(0)
