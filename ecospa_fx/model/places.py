"""Places: the modules and weights of a compiled model lie where they lay when its regions were captured."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ecospa_fx.errors import ShrinkError
from ecospa_fx.passes.graph.tensors import join, named_tensors
from ecospa_fx.plan import Plan

from .region import REGION, Region


def check_places(model: nn.Module, regions: Mapping[str, Region], plan: Plan) -> None:
    """Refuse a model whose modules were wrapped, moved, replaced or removed since its regions were captured.

    What goes by their names would pass over them: a shrink would cut the other weights of a coupling alone. Buffers may
    be replaced, as a table is by a longer one.

    Raises:
        ShrinkError: they were.
    """
    held = named_tensors(model)
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
