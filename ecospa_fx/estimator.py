"""CoupledEstimator: how important each coupling is, accumulated over training steps."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .api import couplings
from .coupling import Coupling
from .errors import TargetError
from .kernels import slice_sums_ref

Score = Literal["fisher", "magnitude"]


class CoupledEstimator:
    """Scores couplings together, matrix by matrix (arXiv 2511.11641, coupled estimation).

    The importance of a coupling is the mean over its matrices of `sum(grad²) / numel`, accumulated since the last
    reset. This is the square of the mini-batch gradient, not the per-sample Fisher information, which it is named
    after (see Kunstner et al. 2019 on the difference). Sums are kept per row and column; that costs nothing more, and
    the matrix score is their sum.

    Args:
        model: a compiled model that has been called.
        score: `"fisher"` as above; `"magnitude"` uses the weights in place of the gradients and accumulates nothing.

    Raises:
        TargetError: there is no such score.
    """

    def __init__(self, model: nn.Module, score: Score = "fisher") -> None:
        if score not in get_args(Score):
            raise TargetError(f"score={score!r} is none of {', '.join(map(repr, get_args(Score)))}")
        self.model, self.score = model, score
        self.steps = 0
        self.sums: dict[tuple[str, int], Tensor] = {}

    def accumulate(self) -> None:
        """Add the gradients as they are now: call it after `backward`, before they are zeroed."""
        self.steps += 1
        if self.score == "fisher":
            self._add({name: p.grad for name, p in self.model.named_parameters() if p.grad is not None})

    def reset(self) -> None:
        """Forget what was accumulated."""
        self.steps = 0
        self.sums.clear()

    def importance(self) -> dict[Coupling, float]:
        """Importance of every coupling; 0 for one that had no gradient."""
        if self.score == "magnitude":
            self.sums.clear()
            self._add(dict(self.model.named_parameters()))
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        result = {}
        for coupling in couplings(self.model):
            scores = []
            for member in coupling.members:
                sums = self.sums.get((member.parameter, member.dim))
                if member.matrix and sums is not None:
                    rows = (member.index >= 0).to(sums.device)
                    entries = int(rows.sum()) * parameters[member.parameter].numel() // len(rows)
                    scores.append(float(sums[rows].sum()) / entries)
            result[coupling] = sum(scores) / len(scores) / max(self.steps, 1) if scores else 0.0
        return result

    @torch.no_grad()
    def _add(self, tensors: dict[str, Tensor]) -> None:
        dims: dict[str, set[int]] = {}
        for coupling in couplings(self.model):
            for member in coupling.members:
                if member.matrix:
                    dims.setdefault(member.parameter, set()).add(member.dim)
        for name, along in dims.items():
            if name in tensors:
                ordered = tuple(sorted(along))
                for dim, sums in zip(ordered, slice_sums_ref(tensors[name], ordered), strict=True):
                    self.sums[name, dim] = self.sums[name, dim] + sums if (name, dim) in self.sums else sums


@torch.no_grad()
def index_scores(model: nn.Module, coupling: Coupling) -> Tensor:
    """Score of each entry of a coupling: the product over its matrices of the norms of that entry's slices.

    A bias counts in the row of the matrix it belongs to. (arXiv 2511.11641, coupled sparsification.)

    Returns:
        float64 `[coupling.size]`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    squares: dict[str, Tensor] = {}
    for member in coupling.members:
        (sums,) = slice_sums_ref(parameters[member.parameter], (member.dim,))
        owned = member.index >= 0
        score = squares.setdefault(member.of, torch.zeros(coupling.size, dtype=torch.float64))
        score.index_add_(0, member.index[owned], sums.double().cpu()[owned])
    return torch.stack([score.sqrt() for score in squares.values()]).prod(0)
