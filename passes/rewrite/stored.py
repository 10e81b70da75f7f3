"""Stored state: tensors in objects between calls, keys and values as a rule, at the sizes that a plan leaves.

    layout(exprs, kept)       the entries of a tensor that are left
      -> compressed           a tensor from its original sizes to these
      -> expanded             and back, with zeros where entries are gone
    check_state_layouts(..)   every graph of a region takes from an object the entries that another leaves in it

Programs read and fill objects at these sizes; the original ones are needed to capture a graph and to verify one.
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

StateKey = tuple[type, tuple[Any, ...]]  # the class of an object, and the path to a tensor in it


@dataclass(frozen=True, eq=False)
class StateLayout:
    """The entries of a tensor that are left.

    Attributes:
        mask: True for these entries; it broadcasts over the tensor at its original sizes.
        sizes: number of entries left along each dim, None where all are.
    """

    mask: Tensor
    sizes: tuple[int | None, ...]

    def shape_left(self, shape: Sequence[int]) -> list[int]:
        """Return the shape that is left of a tensor whose whole dims have the sizes of `shape`."""
        return [size if left is None else left for size, left in zip(shape, self.sizes, strict=True)]

    def shape_held(self, shape: Sequence[int]) -> list[int]:
        """Return the shape in an object, where one entry stands for none: a cache counts tokens by what it holds."""
        return [1 if left == 0 else size for size, left in zip(self.shape_left(shape), self.sizes, strict=True)]

    def mask_over(self, tensor: Tensor) -> Tensor:
        """Expand the mask over a tensor at its original sizes, whose whole dims are as in `tensor`."""
        original = [
            n if left is None else self.mask.size(d)
            for d, (n, left) in enumerate(zip(tensor.shape, self.sizes, strict=True))
        ]
        return self.mask.to(tensor.device).expand(original)


def layout(exprs: Sequence[Expr], kept: Selection) -> StateLayout | None:
    """Return the layout of a tensor along `exprs`, None where all of its entries are left.

    Raises:
        PinnedAxisError: a dim that has shrunk is folded together with a dynamic one.
    """
    mask: Tensor | None = None
    for dim, expr in enumerate(exprs):
        if touched(expr, kept):
            if type(size_of(expr)) is not int:
                raise PinnedAxisError(
                    f"an object that a region is called with holds a tensor whose dim {dim} of size {size_of(expr)} "
                    "folds an axis that has shrunk together with one whose size changes, which cannot be resized. Give "
                    "each a dim of its own, or do not shrink that axis"
                )
            here = broadcast_mask(exprs, dim, kept)
            mask = here if mask is None else mask & here
    if mask is None:
        return None
    uniform = in_first_contexts(kept)
    sizes = tuple(int(count(expr, uniform)) if touched(expr, kept) else None for expr in exprs)
    return StateLayout(mask, sizes)


def expanded(tensor: Tensor, left: StateLayout) -> Tensor:
    """Expand a tensor to its original sizes, with zeros where entries are gone."""
    mask = left.mask_over(tensor)
    original = tensor.new_zeros(mask.shape)
    if 0 in left.sizes:
        return original
    original[mask] = tensor.detach().flatten()
    return original


def compressed(tensor: Tensor, left: StateLayout) -> Tensor:
    """Compress a tensor at its original sizes to the entries that are left."""
    return tensor[left.mask.to(tensor.device).expand(tensor.shape)].reshape(left.shape_left(tensor.shape))


def keys_of(axis_facts: AxisFacts, stored: bool = False) -> dict[StateKey, Sequence[Expr]]:
    """Return the axes of tensors in objects that a graph uses, or (`stored`) only of those that it fills."""
    carried = axis_facts.captured.carried
    return {
        (carried.types[place.number], place.path): exprs
        for place, exprs in axis_facts.stored.items()
        if not stored or place in carried.stored
    }


def check_state_layouts(graphs: Iterable[tuple[AxisFacts, Selection]], difference: str = "") -> None:
    """Check that the entries that one graph leaves in an object are those that the others take from it.

    Raises:
        PinnedAxisError: two graphs use different entries.
    """
    layouts: dict[StateKey, StateLayout | None] = {}
    for axis_facts, kept in graphs:
        for key, exprs in keys_of(axis_facts).items():
            this = layout(exprs, kept)
            other = layouts.setdefault(key, this)
            if (this is None) != (other is None) or (this and other and not torch.equal(this.mask, other.mask)):
                cls, path = key
                why = f" The call differs from earlier ones: {difference}." if difference else ""
                raise PinnedAxisError(
                    f"two calls of `{axis_facts.captured.region}` share `{ObjectPath(0, path)}` of a {cls.__name__}, "
                    f"but use different entries of it ({_entries_text(other)}; {_entries_text(this)}).{why} Call the "
                    "model as before"
                )


def _entries_text(left: StateLayout | None) -> str:
    return ", ".join(f"{n} along dim {d}" for d, n in enumerate(left.sizes) if n is not None) if left else "all"


def whole_objects(objects: Sequence[Any], graphs: Iterable[tuple[AxisFacts, Selection]], who: str) -> list[Any]:
    """Copy the objects of a call, with the tensors that graphs have put there at original sizes.

    Args:
        objects: the objects.
        graphs: the graphs of the region that is called, each with the entries that it keeps.
        who: name of the region, for the message.

    Raises:
        EcoSpaError: a tensor in an object does not have the sizes that the region leaves now.
    """
    layouts = {key: layout(exprs, kept) for axis_facts, kept in graphs for key, exprs in keys_of(axis_facts).items()}

    def expand(place: ObjectPath, tensor: Tensor) -> Tensor:
        left = layouts.get((type(objects[place.number]), place.path))
        if left is None:
            return tensor.detach().clone()
        if tensor.ndim == len(left.sizes) and list(tensor.shape) == left.shape_held(tensor.shape):
            return expanded(tensor, left)
        needed = (
            str(tuple(left.shape_held(tensor.shape))) if tensor.ndim == len(left.sizes) else f"{len(left.sizes)} dims"
        )
        raise EcoSpaError(
            f"`{place}` of the {type(objects[place.number]).__name__} that `{who}` is called with has sizes "
            f"{tuple(tensor.shape)} and needs {needed}: it was filled by another model, or by this one before its last "
            "shrink. Start with an empty one"
        )

    return copy_objects(objects, expand)
