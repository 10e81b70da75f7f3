"""Saliency: what the loss would change by without an entry of a coupling, to first order, squared and averaged.

An entry's gate multiplies it wherever it is summed over. The gradient along the gate is `sum(w * g)` over what the
entry is multiplied by: over columns of the weights that sum over it, or, where two activations meet along it, over the
rows that make either. Its square is the loss to second order, with the Fisher information for the Hessian (Molchanov et
al. 2019, arXiv 1906.10771, equation 8, with whole slices for sets). Unlike sums over entries of a weight it is in the
same unit for every coupling, so that couplings can be weighed against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.couple.coupling import Coupling, Member
from ecospa_fx.errors import TargetError
from ecospa_fx.model.lookup import couplings, regions_of
from ecospa_fx.passes.graph.tensors import join
from ecospa_fx.passes.transform.consumers import WeightDim, consumers

from .estimator import CoupledEstimator
from .scores import Score

SALIENCY = Score("saliency", "gradients", None, "squared change of the loss without the entry, to first order")


class Saliency(CoupledEstimator):
    """Accumulates the saliency of every entry of every coupling, over training steps.

    Gradients are read as `CoupledEstimator` reads them. Where an entry's weights have their gradients read one after
    another (`attach_backward`, several optimizers), each counts on its own.

    Args:
        model: a compiled model.

    Attributes:
        sums: (coupling name, 0) -> sums over steps, `[contexts * size]`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, SALIENCY)
        self._sides: dict[str, tuple[int, list[list[_Gate]]]] = {}
        self._made_for: Any = None

    def importance(self) -> dict[Coupling, float]:
        """Mean saliency of the entries of every coupling that it judges."""
        found = [coupling for coupling in couplings(self.model) if self.judges(coupling)]
        return {coupling: float(self.entries(coupling).mean()) for coupling in found}

    def entries(self, coupling: Coupling, *, by_context: bool = False) -> Tensor:
        """Saliency of each entry, mean over steps: float64 `[size]`, or `[contexts, size]`."""
        found = torch.zeros(coupling.contexts, coupling.size, dtype=torch.float64)
        if self.judges(coupling):
            found = self.sums[coupling.name, 0].double().cpu().view(coupling.contexts, -1) / self._weight()
        return found if by_context else found.sum(0)

    def judges(self, coupling: Coupling) -> bool:
        """Whether gradients have said anything about it: not where they are no numbers, or its weights are frozen."""
        held = self.sums.get((coupling.name, 0))
        return held is not None and held.numel() == coupling.contexts * coupling.size and bool(held.isfinite().all())

    def _add(
        self,
        tensors: dict[str, Tensor],
        parameters: dict[str, Any],
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        decay: float | None = None,
        new_step: bool = True,
    ) -> None:
        seen: dict[WeightDim, Tensor] = {}  # a fused projection has members in many couplings
        for name, (width, sides) in self._gates().items():
            here = [[gate for gate in side if gate.parameter in tensors] for side in sides]
            here = [side for side in here if side]
            if not here:
                continue
            total = torch.zeros(width, device=tensors[here[0][0].parameter].device)
            for side in here:
                along = torch.zeros_like(total)
                for gate in side:
                    key = gate.parameter, gate.dim
                    if key not in seen:
                        seen[key] = _products(*key, parameters[gate.parameter], tensors[gate.parameter], scale)
                    along.index_add_(0, gate.place.to(along.device), seen[key][gate.owned.to(along.device)])
                total += along.square() / len(here)
            if found_inf is not None:
                total = torch.where(found_inf.to(total.device) > 0, torch.zeros_like(total), total)
            held = self.sums.get((name, 0))
            self.sums[name, 0] = total if held is None or held.shape != total.shape else held.add_(total)

    def _gates(self) -> dict[str, tuple[int, list[list[_Gate]]]]:
        """Coupling name -> number of gates, and the members whose products add up to them; each list alone does."""
        found = couplings(self.model)
        if self._made_for is not found[0]:
            self._made_for, self._sides = found[0], {}
            summing = {
                (join(region.name, name), dim)
                for region in regions_of(self.model).values()
                for first in region.specializations[:1]
                for name, dim in consumers(first.axis_facts)
            }
            learned = {n for n, p in self.model.named_parameters(remove_duplicate=False) if p.requires_grad}
            for each in found:
                over = [m for m in each.members if (m.parameter, m.dim) in summing]
                groups: dict[str, list[Member]] = {}
                for member in each.members:
                    groups.setdefault(member.of, []).append(member)
                sides = [over] if over else list(groups.values())
                # Half of what a gate is worth is not what it is worth.
                sides = [side for side in sides if all(member.parameter in learned for member in side)]
                width = each.contexts * each.size
                self._sides[each.name] = width, [[_Gate.of(m, each) for m in side] for side in sides]
        return self._sides

    def _ready(self) -> Any:
        """There are no slices: sums are of entries, and those of other sizes are dropped where they are read."""
        return None


@dataclass(frozen=True, eq=False)
class _Gate:
    """What a member adds to the gates of a coupling: its products at `owned` go to the gates at `place`."""

    parameter: str
    dim: int
    owned: Tensor
    place: Tensor

    @classmethod
    def of(cls, member: Member, coupling: Coupling) -> _Gate:
        owned = (member.index >= 0).nonzero().flatten()
        place = member.index[owned]
        if member.context is not None:
            place = member.context[owned] * coupling.size + place
        return cls(member.parameter, member.dim, owned, place)


def _products(name: str, dim: int, weight: Tensor, gradient: Tensor, scale: Tensor | None) -> Tensor:
    """Sums of a weight's entries times their gradients, over all dims but one."""
    if type(gradient) not in (Tensor, nn.Parameter):
        raise TargetError(
            f'policy="adaptive" needs whole gradients, and that of `{name}` is a {type(gradient).__name__}; use '
            'policy="paper" where parameters are sharded'
        )
    found = (weight.detach() * gradient.detach()).float()
    found = found.sum([other for other in range(found.ndim) if other != dim]) if found.ndim > 1 else found
    return found if scale is None else found / scale.to(found.device)
