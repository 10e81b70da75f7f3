"""Coupling: rows and columns of several weights that shrink together, as users see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from ecospa_fx.arguments import TEXT, takes
from ecospa_fx.passes.find.discover import Kind

if TYPE_CHECKING:
    from .why import Path


# The entries to keep of each coupling, which is given itself or by name.
CouplingSelection: TypeAlias = "Mapping[Coupling, Tensor] | Mapping[str, Tensor] | Mapping[Coupling | str, Tensor]"


@dataclass(frozen=True, eq=False)
class Member:
    """One dim of one parameter that a coupling lies on.

    Attributes:
        parameter: name of the parameter in the model.
        dim: which of its dims.
        index: LongTensor `[parameter.shape[dim]]`, the entry of the coupling that each row or column belongs to, -1
            where it belongs to none. One entry may own many rows: a head dim has one in every head.
        matrix: whether the parameter has two or more dims, so that scores count it as a matrix of its own.
        of: name of that matrix; for a bias, name of the matrix whose rows it belongs to.
        writes: whether the entries are rows that the matrix `of` adds to, not columns that it reads.
        part: number of the segment, where one parameter holds several matrices end to end (a fused projection).
        context: LongTensor `[parameter.shape[dim]]`, the context (the head) that each row or column belongs to, -1
            where it belongs to none; None where the coupling has no context.
    """

    parameter: str
    dim: int
    index: Tensor
    matrix: bool
    of: str
    writes: bool
    part: int | None = None
    context: Tensor | None = None

    def __str__(self) -> str:
        part = "" if self.part is None else f" part {self.part}"
        return f"{self.parameter}[{self.dim}]{part}"


@dataclass(frozen=True, eq=False)
class Coupling:
    """Rows and columns of several weights that multiply each other, and so can only be removed together.

    Attributes:
        name: unique in the model, made of the module the members share and the kind.
        kind: `qk` (contracted in a score), `vo` (carried through attention), `heads`, `groups` (query heads that share
            a key head), `experts` (of a mixture, with the rows of its router), `ffn`, `glu` (a product of two
            branches), `conv`, `recurrent` (hidden units from step to step), `residual` (a stream that several add to).
        size: number of entries now (in each context).
        original_size: number of entries before any shrink.
        members: the parameter dims that it lies on.
        linear: whether everything between the weights is linear, so that any change of basis between them is free.
        region: name of the region that it was discovered in.
        explain_path: returns the path between two of its parameters; see `why`.
        context: name of the coupling (of heads, say) in each entry of which other entries may be kept, though as many
            in each; None where every context keeps the same entries.
        contexts: number of entries of that coupling now; 1 where there is none.
        attention: the attention that a `qk` or `vo` coupling is part of, the same text for both.
        changes: with execution="module", the integers in the model's modules that change with its size.
        in_step: with execution="module", names of couplings that must keep the same share of their entries, because its
            own Python has one integer for the sizes of all (one `head_dim` for queries, keys and values).
        least: number of entries that it keeps at least, because the model takes so many of them (a top-k of experts).
        last_stays: the reason why one entry must stay; None where all may go, as `Constraints(min_keep=0)` allows: what
            they feed is a constant then.
        parts: its size stays a multiple of this number, as many ranks share its entries out by tensor parallelism; 0
            where that cuts entries apart, so that none can go.
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
    in_step: tuple[str, ...] = ()
    parts: int = 1
    least: int = 1
    last_stays: str | None = None

    @cached_property
    def width(self) -> int:
        """Rows or columns of one entry in the narrowest of its matrices, per context: 2 for a rotary pair."""
        rows = min(int((m.index >= 0).sum()) for m in self.members if m.matrix)
        return max(1, rows // max(1, self.size * self.contexts))

    @property
    def smallest(self) -> int:
        """The number of entries that it may come down to: 0 where all may go."""
        return self.least if self.last_stays is not None else 0

    @takes(a=TEXT, b=TEXT)
    def why(self, a: str, b: str) -> Path:
        """Return the path through the graph by which two of its parameters are coupled.

        Args:
            a: a parameter name.
            b: another.

        Raises:
            NoCouplingError: one of them is not a member.
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
