"""Noise along an axis that shrinks: an entry that stays sees the same draw masked and shrunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.passes.rewrite import draws

NOISE: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "of the sizes of the axis": [
        lambda h: h * torch.rand_like(h) + torch.randn_like(h),
        lambda h: h + torch.randn(h.shape).to(h) * torch.rand(h.shape[-1]).to(h),
        lambda h: h * torch.rand_like(h.transpose(0, 1)).transpose(0, 1),
        lambda h: torch.cat([h[..., :3] * torch.rand_like(h[..., :3]), h[..., 3:]], -1) + torch.rand_like(h),
    ],
    "inside an op": [
        lambda h: F.dropout(F.dropout(h, 0.3, True) + h, 0.3, True),
        lambda h: F.dropout(h * 1.0, 0.3, True, inplace=True),
        lambda h: F.dropout1d(h.mT, 0.4, True).mT + F.feature_alpha_dropout(h, 0.3, True),
        lambda h: F.rrelu(h, 0.1, 0.9, True),
    ],
    "with parameters": [
        lambda h: torch.normal(h, h.abs()) * torch.bernoulli(h.sigmoid()),
        lambda h: h + torch.poisson(h.abs() * 5),
        lambda h: F.gumbel_softmax(h, dim=1),
    ],
    "written": [
        lambda h: h * torch.empty_like(h).exponential_() + h.new_empty(h.shape).normal_(),
        lambda h: h * torch.empty_like(h)[..., :].uniform_(),
        lambda h: h + h.new_empty(h.shape).mT.normal_().mT,
        lambda h: h * h.new_empty(*h.shape[:-1], 2, h.shape[-1])[..., 0, :].normal_(),
    ],
}


class Noisy(nn.Module):
    def __init__(self, noise: str) -> None:
        super().__init__()
        self.noise = noise
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        for noise in NOISE[self.noise]:
            h = noise(h)
        return self.down(h)


class NoisyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, dropout_p=0.3).transpose(1, 2).flatten(2))


class NoisyLatent(nn.Module):
    """An autoencoder whose latent takes the layout of what comes in, which what is left may not keep."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.up, self.down, self.head = nn.Linear(8, 6), nn.Conv2d(6, 3, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.down(self.norm(self.up(x).permute(0, 3, 1, 2)))
        return self.head(mean + torch.randn_like(mean))


class NoisyRecurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.rnn, self.down = nn.Linear(8, 6), nn.LSTM(6, 5, 2, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(2, x.shape[0], 5)
        weights = list(self.rnn.parameters())
        return self.down(torch.lstm(self.up(x), [h, h], weights, True, 2, 0.4, True, False, True)[0])


def compiled(model: nn.Module, execution: Any = "graph") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8).double()
    return ecospa_fx.compile(model.double(), example_inputs=(x,), regions="root", execution=execution), x


@pytest.mark.parametrize("name", NOISE)
def test_noise_along_a_coupling_is_exact(name: str) -> None:
    model, x = compiled(Noisy(name))
    assert len(ecospa_fx.couplings(model)) >= 1
    result = ecospa_fx.verify(model, example_inputs=(x,))
    assert result.ok, result
    ecospa_fx.shrink(model, {ecospa_fx.couplings(model)[0]: torch.tensor([0, 2])})
    assert ecospa_fx.verify(model, example_inputs=(x,)).ok


@pytest.mark.parametrize(("model", "names"), [(NoisyAttention, "heads qk vo"), (NoisyRecurrent, "ffn recurrent")])
def test_ops_that_draw_inside_are_exact(model: Any, names: str) -> None:
    noisy, x = compiled(model())
    assert " ".join(sorted(c.name for c in ecospa_fx.couplings(noisy))) == names
    result = ecospa_fx.verify(noisy, example_inputs=(x,))
    assert result.ok, result


@pytest.mark.parametrize("norm", [nn.Identity(), nn.GroupNorm(1, 6)])
def test_noise_in_another_layout_is_the_same(norm: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 8).double()
    model = ecospa_fx.compile(NoisyLatent(norm).double(), example_inputs=(x,), regions="root")
    result = ecospa_fx.verify(model, example_inputs=(x,))
    assert len(result.by_coupling) == 3 and result.ok, result


def test_its_own_python_follows_noise() -> None:
    """It draws at the sizes left, where a program draws whole tensors and selects."""

    class Drawing(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(self.up(x), 0.3, True)
            h = h + torch.randn(h.shape).to(x) * torch.rand(h.shape[-1]).to(x)
            return self.down(h * torch.rand_like(h) + h.new_empty(h.shape).normal_())

    model, x = compiled(Drawing(""), "module")
    assert [c.name for c in ecospa_fx.couplings(model)] == ["ffn"]
    ecospa_fx.shrink(model, {"ffn": torch.tensor([0, 2])})
    assert model(x).shape == (3, 5, 4) and ecospa_fx.verify(model, example_inputs=(x,)).ok


def test_draws_of_other_entries_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = compiled(Noisy("inside an op"))
    cut = draws._cut
    monkeypatch.setattr(draws, "_cut", lambda tensor, left: cut(tensor.roll(1, -1), left))
    assert not ecospa_fx.verify(model, example_inputs=(x,)).ok


def test_an_op_that_is_rewritten_to_wrong_sizes_is_not_hidden() -> None:
    """A stand-in gives what the op of the rewritten graph gives where the sizes of that are wrong."""
    model, x = compiled(Noisy("with parameters"))
    region = vars(model)["_ecospa_model"].regions[""]
    facts = region.naming_graph.axis_facts
    kept = {region.naming_graph.discovery.couplings[0].atom: torch.arange(6) < 2}
    same = draws.SameDraws(facts, kept, facts.captured.signature.dynamic_sizes([x]))
    node = next(n for n in facts.captured.graph.nodes if n.target is torch.ops.aten.bernoulli.default)
    same.call(node, lambda op, args, kwargs: op(*args, **kwargs), (torch.full((3, 5, 6), 0.5),), {})
    small = torch.full((3, 5, 2), 0.5)
    right = same.stand_ins()[node](node.target)(small)
    wrong = same.stand_ins()[node](torch.ops.aten.flatten.using_ints)(small)
    assert right.shape == (3, 5, 2) and wrong.shape == (30,)
