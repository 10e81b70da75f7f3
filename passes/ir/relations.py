"""Relations: what one op can do to the axes of its operands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import fx

from ecospa_fx.passes.axes.algebra import Expr, Size


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor argument as a rule sees it.

    Attributes:
        exprs: one axis expression per dim.
        shape: one size per dim.
        node: the FX node that made it.
        weighted: it depends on a parameter; otherwise it is a source, and selected where it enters.
        parameter: name of the parameter it is (a view of), if any.
    """

    exprs: tuple[Expr, ...]
    shape: tuple[Size, ...]
    node: fx.Node
    weighted: bool
    parameter: str | None = None

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)


@dataclass(frozen=True)
class Pattern:
    """Dims related by names, in the language of `passes.ir.patterns`.

    Attributes:
        spec: the pattern.
        operands: the tensors whose dims it names, in order.
        sizes: sizes of names that only the arguments of the op tell.
        apart: the op is nonlinear in, or scales, each entry along the axes that it carries: a change of basis does not
            pass.
    """

    spec: str
    operands: tuple[Operand, ...]
    sizes: Mapping[str, Size] = field(default_factory=dict)
    apart: bool = False


@dataclass(frozen=True)
class Pointwise:
    """Every output entry depends on the operands' entries at the same (broadcast) place."""

    operands: tuple[Operand, ...]
    how: Literal["linear", "product", "nonlinear"]


@dataclass(frozen=True)
class SameDims:
    """The output has the dims of `x`; `pinned` ones mix their entries, `dropped` ones are reduced away or to one."""

    x: Operand
    pinned: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    keepdim: bool = True


@dataclass(frozen=True)
class Regrouped:
    """The output has the same entries in the same order as `x`, in other dims: those of `like`, if given."""

    x: Operand
    like: Operand | None = None


@dataclass(frozen=True)
class Permuted:
    """Dim `i` of the output is dim `order[i]` of `x`."""

    x: Operand
    order: tuple[int, ...]


@dataclass(frozen=True)
class Sliced:
    """Entries `start, start + step, ...` below `stop` of `dim`."""

    x: Operand
    dim: int
    start: Size
    stop: Size
    step: int


@dataclass(frozen=True)
class Parted:
    """Consecutive pieces of `dim`, as several outputs."""

    x: Operand
    dim: int
    sizes: tuple[Size, ...]


@dataclass(frozen=True)
class Picked:
    """One entry of `dim`, or (`every`) each of them as an output of its own; the dim disappears and stays whole."""

    x: Operand
    dim: int
    every: bool = False


@dataclass(frozen=True)
class Halved:
    """The two halves of `dim` are multiplied entry by entry."""

    x: Operand
    dim: int


@dataclass(frozen=True)
class Joined:
    """Operands end to end along `dim`."""

    operands: tuple[Operand, ...]
    dim: int


@dataclass(frozen=True)
class Stacked:
    """Operands side by side along a new `dim`."""

    operands: tuple[Operand, ...]
    dim: int


@dataclass(frozen=True)
class Expanded:
    """Dims of one entry, and new leading dims, become new axes along which `x` repeats."""

    x: Operand


@dataclass(frozen=True)
class Repeated:
    """`x` repeated `times[dim]` times per dim: the whole dim end to end, or (`interleaved`) each entry in place."""

    x: Operand
    times: tuple[Size, ...]
    interleaved: bool = False


@dataclass(frozen=True)
class Indexed:
    """Entries of `dim` of `x` chosen by the values of `index`, whose dims take its place."""

    x: Operand
    dim: int
    index: Operand


@dataclass(frozen=True)
class Created:
    """A tensor that takes nothing but sizes from its operands."""


@dataclass(frozen=True)
class Probed:
    """What an experiment found: dims with equal numbers are one axis, and pass through entry by entry or stay whole.

    Attributes:
        operands: the tensor arguments.
        axes: the number of the axis of each dim of each operand.
        outputs: for each dim of each output the number of the axis it carries, None for a new one.
    """

    operands: tuple[Operand, ...]
    axes: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True)
class Opaque:
    """Nothing is known about which entries meet: every axis stays whole."""

    operands: tuple[Operand, ...]


Relation: TypeAlias = (
    Pattern | Pointwise | SameDims | Regrouped | Permuted | Sliced | Parted | Picked | Halved | Joined | Stacked
    | Expanded | Repeated | Indexed | Created | Probed | Opaque
)  # fmt: skip
