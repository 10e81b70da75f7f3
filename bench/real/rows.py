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
| llm-pruner | `|weight * its gradient|`, summed over the unit's slices | Ma et al. 2023 (2305.11627) |
| modegpt | ridge leverage `diag(C (C + I)^-1)`; W is fitted by Nystrom | Lin et al. 2024 (2408.09632), algorithm 1 |
| slimgpt | `|W| ** 2 / diag(H^-1)`, one unit after another, each time W is fitted | Ling et al. 2024 (2412.18110) |

C is the Gram matrix of x, `[units, units]`, H that with 1% of its mean diagonal added. `fitted_of` returns W of the
units that stay for the last two, all others keep it.
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
        gram: `[units, units]`, of products; None where no row needs it.
        fitted: the number of units that `slimgpt` has removed, and W `[outputs, units]` then.
    """

    count: int
    sums: Tensor
    squares: Tensor
    by_position: Tensor
    by_call: Tensor
    gram: Tensor | None = None
    fitted: tuple[int, Tensor] | None = None

    @classmethod
    def of(cls, x: Tensor, g: Tensor, gram: bool = False) -> Seen:
        """Sum up one call."""
        terms = x * g
        return cls(
            len(x), x.sum(0), x.square().sum(0), terms.square().sum(0), terms.sum(0).square(), x.T @ x if gram else None
        )  # fmt: skip

    def add(self, other: Seen) -> None:
        """Add another call."""
        self.count += other.count
        for name in ("sums", "squares", "by_position", "by_call"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if self.gram is not None and other.gram is not None:
            self.gram += other.gram


def worth(
    row: str, weight: Tensor, makers: list[Tensor], seen: Seen, seed: int = 0, gradients: list[Tensor] | None = None,
    share: float = 0.6,
) -> Tensor:  # fmt: skip
    """Return the worth of each unit by a row's formula.

    Args:
        row: its name.
        weight: W.
        makers: the weights that make the units.
        seen: sums over the calls.
        seed: of `random`.
        gradients: those of `weight` and of the makers.
        share: of the units that will go; all others are worth the same to `slimgpt`, which removes these one by one.
    """
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
        case "llm-pruner":
            assert gradients is not None
            made = sum((m * g).abs().sum(1) for m, g in zip(makers, gradients[1:], strict=True))
            return (weight * gradients[0]).abs().sum(0) + made
        case "modegpt":
            assert seen.gram is not None
            gram = seen.gram.double()
            return torch.linalg.solve(gram + torch.eye(len(gram)), gram).diagonal().float()
        case "slimgpt":
            assert seen.gram is not None
            return _eliminated(weight, seen, round(share * len(seen.gram)))
    raise ValueError(row)


def fitted_of(row: str, weight: Tensor, seen: Seen, gone: Tensor) -> Tensor | None:
    """Return W `[outputs, units left]` as a row fits it; None where it stays as it is."""
    kept = torch.ones(weight.shape[1], dtype=torch.bool)
    kept[gone] = False
    if row == "modegpt":
        assert seen.gram is not None
        gram = seen.gram.double()
        return (torch.linalg.pinv(gram[kept][:, kept], hermitian=True) @ gram[kept] @ weight.double().T).T.to(weight)
    if row == "slimgpt":
        if seen.fitted is None or seen.fitted[0] != len(gone):
            _eliminated(weight, seen, len(gone))
        assert seen.fitted is not None
        return seen.fitted[1][:, kept]
    return None


def _eliminated(weight: Tensor, seen: Seen, count: int) -> Tensor:
    """Remove units one after another, each the one by whose loss the output is hurt least; note W after `count`.

    Returns:
        The place of each unit in that order, of those that stay the last.
    """
    assert seen.gram is not None
    gram, fitted = seen.gram.double(), weight.double().clone()
    inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram)))
    place = torch.full((len(gram),), float(len(gram)))
    left = torch.ones(len(gram), dtype=torch.bool)
    for number in range(count):
        hurt = fitted.square().sum(0) / inverse.diagonal()
        unit = int(hurt.masked_fill(~left, torch.inf).argmin())
        row, pivot = inverse[unit].clone(), inverse[unit, unit].clone()
        fitted.addr_(fitted[:, unit] / pivot, row, alpha=-1)
        inverse.addr_(row / pivot, row, alpha=-1)
        inverse[unit, unit] = 1.0  # it is out
        left[unit], place[unit] = False, float(number)
    seen.fitted = count, fitted.to(weight)
    return place


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
