"""Tapping: the part of an observer of regions that readers have in common which tap values on their way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from ecospa_fx.model.lookup import compiled_state, regions_of
from ecospa_fx.model.observers import are_of, ignore, observe
from ecospa_fx.model.region import Region
from ecospa_fx.passes.rewrite.program import Program


class Tapping:
    """Base of observers (`ecospa_fx.model.observers`) that read nothing but taps, in calls with gradients on.

    Attributes:
        computes_again: no value inside a region is held for backward, which computes them again; for evaluation mode.
    """

    model: nn.Module
    computes_again = False
    _observed: Sequence[Region] = ()

    def observe(self) -> None:
        """Stand in the graphs of the model's regions, where graphs run; those that it has now."""
        if not are_of(self._observed, self.model) and compiled_state(self.model).execution != "module":
            self.detach()
            self._observed = list(regions_of(self.model).values())
            for region in self._observed:
                observe(region, self)

    def detach(self) -> None:
        """Leave them."""
        for region in self._observed:
            ignore(region, self)
        self._observed = ()

    def wants(self, module: nn.Module) -> bool:
        """Return whether the call is one with gradients on, outside of compiled code and of torch.func."""
        return (
            torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
        )

    def nodes_of(self, region: Region, program: Program, module: nn.Module) -> tuple[Sequence[fx.Node], None]:
        """Return no nodes: values are read where they pass."""
        return (), None

    def receive(self, tag: None, values: Sequence[Tensor]) -> None:
        """Do nothing."""
