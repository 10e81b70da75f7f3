"""Whole: a model of which each rank holds all weights for a while, with the integers that its own Python has then.

Where tensor parallelism shares out heads, users give an attention the number of heads on its rank. Such an integer is
known by its value: it is that of the plan, divided by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ecospa_fx.passes.follow.attributes import Attribute, holding
from ecospa_fx.passes.rewrite.replay import replay
from ecospa_fx.ranks.tensor_parallel import gathered_whole, parallel_count

from .region import Region


def shared_numbers(model: nn.Module, regions: Mapping[str, Region]) -> dict[Attribute, int]:
    """Return the integers in a model of which it holds the part of this rank, with their value for the whole."""
    ranks = parallel_count(model)
    shared: dict[Attribute, int] = {}
    for region in regions.values() if ranks > 1 else ():
        support = region.python_support
        if support is None or not region.specializations:
            continue
        for attribute, whole in support.values(replay(region.naming_graph.axis_facts, region.state.plan)).items():
            here = attribute.within(region.name).read(model)
            if isinstance(whole, int) and here != whole and here * ranks == whole:
                shared[attribute.within(region.name)] = whole
    return shared


@contextmanager
def held_whole(model: nn.Module, regions: Mapping[str, Region]) -> Iterator[None]:
    """Hold all weights of a model on this rank for a while, as a plain model; every rank must take part."""
    with holding(model, shared_numbers(model, regions)), gathered_whole(model):
        yield
