"""Scores of residual streams, which many matrices write to and read."""

import pytest
import torch
from torch import nn

import ecospa_fx
from ecospa_fx.score.judging import index_scores


class Stream(nn.Module):
    """An embedding, blocks that add to a stream behind norms, and a head."""

    def __init__(self, blocks=2, width=6):
        super().__init__()
        self.embed, self.norms = nn.Embedding(7, width), nn.ModuleList(nn.RMSNorm(width) for _ in range(blocks))
        self.up = nn.ModuleList(nn.Linear(width, 5) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(5, width) for _ in range(blocks))
        self.head = nn.Linear(width, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(up(norm(x)).relu())
        return self.head(x)


def scores_of(model):
    ecospa_fx.compile(model, example_inputs=(torch.randint(0, 7, (2, 4)),), regions="root")
    (stream,) = (c for c in ecospa_fx.couplings(model) if c.kind == "residual")
    return index_scores(model, stream)


def test_a_stream_is_scored_as_one_pair_of_matrices():
    torch.manual_seed(0)
    model = Stream().double()
    nn.init.constant_(model.norms[0].weight, 100.0)  # it scales what is read, and is no row of a matrix
    written = torch.cat([model.embed.weight.detach(), *(m.weight.detach().T for m in model.down)])
    written = torch.cat([written, *(m.bias.detach()[None] for m in model.down)])
    read = torch.cat([model.head.weight.detach(), *(m.weight.detach() for m in model.up)])
    assert scores_of(model).tolist() == pytest.approx((written.norm(dim=0) * read.norm(dim=0)).tolist(), rel=1e-12)


def test_scores_of_a_deep_stream_neither_vanish_nor_explode():
    torch.manual_seed(0)
    shallow, deep = (scores_of(Stream(blocks).double()) for blocks in (2, 60))
    for scores in (shallow, deep):
        assert scores.min() > 0 and scores.max() / scores.min() < 10
