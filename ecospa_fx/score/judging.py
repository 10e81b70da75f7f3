"""Judging: scores of couplings and of their entries, from sums per row and column of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ecospa_fx.couple.coupling import Coupling, Member
from ecospa_fx.kernels import slice_sums
from ecospa_fx.model.lookup import check_values
from ecospa_fx.passes.graph.tensors import as_real, parameters_of
from ecospa_fx.ranks.fsdp2 import reshard
from ecospa_fx.ranks.shards import is_sharded

from .slices import SliceKey, SliceSums


def places_of(member: Member, coupling: Coupling, *, by_context: bool) -> tuple[Tensor, Tensor]:
    """Locate the rows or columns of a member among the entries of its coupling.

    Args:
        member: one of the coupling's.
        coupling: its coupling.
        by_context: tell the contexts (the heads) apart.

    Returns:
        BoolTensor `[parameter.shape[dim]]`, the rows that belong to an entry, and LongTensor `[rows that do]`, the
        place of each in a flat `[size]` or `[contexts * size]`.
    """
    owned = member.index >= 0
    places = member.index[owned]
    if by_context and member.context is not None:
        places = member.context[owned] * coupling.size + places
    return owned, places


def frozen_names(model: nn.Module) -> set[str]:
    """Return the names of parameters that do not train, tied ones under each name."""
    return {name for name, p in parameters_of(model, remove_duplicate=False) if not p.requires_grad}


def coupling_importance(coupling: Coupling, means: Mapping[SliceKey, Tensor]) -> float:
    """Return the mean score of the coupling's matrices; 0 where none was scored.

    Args:
        coupling: one of the model's couplings.
        means: (parameter, dim) -> mean score of each slice's weights, float64 on the CPU.
    """
    scores = []
    for member in coupling.members:
        if member.matrix and (member.parameter, member.dim) in means:
            rows = member.index >= 0
            scores.append(float(means[member.parameter, member.dim][rows].sum()) / max(1, int(rows.sum())))
    return sum(scores) / len(scores) if scores else 0.0


def coupling_entries(coupling: Coupling, means: Mapping[SliceKey, Tensor], *, by_context: bool) -> Tensor | None:
    """Return the mean over the coupling's matrices of the score of each entry's slices.

    Args:
        coupling: one of the model's couplings.
        means: (parameter, dim) -> mean score of each slice's weights, float64 on the CPU.
        by_context: score the entries of each context (the dims of each head) on their own.

    Returns:
        float64 `[size]` or `[contexts, size]`; None where no matrix was scored.
    """
    rows, matrices = coupling.contexts if by_context else 1, []
    for member in coupling.members:
        if member.matrix and (member.parameter, member.dim) in means:
            owned, places = places_of(member, coupling, by_context=by_context)
            scores = means[member.parameter, member.dim][owned]
            matrices.append(torch.zeros(rows * coupling.size, dtype=torch.float64).index_add_(0, places, scores))
    if not matrices:
        return None
    mean = torch.stack(matrices).mean(0)
    return mean.view(rows, coupling.size) if by_context else mean


@torch.no_grad()
def squares_of_shards(model: nn.Module, judged: Iterable[Coupling]) -> dict[SliceKey, Tensor] | None:
    """Sum up the squares of every slice that couplings lie on, over all ranks at once; None where nothing is sharded.

    Every rank must call it.
    """
    reshard(model)
    parameters = dict(parameters_of(model, remove_duplicate=False))
    dims: dict[str, set[int]] = {}
    for member in (member for coupling in judged for member in coupling.members):
        dims.setdefault(member.parameter, set()).add(member.dim)
    weights = {name: parameters[name] for name in dims}
    if not any(is_sharded(weight) for weight in weights.values()):
        return None
    sums = SliceSums(weights, dims)
    sums.add({name: as_real(weight) for name, weight in weights.items()})
    return sums.reduced()


@torch.no_grad()
def index_scores(
    model: nn.Module,
    coupling: Coupling,
    *,
    by_context: bool = False,
    squares_known: Mapping[SliceKey, Tensor] | None = None,
) -> Tensor:
    """Score each entry of a coupling by the product over its matrices of the norms of that entry's slices.

    A bias counts in the row of the matrix it belongs to. (arXiv 2511.11641, coupled sparsification.) All matrices that
    write to a residual stream count as one, end to end, and so do all that read it: what they write adds up, and a
    product of hundreds of norms would be the order of a few outliers, or zero. Scales of norms do not count there.

    Args:
        model: a compiled model.
        coupling: one of its couplings.
        by_context: score the entries of each context (the dims of each head) on their own.
        squares_known: the sums of squares of slices, from `squares_of_shards` for several couplings at once.

    Returns:
        float64 `[coupling.size]`, or `[coupling.contexts, coupling.size]`.
    """
    check_values(model, "score")
    parameters = dict(parameters_of(model, remove_duplicate=False))
    rows = coupling.contexts if by_context else 1
    stream = coupling.kind == "residual"
    squares: dict[str | bool, Tensor] = {}
    members = [member for member in coupling.members if not stream or member.matrix or _beside(member)]
    known = squares_of_shards(model, [coupling]) if squares_known is None else squares_known
    if known is None:
        weights: list[Tensor] = [as_real(parameters[member.parameter]) for member in members]
        sums_of = slice_sums(weights, [member.dim for member in members])
    else:
        sums_of = [known[member.parameter, member.dim] for member in members]
    for member, sums in zip(members, sums_of, strict=True):
        owned, places = places_of(member, coupling, by_context=by_context)
        matrix = member.writes if stream else member.of
        total = squares.setdefault(matrix, torch.zeros(rows * coupling.size, dtype=torch.float64))
        total.index_add_(0, places, sums.double().cpu()[owned])
    product = torch.stack([total.sqrt() for total in squares.values()]).prod(0)
    return product.view(rows, coupling.size) if by_context else product


def _beside(member: Member) -> bool:
    """Return whether a vector is of the same layer as its matrix: a bias, and not the scale of a norm."""
    return member.parameter.rpartition(".")[0] == member.of.partition(" ")[0].rpartition(".")[0]
