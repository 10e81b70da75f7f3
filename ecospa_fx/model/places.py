"""Places: the modules and weights of a compiled model lie where they lay when its regions were captured."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ecospa_fx.errors import ShrinkError
from ecospa_fx.passes.graph.tensors import join
from ecospa_fx.plan import Plan

from .region import REGION, Region


def check_places(model: nn.Module, held: Mapping[str, Tensor], regions: Mapping[str, Region], plan: Plan) -> None:
    """Refuse a model whose modules were wrapped, moved, replaced or removed since its regions were captured.

    A shrink finds weights by name: it would pass over one that is gone, and cut the others of its coupling. Buffers may
    be replaced, as a table is by a longer one.

    Args:
        model: the model.
        held: its parameters and buffers by name.
        regions: its regions by name.
        plan: the entries that are left.

    Raises:
        ShrinkError: they were.
    """
    for name, region in regions.items():
        graphs = [each.captured for each in region.specializations]
        weights = {each: graph for graph in graphs for node, each in graph.tensors.items() if node in graph.parameters}
        for inside, graph in weights.items():
            weight = join(name, inside)
            expected = plan.shape(weight) if weight in plan.original_shapes else tuple(graph.sizes[inside])
            if weight not in held:
                where = f"region `{name}`" if name else "the model"
                raise ShrinkError(
                    f"`{weight}` of {where} is not there any more: modules have been wrapped, moved or removed since "
                    "the model was captured, as by an adapter, a wrapper for activation checkpointing, or block = "
                    f"torch.compile(block). {_WAY}; block.compile() and hooks change no names"
                )
            if tuple(held[weight].shape) != expected:
                raise ShrinkError(
                    f"`{weight}` is {tuple(held[weight].shape)} and was {expected} when the model was captured: it has "
                    f"been replaced since. {_WAY}"
                )
        there = model.get_submodule(name).__dict__.get(REGION) if weights else None
        if there is not None and there.name != name:
            raise ShrinkError(f"`{there.name}` lies at `{name}` since the model was captured. {_WAY}")


_WAY = "Do that before ecospa_fx.compile, or within ecospa_fx.rewire"
