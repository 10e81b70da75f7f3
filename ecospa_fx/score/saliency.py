"""Saliency: what the loss would change by without an entry of a coupling, to first order, squared and averaged.

The square of the gradient along an entry's gate is the change of the loss to second order, with the Fisher
information for the Hessian (Molchanov et al. 2019, arXiv 1906.10771, equation 8, with whole slices for sets). It is
read position by position (`positions.py`), and where that is not possible step by step (`gates.py`). Unlike sums over
entries of a weight it is in the same unit for every coupling, so that couplings can be weighed against each other.
"""

from __future__ import annotations

from torch import nn

from ecospa_fx.couple.coupling import Coupling

from .estimator import CoupledEstimator
from .positions import PositionReader
from .scores import Score

SALIENCY = Score("saliency", "positions", None, "squared change of the loss without the entry, to first order")


class Saliency(CoupledEstimator):
    """The estimator of `SALIENCY`: entries of couplings that it cannot judge are worth 0.

    Args:
        model: a compiled model.

    Attributes:
        reader: says where gradients begin, what backward computes again and what is judged as a whole; set that before
            the first step.
    """

    reader: PositionReader

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, SALIENCY)

    def whole(self, coupling: Coupling) -> float | None:
        """Return the worth of all entries of a coupling together, in the unit of entries; None where it is unknown."""
        return self.reader.whole(coupling)

    def judges(self, coupling: Coupling) -> bool:
        """Return whether gradients say anything of a coupling: not if one is inf or NaN, or its weights are frozen."""
        return coupling.size > 0 and self.reader.importance(coupling) is not None
