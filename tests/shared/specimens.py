"""Specimen: one model of the zoo, and the table of them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
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
        smaller: makes the same class with half of every coupling, where its Python can say that.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], tuple[Tensor, ...]]
    couplings: frozenset[Pair]
    refusals: tuple[tuple[frozenset[str], str], ...] = ()
    missing: frozenset[str] = frozenset()
    zeroing: str = ""
    smaller: Callable[[], nn.Module] | None = None

    def __repr__(self) -> str:
        return self.build.__name__


ZOO: dict[str, Specimen] = {}


def pair(kind: str, size: int, members: str) -> Pair:
    """A coupling: `q.weight[0]`; `q[0]` stands for `q.weight[0] q.bias[0]`."""
    return kind, size, _members(members)


PARAMETERS = (
    "weight", "bias", "vector", "matrix", "original0", "original1", "h_l0", "h_l1", "_reverse",
    "cls_token", "pos_embed",
)  # fmt: skip


def _members(text: str) -> frozenset[str]:
    names = []
    for member in text.split():
        if member.split("[")[0].endswith(PARAMETERS):
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
    smaller: Callable[[], nn.Module] | None = None,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Put a class into the zoo."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        refusals = tuple((_members(members), reason) for members, reason in (refused or {}).items())
        ZOO[cls.__name__] = Specimen(cls, inputs, frozenset(couplings), refusals, frozenset(missing), zeroing, smaller)
        return cls

    return register
