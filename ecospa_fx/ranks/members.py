"""Members: the processes that train a model together, by what wraps it and by how its parameters are placed."""

from __future__ import annotations

from typing import Any

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ecospa_fx.collectives import is_distributed

from .agreement import Ranks
from .wrappers import unwrapped, wrappers_around


def ranks_of(model: nn.Module) -> Ranks:
    """Return the processes that change a model together: none beside this one where nothing spreads it.

    Args:
        model: the model, or a wrapper of it.
    """
    if not is_distributed():
        return Ranks()
    model = unwrapped(model)
    groups: list[distributed.ProcessGroup] = []
    for wrapper in wrappers_around(model):
        if isinstance(wrapper, DistributedDataParallel):
            groups.append(wrapper.process_group)
    meshes = dict.fromkeys(mesh for p in model.parameters() if (mesh := _mesh(p)) is not None)
    groups += [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]
    return Ranks(groups)


def is_replicated(model: nn.Module) -> bool:
    """Return whether ranks hold whole copies of a model, whose gradients are reduced by `DistributedDataParallel`."""
    around = wrappers_around(unwrapped(model)) if is_distributed() else []
    return any(isinstance(each, DistributedDataParallel) for each in around)


def _mesh(parameter: Any) -> Any:
    return getattr(parameter, "device_mesh", None) if hasattr(parameter, "placements") else None
