"""The paper's ablation: remove as much from each matrix, but let each choose alone which slices go.

    removal {coupling: keep} -> own_order of each matrix -> reorder it -> the exact coupled shrink removes the rest

Before the shrink, every matrix moves the slices it would keep itself onto the positions that will stay. Sizes, schedule
and optimizer are then those of EcoSpa to the last detail; only the pairing of rows with columns is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ecospa_fx import Coupling


def break_pairing(model: nn.Module, removal: Mapping[Coupling, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Reorder each member matrix so that its own choice is what the coming shrink keeps.

    Meant as `before_shrink` of an `EcoSpaTrainer`. A bias is no matrix of its own: it moves with the rows of the matrix
    that produces it.

    Args:
        model: The model about to shrink.
        removal: Positions that stay, `[kept]`, sorted, for each coupling about to shrink.
        optimizer: Its optimizer; state tensors shaped like a parameter move with it.
    """
    parameters = dict(model.named_parameters())
    for coupling, keep in removal.items():
        orders: dict[tuple[str, int], Tensor] = {}
        for member in coupling.members:
            weight = parameters[member.parameter]
            if weight.dim() >= 2:
                order = own_order(weight, member.dim, member.index, keep)
                orders[member.parameter, member.dim] = order
                reorder(weight, member.dim, order, optimizer)
        for member in coupling.members:
            bias = parameters[member.parameter]
            if bias.dim() == 1:
                order = _producers_order(member.parameter, len(bias), orders)
                reorder(bias, 0, order, optimizer)


def own_order(weight: Tensor, dim: int, index: Tensor, keep: Tensor) -> Tensor:
    """Order of slices after which the positions in `keep` hold the slices of largest norm.

    A position that owns several slices owns one in each copy of the coupling: one per head, or one in each half of a
    fused matrix. Every copy chooses alone, as in the paper, where each head has matrices of its own; this also parts
    Q from K when both lie in one fused matrix.

    Args:
        weight: The matrix.
        dim: Its dim that the coupling runs along, of size `n`.
        index: Coupling position of each slice, `[n]`, int64; -1 for slices of other couplings, which stay in place.
        keep: Positions that stay, `[kept]`, int64.

    Returns:
        For each slice the old slice that moves there, `[n]`, int64; a permutation.
    """
    others = [d for d in range(weight.dim()) if d != dim]
    norms = weight.detach().double().square().sum(dim=others).cpu()  # [n]
    index, keep = index.cpu(), keep.cpu()
    copy = _copies(index)
    order = torch.arange(len(index))
    for number in copy[index >= 0].unique().tolist():
        slices = torch.nonzero((copy == number) & (index >= 0)).flatten()  # [slices of this copy]
        stays = torch.isin(index[slices], keep)
        chosen = torch.zeros_like(stays)
        chosen[norms[slices].topk(int(stays.sum())).indices] = True
        order[slices[stays]] = slices[chosen]
        order[slices[~stays]] = slices[~chosen]
    return order


@torch.no_grad()
def reorder(parameter: Tensor, dim: int, order: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Permute a parameter and its optimizer state along `dim`, in place."""
    state = optimizer.state.get(parameter, {})
    moments = [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]
    for tensor in (parameter, *moments):
        tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))


def _copies(index: Tensor) -> Tensor:
    """Count, for each slice, how many slices of the same position come before it, `[n]`."""
    seen: Counter[int] = Counter()
    copies = []
    for position in index.tolist():
        copies.append(seen[position])
        seen[position] += 1
    return torch.tensor(copies, dtype=torch.long)


def _producers_order(bias: str, size: int, orders: Mapping[tuple[str, int], Tensor]) -> Tensor:
    """Order of the matrix that a bias belongs to: of those that fit, the one with the longest common name."""
    fitting = {name: order for (name, _), order in orders.items() if len(order) == size}
    if not fitting:
        raise ValueError(f"no matrix of this coupling has {size} slices for {bias} to move with")
    return fitting[max(fitting, key=lambda name: _shared_prefix(name, bias))]


def _shared_prefix(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
