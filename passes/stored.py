"""Stored: what objects hold between calls, keys and values as a rule, at the sizes that a plan leaves.

    layout(exprs, kept)   which entries of a tensor are there
    -> compressed         a tensor at its original sizes to these
    -> expanded           and back, zeros where entries are gone
    agree(...)            every graph of a region takes what another leaves as it is
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ecospa_fx.errors import PinnedAxisError

from .axes import Expr, size_of
from .names import join
from .selection import Kept, broadcast_mask, touched

if TYPE_CHECKING:
    from .inference import Inference

Key = tuple[type, tuple[Any, ...]]  # the class of an object, and the way to something in it


def layout(exprs: Sequence[Expr], kept: Kept) -> Tensor | None:
    """Which entries of a tensor along `exprs` are left: a mask that broadcasts over it, None where all are."""
    mask: Tensor | None = None
    for dim, expr in enumerate(exprs):
        if touched(expr, kept):
            if type(size_of(expr)) is not int:
                raise PinnedAxisError(
                    f"an axis of {size_of(expr)} that has shrunk is held by an object that a region is called with, "
                    "folded together with one whose size changes; that cannot be followed"
                )
            here = broadcast_mask(exprs, dim, kept)
            mask = here if mask is None else mask & here
    return mask


def counts(mask: Tensor, shape: Sequence[int]) -> list[int]:
    """The sizes of a tensor of sizes `shape`, of which a layout leaves this."""
    return [
        int(mask.any(dim=[d for d in range(mask.ndim) if d != dim]).sum()) if size > 1 and mask.size(dim) > 1 else size
        for dim, size in enumerate(shape)
    ] if not _varies(mask) else _varied_counts(mask, shape)  # fmt: skip


def _varies(mask: Tensor) -> bool:
    """Whether a mask keeps other entries along one dim in each entry of another."""
    rank_one: Tensor = torch.ones([1] * mask.ndim, dtype=torch.bool)
    for dim in range(mask.ndim):
        rank_one = rank_one & mask.any(dim=[d for d in range(mask.ndim) if d != dim], keepdim=True)
    return not torch.equal(rank_one.expand_as(mask), mask)


def _varied_counts(mask: Tensor, shape: Sequence[int]) -> list[int]:
    result = []
    for dim, size in enumerate(shape):
        along = mask.sum(dim)  # as many in every context, none where a context is gone
        result.append(size if mask.size(dim) == 1 else int(along.max()))
    return result


def expanded(tensor: Tensor, mask: Tensor) -> Tensor:
    """A tensor of which a layout is left in its places among zeros; raises a ValueError where it is not that."""
    shape = [size if mask.size(dim) == 1 else mask.size(dim) for dim, size in enumerate(tensor.shape)]
    if list(tensor.shape) != counts(mask, shape):
        raise ValueError(f"sizes {tuple(tensor.shape)}, and {tuple(counts(mask, shape))} fit")
    whole = tensor.new_zeros(shape)
    whole[mask.to(tensor.device).expand(shape)] = tensor.detach().flatten()
    return whole


def compressed(tensor: Tensor, mask: Tensor) -> Tensor:
    """What a layout leaves of a tensor."""
    shape = counts(mask, tensor.shape)
    return tensor[mask.to(tensor.device).expand(tensor.shape)].reshape(shape)


def keys_of(inference: Inference, stored: bool = False) -> dict[Key, Sequence[Expr]]:
    """What a graph knows of objects: axes by the class of the object and the way to them; or what it fills only."""
    carried = inference.captured.carried
    return {
        (carried.types[place.number], place.path): exprs
        for place, exprs in inference.stored.items()
        if not stored or place in carried.stored
    }


def agree(graphs: Iterable[tuple[Inference, Kept]], difference: str = "") -> None:
    """Check that what one graph leaves in an object is what the others take from it.

    Raises:
        PinnedAxisError: it is not.
    """
    seen: dict[Key, Tensor | None] = {}
    for inference, kept in graphs:
        for key, exprs in keys_of(inference).items():
            mine = layout(exprs, kept)
            other = seen.setdefault(key, mine)
            if (mine is None) != (other is None) or (mine is not None and not torch.equal(mine, other)):  # type: ignore[arg-type]
                cls, path = key
                why = f" The call differs from earlier ones: {difference}." if difference else ""
                raise PinnedAxisError(
                    f"`{join(inference.captured.region, ''.join(map(str, path)).removeprefix('.'))}` of a {cls.__name__} "
                    f"is filled by one call and read by another that would need other entries of it.{why} Call the model "
                    "as before"
                )
