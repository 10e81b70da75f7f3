"""Members: the processes that train a model together, by what wraps it and by how its parameters are placed."""

from __future__ import annotations

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ecospa_fx.collectives import is_distributed

from .agreement import Ranks
from .fsdp2 import owners
from .shards import groups_of
from .tensor_parallel import spread_dims
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
    # Parameters that FSDP2 holds gathered for a while are not DTensors then, but it has these too.
    sharded = [owner.sharded_param for owner in owners(model).values()]
    return Ranks([*groups, *groups_of([*sharded, *model.parameters()])])


def sharing_ranks(model: nn.Module) -> Ranks:
    """Return the ranks of a model that is sharded, whose state is whole only once they have added up their shares."""
    inside = unwrapped(model)
    return ranks_of(model) if is_distributed() and (owners(inside) or spread_dims(inside)) else Ranks()


def is_replicated(model: nn.Module) -> bool:
    """Return whether ranks hold whole copies of a model, whose gradients are reduced by `DistributedDataParallel`."""
    around = wrappers_around(unwrapped(model)) if is_distributed() else []
    return any(isinstance(each, DistributedDataParallel) for each in around)
