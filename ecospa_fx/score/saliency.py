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
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, SALIENCY)

    @property
    def begins(self) -> bool:
        """True if gradients begin where they are read, as far as no weight before trains. Set it."""
        return isinstance(self.reader, PositionReader) and self.reader.begins

    @begins.setter
    def begins(self, begins: bool) -> None:
        if isinstance(self.reader, PositionReader):
            self.reader.begins = begins

    @property
    def computes_again(self) -> bool:
        """True if backward computes the values inside regions again, so that none is held. Set it; evaluation mode."""
        return isinstance(self.reader, PositionReader) and self.reader.computes_again

    @computes_again.setter
    def computes_again(self, again: bool) -> None:
        if isinstance(self.reader, PositionReader):
            self.reader.computes_again = again

    @property
    def wholes(self) -> bool:
        """True if couplings whose entries may all go are judged as a whole, too. Set it before the first step."""
        return isinstance(self.reader, PositionReader) and self.reader.wholes

    @wholes.setter
    def wholes(self, wholes: bool) -> None:
        if isinstance(self.reader, PositionReader):
            self.reader.wholes = wholes

    def whole(self, coupling: Coupling) -> float | None:
        """Return the worth of all entries of a coupling together, in the unit of entries; None where it is unknown."""
        return self.reader.whole(coupling) if isinstance(self.reader, PositionReader) else None

    def judges(self, coupling: Coupling) -> bool:
        """Return whether gradients say anything of a coupling: not if one is inf or NaN, or its weights are frozen."""
        return coupling.size > 0 and self.reader.importance(coupling) is not None
