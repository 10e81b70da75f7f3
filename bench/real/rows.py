"""Rows: training-free ways to choose the hidden units of an FFN that go, each as its paper has it, on plain tensors.

    W      `[outputs, units]`, the weight that sums over the units; `makers` those that make them, `[units, inputs]`
    x, g   `[positions, units]`, its input, and the gradient of the mean loss along it
    worth  `[units]`; the least go, as many in each layer (`even`) unless stated otherwise

| row | worth | source |
|---|---|---|
| random | a draw | |
| magnitude | `W ** 2 + makers ** 2`, summed | |
| norms | product of the norms of a unit's slices | arXiv 2511.11641, coupled sparsification |
| wanda-sp | `|W| * norm of x`, summed over outputs | An et al. 2024 (arXiv 2312.11983) |
| flap | `variance of x * |W| ** 2`, standardised over layers; the mean of what goes is a bias | the same |
| taylor | `(sum over positions of x * g) ** 2`, summed over calls | Molchanov et al. 2019 (1906.10771), eq. 8 |
| tok2 | `(x * g) ** 2`, summed over positions | the same, with positions for examples |
| energy | `|W| ** 2 * mean of x ** 2` | optimal brain damage of a layer's output |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Seen:
    """Sums over calls of what one weight's input shows.

    Attributes:
        count: positions.
        sums: `[units]`, of x.
        squares: `[units]`, of its squares.
        by_position: `[units]`, of the squares of x * g.
        by_call: `[units]`, of the squares of what x * g adds up to in a call.
    """

    count: int
    sums: Tensor
    squares: Tensor
    by_position: Tensor
    by_call: Tensor

    @classmethod
    def of(cls, x: Tensor, g: Tensor) -> Seen:
        """Sum up one call."""
        terms = x * g
        return cls(
            len(x), x.sum(0), x.square().sum(0), terms.square().sum(0), terms.sum(0).square()
        )  # fmt: skip

    def add(self, other: Seen) -> None:
        """Add another call."""
        self.count += other.count
        for name in ("sums", "squares", "by_position", "by_call"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def worth(row: str, weight: Tensor, makers: list[Tensor], seen: Seen, seed: int = 0) -> Tensor:
    """Return the worth of each unit by a row's formula."""
    match row:
        case "random":
            return torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed))
        case "magnitude":
            return weight.square().sum(0) + sum(made.square().sum(1) for made in makers)
        case "norms":
            return torch.stack([weight.norm(dim=0), *(made.norm(dim=1) for made in makers)]).prod(0)
        case "wanda-sp":
            return weight.abs().sum(0) * seen.squares.sqrt()
        case "flap":
            variance = seen.squares / seen.count - (seen.sums / seen.count).square()
            return variance * weight.square().sum(0)
        case "taylor":
            return seen.by_call
        case "tok2":
            return seen.by_position
        case "energy":
            return weight.square().sum(0) * seen.squares / seen.count
    raise ValueError(row)


def gone_of(row: str, worths: list[Tensor], share: float) -> list[Tensor]:
    """Choose the units that go in each layer: as many in each; of FLAP by standardised worth over all layers."""
    if row != "flap":
        return [each.argsort()[: round(share * len(each))].sort().values for each in worths]
    standard = [(each - each.mean()) / each.std() for each in worths]
    limit = torch.cat(standard).sort().values[round(share * sum(map(len, standard))) - 1]
    return [(each <= limit).nonzero().flatten()[: len(each) - 1] for each in standard]


def bias_of(row: str, weight: Tensor, seen: Seen, gone: Tensor) -> Tensor | None:
    """Return what FLAP adds to the output, `[outputs]`: the mean of what goes; None of other rows."""
    return weight[:, gone] @ (seen.sums[gone] / seen.count) if row == "flap" else None
