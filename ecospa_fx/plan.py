"""Plan: the entries left of every parameter, as positions in the original model; all the state of a shrunk model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from .arguments import TEXT, takes
from .errors import CheckpointError, EcoSpaError
from .json_text import parse_json

FORMAT = 1
MOST = 2**63 - 1  # largest number of entries of a tensor


@dataclass(eq=False)
class Plan:
    """The rows and columns of the original model that are left.

    Attributes:
        kept: (parameter or buffer name, dim) -> sorted LongTensor of original positions. Absent dims have full size.
        original_shapes: name -> shape before any shrink, for each parameter or buffer that has shrunk.
    """

    kept: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    original_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape now of a parameter that has shrunk."""
        return tuple(
            len(self.kept[name, dim]) if (name, dim) in self.kept else size
            for dim, size in enumerate(self._original(name))
        )

    def _original(self, name: str) -> tuple[int, ...]:
        try:
            return self.original_shapes[name]
        except (KeyError, TypeError):
            raise EcoSpaError(
                f"the plan has no shrunk tensor {name!r}; it has {', '.join(self.original_shapes) or 'none'}"
            ) from None

    def mask(self, name: str, dim: int) -> Tensor:
        """Return the bool mask `[original size]` of the entries kept along one dim of a parameter that has shrunk."""
        shape = self._original(name)
        if type(dim) is not int or not 0 <= dim < len(shape):
            raise EcoSpaError(f"`{name}` has dims 0 to {len(shape) - 1}, and no dim {dim!r}")
        size = shape[dim]
        if (name, dim) not in self.kept:
            return torch.ones(size, dtype=torch.bool, device="cpu")
        mask = torch.zeros(size, dtype=torch.bool, device="cpu")
        mask[self.kept[name, dim]] = True
        return mask

    @takes(prefix=TEXT)
    def under(self, prefix: str) -> Iterator[str]:
        """Iterate over the shrunk names below a region, as the region names them."""
        for name in self.original_shapes:
            if not prefix:
                yield name
            elif name.startswith(f"{prefix}."):
                yield name.removeprefix(f"{prefix}.")

    def copy(self) -> Plan:
        """Return an independent copy, which shares the tensors: they are never written to."""
        return Plan(dict(self.kept), dict(self.original_shapes))

    def __len__(self) -> int:
        return len(self.kept)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Plan)
            and self.original_shapes == other.original_shapes
            and self.kept.keys() == other.kept.keys()
            and all(torch.equal(kept, other.kept[key]) for key, kept in self.kept.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> str:
        """Return the plan as JSON, one line per dim that shrank."""
        axes = [
            {"parameter": name, "dim": dim, "kept": kept.tolist()} for (name, dim), kept in sorted(self.kept.items())
        ]
        lines = ",\n    ".join(json.dumps(axis) for axis in axes)
        shapes = json.dumps({name: list(shape) for name, shape in sorted(self.original_shapes.items())})
        return f'{{\n  "format": {FORMAT},\n  "original_shapes": {shapes},\n  "axes": [\n    {lines}\n  ]\n}}\n'

    @classmethod
    @takes(text=TEXT)
    def from_json(cls, text: str) -> Plan:
        """Read a plan written by `to_json`.

        Raises:
            CheckpointError: it is not a plan, has another format version, or contradicts itself.
        """
        document = parse_json(text, "the plan")
        try:
            if document["format"] != FORMAT:
                raise CheckpointError(f"the plan has format {document['format']!r}; this version reads {FORMAT}")
            shapes = {name: _shape(name, shape) for name, shape in document["original_shapes"].items()}
            kept: dict[tuple[str, int], Tensor] = {}
            for axis in document["axes"]:
                positions, key = _positions(axis, shapes), (axis["parameter"], axis["dim"])
                if key in kept:
                    raise CheckpointError(f"the plan keeps entries of `{key[0]}` dim {key[1]} twice")
                kept[key] = positions
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"this is not a plan: {type(error).__name__}: {error}") from error
        return cls(kept, shapes)


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    sizes = type(shape) is list and len(shape) <= 64 and all(type(n) is int and 0 <= n <= MOST for n in shape)
    if not sizes or prod(shape) > MOST:
        raise CheckpointError(f"the plan's original shape of `{name}`, {shape!s:.60}, is not a shape of a tensor")
    return tuple(shape)


def _positions(axis: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    name, dim, positions = axis["parameter"], axis["dim"], axis["kept"]
    if name not in shapes or type(dim) is not int or not 0 <= dim < len(shapes[name]):
        raise CheckpointError(f"the plan keeps entries of `{name}` dim {dim}, but has no original shape for it")
    size = shapes[name][dim]
    ordered = (
        type(positions) is list
        and all(type(p) is int for p in positions)
        and all(a < b for a, b in pairwise(positions))
    )
    if not ordered or (positions and (positions[0] < 0 or positions[-1] >= size)):
        raise CheckpointError(f"the plan's positions of `{name}` dim {dim} are not increasing within 0..{size - 1}")
    return torch.tensor(positions, dtype=torch.long, device="cpu")  # within torch.device("meta") too
