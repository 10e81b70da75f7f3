"""Pairs to live with: a compiled model, whole or shrunk, and the plain twin with zeros that it must equal."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_models import made
from torch import Tensor, nn
from twin import Positions, assert_same, half, kept_positions, sliced, without_stream, zeroed
from twin import run as run_twice

import ecospa_fx

LOOSE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


class Block(nn.Module):
    """Attention and an MLP whose hidden width a batch norm runs along: train and eval differ."""

    def __init__(self, width: int = 12, heads: int = 3, hidden: int = 20) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.norm, self.down = nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, s, d = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(d, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, d))
        return x + self.down(F.gelu(self.norm(self.up(x).transpose(1, 2)).transpose(1, 2)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(12, 7)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


@functools.cache
def _compiled(name: str, regions: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    if name == "net":
        plain: nn.Module = Net().to(dtype)
        kwargs: dict[str, Any] = {"x": torch.randn(3, 5, 12, dtype=dtype)}
    else:
        plain, kwargs = made(name, dtype)
    model = ecospa_fx.compile(copy.deepcopy(plain), example_kwargs=kwargs, regions=regions)
    return plain, model, kwargs


class Lives:
    """A model under test.

    Attributes:
        plain: as it was before it was compiled.
        model: compiled, and shrunk where wanted; all but its residual stream.
        twin: plain, with zeros where the model has shrunk.
        positions: what is left of each parameter.
        kwargs: arguments of a call.
    """

    def __init__(
        self, name: str = "net", regions: str = "blocks", shrunk: bool = True, dtype: torch.dtype = torch.float32
    ) -> None:
        plain, model, self.kwargs = _compiled(name, regions, dtype)
        self.plain, self.model = copy.deepcopy(plain), copy.deepcopy(model)
        self.positions: Positions = {}
        if shrunk:
            keeps = {c: half(c.size, i) for i, c in enumerate(without_stream(self.model))}
            self.positions = kept_positions(plain, keeps)
            ecospa_fx.shrink(self.model, keeps)
        self.twin = zeroed(self.plain, self.positions)

    @property
    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.model, self.twin

    def agree(
        self, precision: torch.dtype | None = None, model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The model equals its twin, outputs and gradients, to the rounding of a dtype. Returns its gradients."""
        kwargs = self.kwargs | kwargs
        precision = precision or next(self.twin.parameters()).dtype
        model = self.model if model is None else model
        outputs, gradients = run_twice(model, (), kwargs)
        gradients = {name.removeprefix("_orig_mod."): g for name, g in gradients.items()}  # torch.compile's
        twin_outputs, twin_gradients = run_twice(self.twin, (), kwargs)
        assert_same(_named(twin_outputs), _named(outputs), LOOSE[precision], "outputs")
        wanted = {name: sliced(g, name, self.positions) for name, g in twin_gradients.items()}
        if precision not in (torch.bfloat16, torch.float16):
            assert_same(wanted, gradients, 10 * LOOSE[precision], "gradients")
        else:  # what rounds away beside the rest has no relative error to speak of
            assert wanted.keys() == gradients.keys()
            floor = 0.05 * max((float(g.abs().max()) for g in wanted.values()), default=0.0)
            for name, gradient in wanted.items():
                error = float((gradients[name] - gradient).abs().max())
                assert error <= 2 * LOOSE[precision] * max(floor, float(gradient.abs().max())), name
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _named(tensors: list[Tensor]) -> Mapping[str, Tensor]:
    return {str(i): tensor for i, tensor in enumerate(tensors)}


each_way = pytest.mark.parametrize("regions", ["blocks", "root"])
before_and_after = pytest.mark.parametrize("shrunk", [False, True], ids=["whole", "shrunk"])
