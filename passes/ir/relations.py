"""Relations: what one op can do to the axes of its operands, and what follows from that.

Passes ask the relation of an op, never its name: an op that some rule describes is known to all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
        apart: the op is nonlinear in, or scales, each entry along the axes that it carries, or gives each a result of
            its own: a change of basis does not pass. Where False the op is linear in each operand, along every name.
        window: of a convolution, how its input is cut into the rows that the columns of the weight meet: kernel,
            dilation, padding and stride per dim of space; empty where the two ends of a dim are padded differently.
        attention: the operands are queries, keys and values, and a softmax over keys lies between the two products.
        rescaled: the operand whose entries the output holds, each multiplied by some number.
    """

    spec: str
    operands: tuple[Operand, ...]
    sizes: Mapping[str, Size] = field(default_factory=dict)
    apart: bool = False
    window: tuple[tuple[int, ...], ...] | None = None
    attention: bool = False
    rescaled: Operand | None = None


@dataclass(frozen=True)
class Pointwise:
    """Every output entry depends on the operands' entries at the same (broadcast) place.

    Attributes:
        operands: the tensors that meet.
        how: `"copy"` (the entries of the one operand, in another dtype or layout at most), `"linear"` (in all operands
            together), `"affine"` (linear, and a number added), `"product"` (linear in each operand), `"quotient"`
            (linear in the first), `"nonlinear"`.
    """

    operands: tuple[Operand, ...]
    how: Literal["copy", "linear", "affine", "product", "quotient", "nonlinear"]


@dataclass(frozen=True)
class SameDims:
    """The output has the dims of `x`; `pinned` ones mix their entries, `dropped` ones are reduced away or to one.

    Attributes:
        x: the operand.
        pinned: dims along which entries meet in a way that needs all of them.
        dropped: dims that are reduced; those that are not pinned are summed over.
        keepdim: dropped dims stay, with one entry.
        apart: the result is not linear in what is summed over: a change of basis does not pass.
        shares: entries along the pinned dim become shares of one: a softmax.
    """

    x: Operand
    pinned: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    keepdim: bool = True
    apart: bool = False
    shares: bool = False


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
    """Entry `index` of `dim`, or (None) each entry as an output of its own; the dim disappears, and stays whole."""

    x: Operand
    dim: int
    index: Size | None = None


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
    """Dims of one entry, and new leading dims, become new axes along which `x` repeats: those of `like`, if given."""

    x: Operand
    like: Operand | None = None


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


def copied_operand(relation: Relation | None) -> Operand | None:
    """The operand whose entries an op gives at the same places, in another dtype or layout at most."""
    match relation:
        case Pointwise((x,), "copy"):
            return x
        case _:
            return None


def moved_operand(relation: Relation) -> Operand | None:
    """The operand whose entries an op only moves, leaves out or repeats; None where it computes."""
    match relation:
        case (
            Regrouped(x) | Permuted(x) | Sliced(x) | Parted(x) | Picked(x) | Expanded(x) | Repeated(x) | Indexed(x)
            | Pointwise((x,), "copy")
        ):  # fmt: skip
            return x
        case _:
            return None


def source_weight(relation: Relation) -> Operand | None:
    """The operand that an op hands on as a weight: moved, or changed entry by entry by numbers that are no tensor."""
    match relation:
        case Indexed(x):  # rows of a matrix are activations, as of an embedding; rows of matrices are matrices
            return x if x.ndim > 2 else None
        case Pointwise((x,), "linear" | "affine" | "product" | "quotient"):
            return x
        case Pattern(rescaled=x) if x is not None:
            return x
        case _:
            return moved_operand(relation)


def is_linear(relation: Relation, carrying: Collection[fx.Node]) -> bool:
    """Whether an op does the same linear thing to every entry of an axis that the operands `carrying` have."""
    match relation:
        case Pattern(apart=apart):
            return not apart
        case Joined() | Stacked():
            return True
        case Pointwise(xs, "linear"):
            return all(x.node in carrying for x in xs)
        case Pointwise(xs, "product"):
            return sum(x.node in carrying for x in xs) == 1
        case Pointwise((first, *others), "quotient"):
            return first.node in carrying and not any(x.node in carrying for x in others)
        case _:
            return moved_operand(relation) is not None
