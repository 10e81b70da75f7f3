"""Own memory: weights that lie side by side in one buffer get memory of their own, where nobody else has the buffer.

`vector_to_parameters` and the averages of local SGD leave the weights of a model as views of one vector. Tensors in
one storage count as tied, and views of different places in it cannot shrink as one. Where nothing but these weights
uses the vector, nobody can see whether they lie in it. Where something does, such as an optimizer that steps on the
vector as a whole, they stay there: it would no longer reach them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ecospa_fx.passes.graph.shared_memory import SharedMemory
from ecospa_fx.passes.graph.tensors import named_tensors

from .memory import held_by


def give_own_memory(model: nn.Module, memory: SharedMemory) -> SharedMemory:
    """Move weights that share a buffer, which nothing else uses and in which none overlap, into memory of their own.

    Args:
        model: the model.
        memory: who shares memory in it.

    Returns:
        Who does afterwards.
    """
    moved = False
    for names in _beside_each_other(model, memory):
        tensors = {id(each): each for each in map(named_tensors(model).__getitem__, names)}
        storage = next(iter(tensors.values())).untyped_storage()
        if held_by(storage, len(tensors)):
            moved = True
            with torch.inference_mode(False), torch.no_grad():
                for tensor in tensors.values():
                    tensor.data = tensor.detach().clone()
    return SharedMemory(named_tensors(model)) if moved else memory


def held_together(model: nn.Module) -> str:
    """Say which weights lie side by side in a buffer that something else has too; "" for none."""
    groups = _beside_each_other(model, SharedMemory(named_tensors(model)))
    if not groups:
        return ""
    first, second, *more = groups[0]
    others = f" and {len(more)} more" if more else ""
    return (
        f"`{first}`, `{second}`{others} lie in one buffer, as after vector_to_parameters, and something else has that "
        "buffer too. Let go of it; or, if nothing writes to it any more, give each weight memory of its own, "
        "`p.data = p.data.clone()`"
    )


def _beside_each_other(model: nn.Module, memory: SharedMemory) -> list[list[str]]:
    """Return the names of tensors that have one storage and no entry in common, by storage."""
    if not memory.groups:
        return []
    named = named_tensors(model)
    groups = [[name for name in names if _is_plain(named[name])] for names in memory.groups]
    return [names for names in groups if _apart([named[name] for name in names]) and not _one_chunk(model, names)]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.numel() > 0


def _apart(tensors: list[Tensor]) -> bool:
    """Return whether there are several of these tensors, and none of them overlap."""
    spans = sorted(
        (start, start + 1 + sum((size - 1) * step for size, step in zip(each.shape, each.stride(), strict=True)))
        for each in {id(each): each for each in tensors}.values()
        for start in [each.storage_offset()]
    )
    return len(spans) > 1 and all(end <= start for (_, end), (start, _) in pairwise(spans))


def _one_chunk(model: nn.Module, names: list[str]) -> bool:
    """Return whether these are the weights of a recurrent layer, which cuDNN wants side by side."""
    owners = {name.rpartition(".")[0] for name in names}
    return len(owners) == 1 and isinstance(model.get_submodule(owners.pop()), nn.RNNBase)
