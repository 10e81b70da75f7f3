"""Offloaded weights: those of modules that fetch them at every call, and keep none in between."""

from __future__ import annotations

from torch import nn

from ecospa_fx.errors import CaptureError


def refuse_offloaded(module: nn.Module, region: str) -> None:
    """Refuse a region whose graph would find no values.

    Libraries that offload (accelerate's `cpu_offload`, `device_map` with a disk) leave weights on the meta device and
    set a forward on the instance that puts values in their places for one call. Where nothing runs a forward of the
    instance, as in a graph, there are none.

    Raises:
        CaptureError: the weights of a module in it are offloaded.
    """
    for name, inner in module.named_modules(prefix=region):
        if "forward" in inner.__dict__ and any(p is not None and p.is_meta for p in inner._parameters.values()):
            raise CaptureError(
                f"the weights of `{name}` are offloaded: they are on the meta device, and a forward on the instance "
                "fetches them at every call, which no graph does. Compile and shrink before that, and offload "
                'ecospa_fx.restore(model), or a model that was compiled with execution="module"'
            )
