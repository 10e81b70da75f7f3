"""Bugs that fuzzing found, each as the smallest program that showed it; and a short fuzz."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecospa_fx import errors
from ecospa_fx.testing import assert_exact


def exact(model: nn.Module, *args: Tensor) -> None:
    """Through torch.export, in float64, with weights of which no two are alike."""
    torch.manual_seed(0)
    for tensor in model.parameters():
        nn.init.normal_(tensor, std=0.4)
    for seed in range(3):
        assert_exact(model.eval(), args, regions="root", dtype=torch.float64, seed=seed)


def test_contiguous_leaves_no_trace_where_attention_laid_its_result_out_so() -> None:
    """With fewer entries in the values than in the queries another kernel runs, whose result `view` refuses."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(6, 36), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (y.view(2, 4, 3, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(mixed.transpose(1, 2).contiguous().view(2, 4, 12))

    exact(Model(), torch.randn(2, 4, 6))


def test_heads_that_run_faster_than_their_dims_are_no_context() -> None:
    """What is left of `(d h)` lies in the order of the dims, and those may be others in each head."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.empty(12, 2)), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            swapped = self.up.view(3, 4, 2).transpose(0, 1).reshape(12, 2)
            return self.down(F.linear(x, swapped))

    exact(Model(), torch.randn(5, 2))


def test_a_sum_over_what_has_been_normalised_is_rounding_and_no_error() -> None:
    """It is zero whatever the weights are, and what rounding leaves of it has no digits in common."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(self.up(x).view(2, 5, 2, 4).transpose(1, 2).transpose(1, 2).flatten(-2))
            normalised = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + 1e-2).sqrt()
            return normalised.sum(2)

    exact(Model(), torch.randn(2, 5, 4))


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x.narrow(-1, 0, 3),
        lambda x: x.unflatten(-1, (2, 3)).movedim(-2, 0)[0],
        lambda x: x.swapaxes(0, -1)[:3].swapaxes(0, -1),
        lambda x: x[..., :3],
    ],
    ids=["narrow", "movedim", "swapaxes", "slice"],
)
def test_what_is_written_into_a_part_is_in_the_whole(part) -> None:
    """A copy of an input depends on weights once they are written into a part of it, however that part is taken."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 6), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            whole = x.clone()
            written = part(whole).copy_(self.up(x)[..., :3])
            return whole, self.down(written)

    try:
        exact(Model(), torch.randn(2, 4, 6))
    except errors.NoCouplingError:
        return


def test_heads_that_meet_every_other_head_are_no_context() -> None:
    """The same dim of two heads is multiplied here: had each head kept others of its dims, they would not match."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 6), nn.Linear(24, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            flat = self.up(x).reshape(2, 4, 24)
            heads = flat.reshape(2, 4, 12, 2)
            return self.down(flat), torch.einsum("absd,abtd->abst", heads, heads)

    exact(Model(), torch.randn(2, 4, 4, 6))
