"""Relations: the ways in which an op acts on the axes of its operands, and the properties that follow from them.

Passes ask for the relation of an op, never for its name: an op with a rule is known to all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import fx

from ecospa_fx.passes.axes.algebra import Expr, Size

from .patterns import bind


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor argument of an op, as its rule sees it.

    Attributes:
        exprs: one axis expression per dim.
        shape: one size per dim.
        node: the FX node that made it.
        weighted: it depends on a parameter; otherwise it is a source, and is index-selected where it enters.
        parameters: names of the parameters that it is a weight made of; none if it is an activation, see
            `passes.infer.weights`.
        places: the axis that its entries are positions along, see `passes.infer.places`.
        counted: it depends on parameters by places only, so that it holds numbers of entries at them.
    """

    exprs: tuple[Expr, ...]
    shape: tuple[Size, ...]
    node: fx.Node
    weighted: bool
    parameters: tuple[str, ...] = ()
    places: Expr | None = None
    counted: bool = False

    @property
    def ndim(self) -> int:
        """The number of dims."""
        return len(self.shape)


@dataclass(frozen=True)
class Pattern:
    """Dims related by names, in the language of `passes.ir.patterns`.

    Attributes:
        spec: the pattern.
        operands: the tensors whose dims it names, in order.
        sizes: name -> number of entries, where only the arguments of the op tell it.
        apart: the op is nonlinear in entries, scales them one by one, or gives each a result of its own, so a change of
            basis does not pass. If False, the op is linear in each operand, along every name.
        window: kernel, dilation, padding and stride per dim of space of a convolution, which cut its input into the
            rows that the weight is multiplied with; empty where padding differs between the ends of a dim.
        attention: the operands are queries, keys and values, and a softmax over keys lies between the two products.
        moves: entries of the one operand go to other positions, and zeros may come between them.
        rescaled: the operand whose entries the output holds, each multiplied by some number.
        chosen: name -> the operand whose values say which of its entries are met. Where these are places, the name is
            the axis that they lie along; where they are counted along it, it is their own; otherwise it is pinned.
        positions: (output, name), where an output holds positions along a name that is reduced.
        least: (name, number), where the op needs so many entries.
    """

    spec: str
    operands: tuple[Operand, ...]
    sizes: Mapping[str, Size] = field(default_factory=dict)
    apart: bool = False
    window: tuple[tuple[int, ...], ...] | None = None
    attention: bool = False
    moves: bool = False
    rescaled: Operand | None = None
    chosen: Mapping[str, Operand] = field(default_factory=dict)
    positions: tuple[int, str] | None = None
    least: tuple[str, int] | None = None


@dataclass(frozen=True)
class Pointwise:
    """Output entries that each depend on the operands' entries at the same (broadcast) position.

    Attributes:
        operands: the tensors that meet.
        how: `"copy"` (the entries of the one operand, at most in another dtype or layout), `"linear"` (in all operands
            together), `"affine"` (linear, and a number added), `"product"` (linear in each operand), `"quotient"`
            (linear in the first), `"nonlinear"`.
        compares: the result says which operand is larger, or whether they are equal.
    """

    operands: tuple[Operand, ...]
    how: Literal["copy", "linear", "affine", "product", "quotient", "nonlinear"]
    compares: bool = False


@dataclass(frozen=True)
class SameDims:
    """The dims of `x`, of which some mix their entries, and `dropped` ones are reduced away or to one entry.

    Attributes:
        x: the operand.
        pinned: dims along which the op needs all entries.
        absent: dims along which the op takes all that is left: a reduction (an average, a norm, a softmax) in which
            entries that go have no part.
        dropped: dims that are reduced; those that are neither pinned nor absent are summed over.
        keepdim: dropped dims stay, with one entry.
        apart: the result is not linear in the entries that are summed over, so a change of basis does not pass.
        shares: entries along the absent dim become shares of 1, as in a softmax.
        moves: entries go to other positions along the pinned dims, or become zero there.
        positions: the output that holds positions along the one dim that is absent or pinned. Where several are, and it
            is used, they stay whole.
        ordered: the first output holds entries of `x`, in an order that their values decide.
        running: a dim that stays, and along which each result is the sum of the entries so far.
        empty: the operand gives its sizes, not its values.
    """

    x: Operand
    pinned: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    keepdim: bool = True
    apart: bool = False
    shares: bool = False
    moves: bool = False
    positions: int | None = None
    ordered: bool = False
    running: int | None = None
    empty: bool = False


@dataclass(frozen=True)
class Regrouped:
    """The entries of `x` in the same order, in other dims: those of `like`, if given."""

    x: Operand
    like: Operand | None = None


@dataclass(frozen=True)
class Permuted:
    """The dims of `x` in another order: dim `i` of the output is dim `order[i]` of `x`."""

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
    """Consecutive pieces along `dim`, each an output of its own."""

    x: Operand
    dim: int
    sizes: tuple[Size, ...]


@dataclass(frozen=True)
class Picked:
    """Entry `index` along `dim`, or each (None) as an output of its own; the dim of `x` stays whole, and disappears."""

    x: Operand
    dim: int
    index: Size | None = None


@dataclass(frozen=True)
class Halved:
    """The product of the two halves of `dim`, entry by entry."""

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
    """Repetition of `x` along dims of one entry and new leading dims, as new axes: those of `like`, if given."""

    x: Operand
    like: Operand | None = None


@dataclass(frozen=True)
class Repeated:
    """Repetition of `x`, `times[dim]` times per dim: the dim end to end, or (`interleaved`) each entry in place."""

    x: Operand
    times: tuple[Size, ...]
    interleaved: bool = False


@dataclass(frozen=True)
class Indexed:
    """Entries along `dim` of `x`, chosen by the values of `index`, whose dims replace it."""

    x: Operand
    dim: int
    index: Operand


@dataclass(frozen=True)
class Created:
    """A new tensor that takes at most sizes from its operands."""


@dataclass(frozen=True)
class Probed:
    """The result of an experiment: dims with equal numbers are one axis, which passes entry by entry or stays whole.

    Attributes:
        operands: the tensor arguments.
        axes: the number of the axis of each dim of each operand.
        outputs: the number of the axis that each dim of each output carries, None for a new one.
    """

    operands: tuple[Operand, ...]
    axes: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True)
class Opaque:
    """An op whose entries may all meet: every axis stays whole.

    Attributes:
        operands: the tensor arguments.
    """

    operands: tuple[Operand, ...]


Relation: TypeAlias = (
    Pattern | Pointwise | SameDims | Regrouped | Permuted | Sliced | Parted | Picked | Halved | Joined | Stacked
    | Expanded | Repeated | Indexed | Created | Probed | Opaque
)  # fmt: skip


def copied_operand(relation: Relation | None) -> Operand | None:
    """Return the operand whose entries an op keeps at their positions, at most in another dtype or layout, or None."""
    match relation:
        case Pointwise((x,), "copy"):
            return x
        case _:
            return None


def moved_operand(relation: Relation) -> Operand | None:
    """Return the operand whose entries an op only moves, leaves out or repeats; None where it computes."""
    match relation:
        case (
            Regrouped(x) | Permuted(x) | Sliced(x) | Parted(x) | Picked(x) | Expanded(x) | Repeated(x) | Indexed(x)
            | Pointwise((x,), "copy") | SameDims(x, moves=True) | Joined((x,))
            | Stacked((x,)) | Pattern(operands=(x,), moves=True)
        ):  # fmt: skip
            return x
        case _:
            return None


def positions(relation: Relation) -> tuple[int, Operand, int] | None:
    """Return the output of an op that holds positions along an axis, and the operand and the dim that have it."""
    match relation:
        case SameDims(x, pinned, absent, positions=int(number)) if len({*pinned, *absent}) == 1:
            return number, x, (*pinned, *absent)[0]
        case Pattern(positions=(number, name)):
            pattern = bind(relation.spec, len(relation.operands), tuple(relation.sizes))
            for term, operand in zip(pattern.operands, relation.operands, strict=True):
                keys = [*term.keys_of(operand.shape)]
                if name in keys:
                    return number, operand, keys.index(name)
    return None


def is_linear(relation: Relation, carrying: Collection[fx.Node]) -> bool:
    """Return True if an op applies one linear map to every entry of an axis, which its operands `carrying` have."""
    match relation:
        case Pattern(apart=apart):
            return not apart
        case SameDims():  # statistics, orders and positions
            return False
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
