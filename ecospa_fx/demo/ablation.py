"""Ablation of the paper: as many slices are removed from each matrix, but each matrix chooses them alone.

    removal {coupling: keep} -> own_order of each matrix -> reorder it -> the exact coupled shrink removes the rest

Before the shrink, every matrix moves the slices of its own choice to the positions that will stay. Sizes, schedule and
optimizer are then exactly those of EcoSpa; only the pairing of rows with columns is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ecospa_fx import Coupling, Member


def break_pairing(model: nn.Module, removal: Mapping[Coupling, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Reorder each member matrix so that the coming shrink keeps the slices of its own choice.

    For `before_shrink` of an `EcoSpaTrainer`. A bias makes no choice: it moves with the rows that it is added to. A
    vector that belongs to no matrix stays as it is.

    Args:
        model: the model about to shrink.
        removal: positions that stay, `[kept]` or `[contexts, kept]`, sorted, for each coupling about to shrink.
        optimizer: the optimizer; state tensors shaped like a parameter move with it.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for coupling, keep in removal.items():
        matrices = [member for member in coupling.members if member.matrix]
        # If one fused matrix is on both sides of the product, its copies must choose separately.
        together = len({member.of for member in matrices}) > 1
        orders: dict[str, Tensor] = {}
        for member in matrices:
            weight = parameters[member.parameter]
            order = torch.arange(len(member.index))
            for index, kept in _by_context(member, keep):
                # Each context permutes its own slices; those of the others stay in place.
                order = order[own_order(weight, member.dim, index, kept, together=together)]
            orders[member.of] = order
            reorder(weight, member.dim, orders[member.of], optimizer)
        for member in coupling.members:
            if not member.matrix and member.of in orders:
                reorder(parameters[member.parameter], member.dim, orders[member.of], optimizer)


def _by_context(member: Member, keep: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over contexts (or all at once): coupling position of each slice, and the positions that stay."""
    if keep.ndim == 1 or member.context is None:
        yield member.index, keep
        return
    for context, kept in enumerate(keep):
        yield torch.where(member.context == context, member.index, -1), kept


def own_order(weight: Tensor, dim: int, index: Tensor, keep: Tensor, *, together: bool = True) -> Tensor:
    """Compute the order of slices that puts those of largest norm at the positions in `keep`.

    Args:
        weight: the matrix.
        dim: its dim along the coupling, of size `n`.
        index: coupling position of each slice, `[n]`, int64; -1 for slices of other couplings, which stay in place.
        keep: positions that stay, `[kept]`, int64, sorted.
        together: choose a position with all of its slices, such as a head dim with one in every head. Otherwise the
            first slices of all positions are ranked among themselves, then the second ones, and so on.

    Returns:
        For each slice the old slice that moves there, `[n]`, int64; a permutation.

    Raises:
        ValueError: positions own different numbers of slices, so one cannot take the place of another.
    """
    index, keep = index.cpu(), keep.cpu()
    owned = index[index >= 0].bincount()
    if owned.min() != owned.max():
        raise ValueError(f"positions own between {owned.min()} and {owned.max()} slices; they cannot trade places")
    slices = index.argsort(stable=True)[(index < 0).sum() :].reshape(len(owned), -1)  # [position, copy]
    others = [d for d in range(weight.dim()) if d != dim]
    norms = weight.detach().double().square().sum(dim=others).cpu()[slices]
    if together:
        norms = norms.sum(dim=1, keepdim=True)
    chosen = torch.zeros_like(norms, dtype=torch.bool).scatter_(0, norms.topk(len(keep), dim=0).indices, True)
    source = _set_first(chosen).expand_as(slices)
    target = _set_first(torch.zeros(len(owned), 1, dtype=torch.bool).index_fill_(0, keep, True)).expand_as(slices)
    order = torch.arange(len(index))
    order[slices.gather(0, target)] = slices.gather(0, source)
    return order


@torch.no_grad()
def reorder(parameter: Tensor, dim: int, order: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Permute a parameter and its optimizer state along `dim`, in place."""
    state = optimizer.state.get(parameter, {})
    moments = [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]
    for tensor in (parameter, *moments):
        tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))


def _set_first(marked: Tensor) -> Tensor:
    """Sort the row numbers of each column, marked ones first, both parts ascending; same shape as `marked`."""
    return marked.logical_not().byte().argsort(dim=0, stable=True)
