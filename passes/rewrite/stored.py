"""Stored: what objects hold between calls, keys and values as a rule, at the sizes that a plan leaves.

layout(exprs, kept)   which entries of a tensor are there
-> compressed         a tensor at its original sizes to these
-> expanded           and back, zeros where entries are gone
agree(...)            every graph of a region takes what another leaves as it is
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ecospa_fx.errors import EcoSpaError, PinnedAxisError
from ecospa_fx.passes.axes.algebra import Expr, size_of
from ecospa_fx.passes.axes.selection import Selection, broadcast_mask, count, in_first_contexts, touched
from ecospa_fx.passes.ir.state_access import ObjectPath, copy_objects

if TYPE_CHECKING:
    from ecospa_fx.passes.ir.axis_facts import AxisFacts

StateKey = tuple[type, tuple[Any, ...]]  # the class of an object, and the way to something in it


@dataclass(frozen=True, eq=False)
class StateLayout:
    """Which entries of a tensor are left.

    Attributes:
        mask: of these; it broadcasts over the tensor at its original sizes.
        sizes: what is left of each dim, None where all is.
    """

    mask: Tensor
    sizes: tuple[int | None, ...]

    def fits(self, shape: Sequence[int]) -> list[int]:
        """The sizes that a tensor with as many entries as one of `shape` along other dims must have."""
        return [size if left is None else left for size, left in zip(shape, self.sizes, strict=True)]

    def over(self, tensor: Tensor) -> Tensor:
        """The mask over a tensor at its original sizes, where dims that are whole are as in `tensor`."""
        whole = [
            n if left is None else self.mask.size(d)
            for d, (n, left) in enumerate(zip(tensor.shape, self.sizes, strict=True))
        ]
        return self.mask.to(tensor.device).expand(whole)


def layout(exprs: Sequence[Expr], kept: Selection) -> StateLayout | None:
    """Which entries of a tensor along `exprs` are left, None where all are."""
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
    if mask is None:
        return None
    uniform = in_first_contexts(kept)
    sizes = tuple(int(count(expr, uniform)) if touched(expr, kept) else None for expr in exprs)
    return StateLayout(mask, sizes)


def expanded(tensor: Tensor, left: StateLayout) -> Tensor:
    """A tensor of which a layout is left in its places among zeros."""
    mask = left.over(tensor)
    whole = tensor.new_zeros(mask.shape)
    whole[mask] = tensor.detach().flatten()
    return whole


def compressed(tensor: Tensor, left: StateLayout) -> Tensor:
    """What a layout leaves of a tensor."""
    return tensor[left.mask.to(tensor.device).expand(tensor.shape)].reshape(left.fits(tensor.shape))


def keys_of(axis_facts: AxisFacts, stored: bool = False) -> dict[StateKey, Sequence[Expr]]:
    """What a graph knows of objects: axes by the class of the object and the way to them; or what it fills only."""
    carried = axis_facts.captured.carried
    return {
        (carried.types[place.number], place.path): exprs
        for place, exprs in axis_facts.stored.items()
        if not stored or place in carried.stored
    }


def check_state_layouts(graphs: Iterable[tuple[AxisFacts, Selection]], difference: str = "") -> None:
    """Check that what one graph leaves in an object is what the others take from it.

    Raises:
        PinnedAxisError: it is not.
    """
    seen: dict[StateKey, StateLayout | None] = {}
    for axis_facts, kept in graphs:
        for key, exprs in keys_of(axis_facts).items():
            mine = layout(exprs, kept)
            other = seen.setdefault(key, mine)
            if (mine is None) != (other is None) or (mine and other and not torch.equal(mine.mask, other.mask)):
                cls, path = key
                why = f" The call differs from earlier ones: {difference}." if difference else ""
                raise PinnedAxisError(
                    f"`{ObjectPath(0, path)}` of a {cls.__name__} is filled by one call of "
                    f"`{axis_facts.captured.region}` and read by another that would need other entries of it.{why} "
                    "Call the model as before"
                )


def whole_objects(objects: Sequence[Any], graphs: Iterable[tuple[AxisFacts, Selection]], who: str) -> list[Any]:
    """Copies of the objects of a call that hold what graphs have put there as it would be had nothing shrunk.

    Args:
        objects: they.
        graphs: of the region that is called, and what they keep.
        who: the region, for the message.

    Raises:
        EcoSpaError: what one holds is not what the region as it is now leaves in it.
    """
    known = {key: layout(exprs, kept) for axis_facts, kept in graphs for key, exprs in keys_of(axis_facts).items()}

    def whole(place: ObjectPath, tensor: Tensor) -> Tensor:
        left = known.get((type(objects[place.number]), place.path))
        if left is None:
            return tensor.detach().clone()
        if tensor.ndim == len(left.sizes) and list(tensor.shape) == left.fits(tensor.shape):
            return expanded(tensor, left)
        fit = (
            f"{tuple(left.fits(tensor.shape))} fit" if tensor.ndim == len(left.sizes) else f"{len(left.sizes)} dims fit"
        )
        raise EcoSpaError(
            f"`{place}` of the {type(objects[place.number]).__name__} that `{who}` is called with has sizes "
            f"{tuple(tensor.shape)}, and {fit}: it was filled by another model, or before this one shrank to what it "
            "is now. Start with an empty one"
        )

    return copy_objects(objects, whole)
