"""Outside: the parameters of a model that lie in none of its regions, whose axes nothing has looked at."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from ecospa_fx.passes.find.regions import UNCALLED
from ecospa_fx.passes.graph.tensors import parameters_of
from ecospa_fx.text import plural


def share_outside(model: nn.Module, regions: Collection[str]) -> float:
    """Return the share of the parameters that lie outside of `regions`, names of submodules."""
    outside = sum(p.numel() for name, p in parameters_of(model) if not _inside(name, regions))
    return outside / max(1, sum(p.numel() for p in model.parameters()))


def outside_text(model: nn.Module, regions: Collection[str]) -> str:
    """Say how much of a model lies outside of its regions, and where: largest first; empty where nothing does."""
    sizes: dict[str, int] = {}
    for name, parameter in parameters_of(model):
        if not _inside(name, regions):
            top = _topmost(name, regions)
            sizes[top] = sizes.get(top, 0) + parameter.numel()
    if not sizes:
        return ""
    names = sorted(sizes, key=lambda top: -sizes[top])
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    share = share_outside(model, regions)
    return f"{share:.2%} of the parameters lie outside of the {plural(len(regions), 'region')}: {shown}"


def beyond(model: nn.Module, regions: Collection[str], not_captured: Collection[str]) -> str:
    """Say, to end a sentence, what regions leave out or cut through, and the way to it; empty where the root is one."""
    if "" in regions:
        return ""
    outside = outside_text(model, regions) or "axes that cross the edges of regions stay whole"
    if "" in not_captured:
        return f". {outside}; the whole model cannot be captured"
    return f'. {outside}; compiled with regions="root" the whole model is analysed'


def uncalled_text(not_captured: Mapping[str, str]) -> str:
    """Say which blocks the captured forward does not call, and the way out; empty where it calls all.

    A first call that generates text, say, may run the encoder by itself, before the forward of the model.
    """
    names = [name for name, why in not_captured.items() if why == UNCALLED]
    if not names:
        return ""
    first, more = min(names), len(names) - 1
    subject = f"`{first}` and {plural(more, 'other block')} are" if more else f"`{first}` is"
    return (
        f"{subject} not called in the forward that is captured, and will stay whole (compile with example_inputs or "
        "example_kwargs of a forward that calls all blocks, as in training)"
    )


def _topmost(name: str, regions: Collection[str]) -> str:
    """Return the largest module around a parameter that holds no region; the parameter itself if all do."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        module = ".".join(parts[:end])
        if not any(region == module or region.startswith(f"{module}.") for region in regions):
            return module
    return name


def _inside(name: str, regions: Collection[str]) -> bool:
    return any(not region or name.startswith(f"{region}.") for region in regions)
