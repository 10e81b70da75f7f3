"""Coupling and Refusal: what discovery says about a model, as people read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from ecospa_fx.passes.find.discover import Kind

if TYPE_CHECKING:
    from .why import Path


# What to keep of which couplings, given themselves or by name.
CouplingSelection: TypeAlias = "Mapping[Coupling, Tensor] | Mapping[str, Tensor] | Mapping[Coupling | str, Tensor]"


@dataclass(frozen=True, eq=False)
class Member:
    """One dim of one parameter that a coupling runs along.

    Attributes:
        parameter: name of the parameter in the model.
        dim: which of its dims.
        index: LongTensor `[parameter.shape[dim]]`, the entry of the coupling that each row or column belongs to, -1
            where it belongs to none. One entry may own many rows: a head dim has one in every head.
        matrix: the parameter has two or more dims, so it counts as a matrix of its own in scores.
        of: the matrix that it is, or, for a bias, whose rows it counts in; the same text for both.
        part: number of the segment, where one parameter holds several matrices end to end (a fused projection).
        context: LongTensor `[parameter.shape[dim]]`, the context (the head) that each row or column belongs to, -1
            where it belongs to none; None where the coupling has no context.
    """

    parameter: str
    dim: int
    index: Tensor
    matrix: bool
    of: str
    part: int | None = None
    context: Tensor | None = None

    def __str__(self) -> str:
        part = "" if self.part is None else f" part {self.part}"
        return f"{self.parameter}[{self.dim}]{part}"


@dataclass(frozen=True, eq=False)
class Coupling:
    """Rows and columns of several weights that multiply each other, and so can only go together.

    Attributes:
        name: unique in the model, made of the module the members share and the kind.
        kind: `qk` (contracted in a score), `vo` (carried through attention), `heads`, `groups` (query heads that share
            a key head), `ffn`, `glu` (a product of two branches), `conv`, `residual` (a stream that several add to).
        size: number of entries now (in each context).
        original_size: number of entries before any shrink.
        members: the parameter dims it runs along.
        linear: everything between the weights is linear, so that any change of basis between them is free.
        region: name of the region it was found in.
        context: what it may differ by: the coupling of heads, say, each of which may keep other entries, though all
            the same number; None where it cannot differ.
        contexts: how many of those there are now; 1 where there are none.
        attention: the attention that a `qk` or `vo` coupling is part of, the same text for both.
        changes: with execution="module", the integers that the model's modules hold and that change with its size.
    """

    name: str
    kind: Kind
    size: int
    original_size: int
    members: tuple[Member, ...]
    linear: bool
    region: str
    explain_path: Callable[[str, str], Path] = field(repr=False)
    context: str | None = None
    contexts: int = 1
    attention: str | None = None
    changes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Rows or columns that one entry takes in the narrowest of its matrices, per context: 2 of a rotary pair."""
        return min(int((m.index >= 0).sum()) for m in self.members if m.matrix) // (self.size * self.contexts)

    def why(self, a: str, b: str) -> Path:
        """The path through the graph by which two of its parameters are coupled.

        Args:
            a: a parameter name.
            b: another.

        Raises:
            NoCouplingError: one of them is no member.
        """
        return self.explain_path(a, b)

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Coupling) and self.name == other.name

    def __str__(self) -> str:
        size = f"{self.size}" if self.size == self.original_size else f"{self.size} of {self.original_size}"
        how = "bilinear" if self.linear else "pointwise"
        return f"{self.name}: {self.kind}, {size}, {how}, {', '.join(map(str, self.members))}"
