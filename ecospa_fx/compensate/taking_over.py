"""TakingOver: one regression per input of weights, put into every weight that reads it, sharded or whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.passes.graph.tensors import storage_key
from ecospa_fx.passes.transform.absorb import Absorption, Moments, absorb
from ecospa_fx.passes.transform.consumers import WeightDim
from ecospa_fx.passes.transform.judged import HeldOut, absorb_judged
from ecospa_fx.ranks.agreement import Ranks
from ecospa_fx.ranks.shards import gathered, is_sharded, local_part, split, whole_of

from .absorbers import Absorbing
from .moments import columns


@dataclass(eq=False)
class TakingOver:
    """The new values of the weights that take over.

    Attributes:
        absorbers: (parameter, dim) -> how it absorbs.
        moments: (parameter, dim) of a Gram matrix -> the moments over all ranks.
        rows: (parameter, dim) of a Gram matrix -> positions held out on this rank.
        ridge: see `Grams`.
        ranks: those that train the model together.
        left: (parameter, dim) -> share of the removed part that nothing took over, of those that were changed.
    """

    absorbers: Mapping[WeightDim, Absorbing]
    moments: Mapping[WeightDim, Moments]
    rows: Mapping[WeightDim, Tensor]
    ridge: float | None
    ranks: Ranks
    left: dict[WeightDim, float] = field(default_factory=dict)

    def values(self, going: Mapping[WeightDim, Tensor], held: Sequence[Mapping[str, Tensor]]) -> dict[int, Tensor]:
        """Compute the new values, at the sizes before the shrink.

        Args:
            going: (parameter, dim) -> the positions of the dim that stay, where some go.
            held: tensors by name in the model, see `Grams.absorbed`.

        Returns:
            `id` of a tensor in `held` -> its new value, for those that change.
        """
        values: dict[int, Tensor] = {}
        solved: dict[tuple[WeightDim, bool], Absorption] = {}  # of the inputs at hand
        able = [key for key in going if self.absorbers[key].gram in self.moments and has_values(held[0].get(key[0]))]
        everywhere = set(self.ranks.common([f"{n} {d}" for n, d in able], "the weights that take over"))
        taking = [key for key in able if f"{key[0]} {key[1]}" in everywhere]
        for name, dim in sorted(taking, key=lambda key: (self.absorbers[key].gram, key)):
            absorber = self.absorbers[name, dim]
            consumer, constant = absorber.consumer, absorber.consumer.bias is not None
            if (absorber.gram, constant) not in solved:
                solved = {key: each for key, each in solved.items() if key[0] == absorber.gram}
                found = self._solve(absorber, going[name, dim], held[0])
                if found is None:
                    continue
                solved[absorber.gram, constant] = found
            absorption = solved[absorber.gram, constant]
            self.left[name, dim] = absorption.left
            bias = None if consumer.bias is None else name.removesuffix(consumer.parameter) + consumer.bias
            for tensors in held:
                weight = tensors.get(name)
                if weight is None or not has_values(weight):
                    continue
                constant_in = tensors[bias] if bias is not None and has_values(tensors.get(bias)) else None
                by_rows = _lie_alike(weight, constant_in, dim)
                part = local_part(weight) if by_rows else gathered(weight).detach()
                matrix = consumer.columns(part)
                value = consumer.as_weight(absorption.columns(matrix), part)
                assign(values, tensors, weight, placed(value, weight, by_rows))
                if constant_in is not None:
                    part = local_part(constant_in) if by_rows else gathered(constant_in).detach()
                    value = absorption.bias(part, matrix)
                    assign(values, tensors, constant_in, placed(value, constant_in, by_rows))
        return values

    def _solve(self, absorber: Absorbing, steps: Tensor, tensors: Mapping[str, Tensor]) -> Absorption | None:
        """Regress what goes on what stays.

        Args:
            absorber: a weight that may take over.
            steps: the positions of its dim that stay.
            tensors: those of the model by name.
        """
        constant, kept = absorber.consumer.bias is not None, columns(steps, absorber.consumer.window)
        moments, ranks = self.moments[absorber.gram], self.ranks
        if self.ridge is not None or not len(kept):  # without any column a bias may take up their mean
            return absorb(moments, kept, constant=constant, ridge=self.ridge or 0.0)
        matrix = self._matrix(absorber.gram, tensors)

        def total(sums: Tensor) -> Tensor:
            return ranks.totals({"sums": sums}, "the positions held out")["sums"] if ranks else sums

        rows = self.rows.get(absorber.gram, moments.squares[:0])
        count = total(torch.tensor([float(len(rows))], device=moments.sums.device))
        held = None if matrix is None or not int(count) else HeldOut(rows, matrix)
        return absorb_judged(moments, kept, held, constant=constant, total=total)

    def _matrix(self, gram: WeightDim, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Return the weights that sum over the inputs of a Gram matrix, `[outputs, columns]`; None where none is whole.

        Args:
            gram: the (parameter, dim) under which the matrix is kept.
            tensors: those of the model by name; one that is not there is left out.
        """
        found = [
            absorber.consumer.columns(gathered(weight).detach())
            for (name, _), absorber in self.absorbers.items()
            if absorber.gram == gram and (weight := tensors.get(name)) is not None and has_values(weight)
        ]
        return torch.cat([each.to(found[0]) for each in found]) if found else None


def has_values(tensor: Tensor | None) -> bool:
    """Return whether a tensor has values that can be read, on this rank or on several."""
    plain = type(tensor) in (Tensor, nn.Parameter) or is_sharded(tensor)
    return plain and tensor is not None and tensor.device.type != "meta"


def _lie_alike(weight: Any, bias: Any, dim: int) -> bool:
    """Return whether this rank holds rows of a weight with all columns along `dim`, and the bias of the same rows.

    Each row takes over for itself, so that nothing need move then.
    """
    if not is_sharded(weight):
        return bias is None or not is_sharded(bias)
    by_rows = dim != 0 and all(not placement.is_shard() or placement.is_shard(0) for placement in weight.placements)
    return by_rows and (bias is None or (is_sharded(bias) and bias.placements == weight.placements))


def placed(value: Tensor, like: Any, by_rows: bool) -> Tensor:
    """Return the new value of a tensor, sharded as that is."""
    if not is_sharded(like):
        return value
    placed: Tensor = whole_of(value, like) if by_rows else split(value, like)
    return placed


def assign(values: dict[int, Tensor], tensors: Mapping[str, Tensor], tensor: Tensor, value: Tensor) -> None:
    """Set the new value of a tensor, and of those that share its memory."""
    for each in tensors.values():
        if each is tensor or (storage_key(each) == storage_key(tensor) and each.shape == tensor.shape):
            values[id(each)] = value
