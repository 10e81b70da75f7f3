"""Axis algebra: a small type system for the dims of tensors.

Every dim of every tensor carries an *axis expression* over *atoms* (named extents):

    expr     := atom | product(expr, ...) | segments(expr, ...)
    product  :  row-major flattening, `(h d)` has h * d entries and d runs fastest
    segments :  concatenation, `q | k | v` has q + k + v entries
    UNIT     :  the empty product, one entry, nothing to select
    EMPTY    :  the empty segments, no entry

`Axes` holds the equalities found so far, as a substitution from atoms to expressions. One operation adds an equality,
`unify(a, b)` ("these two dims are the same axis"). Three look inside an axis and refine it where they must: `split` (a
view regroups it), `cut` (a slice divides it), `regroup` (a view regroups several at once).

Normal form, kept by `product` and `segments`: products and segments are flat, units vanish from products, and what runs
faster than a segmented factor is distributed over its parts, `(a | b) c == a c | b c`. Two expressions over the same
atoms are the same axis exactly if their normal forms are equal.

No parameter value and no tensor is read here, only sizes: ints, or sympy expressions for dynamic dims (`sizes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any, TypeAlias

from .sizes import Size as Size
from .sizes import as_size as as_size
from .sizes import in_words as in_words
from .sizes import quotient as quotient

Expr: TypeAlias = "Atom | Product | Segments"


class Mismatch(Exception):
    """Axes that cannot be the same, or an axis that cannot be divided as asked. The solver turns it into a refusal."""


@dataclass(frozen=True, eq=False, slots=True)
class Atom:
    """A named extent, the unit that a selection acts on. Compared by identity."""

    serial: int
    size: Size

    def __repr__(self) -> str:
        return f"a{self.serial}:{self.size}"


@dataclass(frozen=True, slots=True)
class Product:
    """Row-major flattening of `factors`, the last one running fastest."""

    factors: tuple[Expr, ...]
    atoms: tuple[Atom, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "atoms", tuple(chain.from_iterable(map(atoms_of, self.factors))))

    def __repr__(self) -> str:
        return f"({' '.join(map(repr, self.factors))})"


@dataclass(frozen=True, slots=True)
class Segments:
    """Concatenation of `parts`."""

    parts: tuple[Expr, ...]
    atoms: tuple[Atom, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "atoms", tuple(chain.from_iterable(map(atoms_of, self.parts))))

    def __repr__(self) -> str:
        return f"[{' | '.join(map(repr, self.parts))}]"


def atoms_of(expr: Expr) -> tuple[Atom, ...]:
    """Return the atoms of `expr` from left to right, each as often as it occurs."""
    return (expr,) if isinstance(expr, Atom) else expr.atoms


UNIT = Product(())
EMPTY = Segments(())


def size_of(expr: Expr) -> Size:
    """Return the number of entries along `expr`."""
    match expr:
        case Atom():
            return expr.size
        case Product():
            size: Size = 1
            for factor in expr.factors:
                size = size * size_of(factor)
            return size if type(size) is int else as_size(size)
        case Segments():
            return as_size(sum(size_of(part) for part in expr.parts))


def sized(expr: Expr, symbols: Mapping[Any, int]) -> Expr:
    """Put numbers in place of the dynamic sizes in `expr`; atoms of a known size stay the same atoms."""
    match expr:
        case Atom():
            size = expr.size if type(expr.size) is int else as_size(expr.size.subs(symbols))
            return expr if size == expr.size else Atom(expr.serial, size)
        case Product():
            return Product(tuple(sized(factor, symbols) for factor in expr.factors))
        case Segments():
            return Segments(tuple(sized(part, symbols) for part in expr.parts))


def product(*factors: Expr) -> Expr:
    """Return the normal form of the row-major flattening of `factors`."""
    flat: list[Expr] = []
    for factor in factors:
        flat.extend(factor.factors if isinstance(factor, Product) else (factor,))
    if not flat:
        return UNIT
    if len(flat) == 1:
        return flat[0]
    for i, factor in enumerate(flat[:-1]):
        if isinstance(factor, Segments):
            inner = segments(*(product(part, *flat[i + 1 :]) for part in factor.parts))
            return product(*flat[:i], inner)
    return Product(tuple(flat))


def segments(*parts: Expr) -> Expr:
    """Return the normal form of the concatenation of `parts`."""
    flat: list[Expr] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, Segments) else (part,))
    return flat[0] if len(flat) == 1 else Segments(tuple(flat))


class Axes:
    """Equalities between the axes of one graph: a substitution from atoms to expressions.

    Equalities are only added. The classes do not depend on the order in which they arrive, because refinement only
    replaces an atom by an expression of the same size.
    """

    def __init__(self) -> None:
        self._bound: dict[Atom, Expr] = {}
        # By identity: (expr, its normal form), until the next atom is bound.
        self._resolved: dict[int, tuple[Expr, Expr]] = {}
        self._serial = 0

    def fresh(self, size: Size) -> Expr:
        """Make a new axis of `size` entries, equal to no other (`UNIT` if it has one entry, `EMPTY` if none)."""
        if type(size) is int and size <= 1:
            return UNIT if size else EMPTY
        self._serial += 1
        return Atom(self._serial, size)

    def resolve(self, expr: Expr) -> Expr:
        """Return `expr` in normal form over atoms that are not refined further."""
        if isinstance(expr, Atom):
            if expr not in self._bound:
                return expr
            # Path compression: chains of substitutions are shortened as they are read.
            self._bound[expr] = resolved = self.resolve(self._bound[expr])
            return resolved
        if id(expr) in self._resolved:
            return self._resolved[id(expr)][1]
        if isinstance(expr, Product):
            resolved = product(*map(self.resolve, expr.factors))
        else:
            resolved = segments(*map(self.resolve, expr.parts))
        self._resolved[id(expr)] = expr, resolved
        self._resolved[id(resolved)] = resolved, resolved
        return resolved

    def unify(self, a: Expr, b: Expr) -> None:
        """Record that `a` and `b` are the same axis, entry by entry.

        Raises:
            Mismatch: the sizes differ or the boundaries inside them do not nest. Equalities recorded before that stay;
                they do no harm, since callers pin both axes.
        """
        a, b = self.resolve(a), self.resolve(b)
        if a == b:
            return
        if size_of(a) != size_of(b):
            raise Mismatch(f"an axis of {in_words(size_of(a))} meets one of {in_words(size_of(b))}")
        match a, b:
            case Atom(), Atom():
                # The older atom stays, so that printed atoms do not depend on the order of facts.
                old, new = sorted((a, b), key=lambda atom: atom.serial)
                self._bind(new, old)
            case Atom(), _:
                self._bind(a, b)
            case _, Atom():
                self._bind(b, a)
            case Product(), Product():
                self._unify_products(a, b)
            case _:
                self._unify_segments(a, b)

    def split(self, expr: Expr, inner: Size) -> tuple[Expr, Expr]:
        """Refine `expr` to `outer * inner`, where the inner axis has `inner` entries and runs fastest.

        Raises:
            Mismatch: `inner` does not divide the axis, or falls across a boundary inside it.
        """
        expr = self.resolve(expr)
        outer = quotient(size_of(expr), inner)
        if outer is None:
            raise Mismatch(f"an axis of {in_words(size_of(expr))} does not split into rows of {in_words(inner)}")
        if outer == 1:
            return UNIT, expr
        if inner == 1:
            return expr, UNIT
        match expr:
            case Atom():
                pair = self.fresh(outer), self.fresh(inner)
                self._bind(expr, product(*pair))
                return pair
            case Product():
                factors = list(expr.factors)
                taken = self._take(factors, inner)
                return product(*factors), taken
            case Segments():
                outers, inners = zip(*(self.split(part, inner) for part in expr.parts), strict=True)
                for other in inners[1:]:
                    self.unify(inners[0], other)
                return self.resolve(segments(*outers)), self.resolve(inners[0])

    def cut(self, expr: Expr, sizes: Sequence[Size]) -> list[Expr]:
        """Refine `expr` to consecutive pieces of `sizes` entries.

        Raises:
            Mismatch: the sizes do not add up, or a boundary falls inside a row of a product.
        """
        expr = self.resolve(expr)
        if as_size(sum(sizes)) != size_of(expr):
            raise Mismatch(f"pieces of {in_words(sizes)} do not fill an axis of {in_words(size_of(expr))}")
        if any(type(size) is int and size <= 0 for size in sizes):
            raise Mismatch(f"an empty piece among {in_words(sizes)}")
        if len(sizes) == 1:
            return [expr]
        match expr:
            case Atom():
                pieces = [self.fresh(size) for size in sizes]
                self._bind(expr, segments(*pieces))
                return pieces
            case Product(()):
                raise Mismatch(f"pieces of {in_words(sizes)} in a single entry")
            case Product():
                outer, rows = expr.factors[0], product(*expr.factors[1:])
                counts = [quotient(size, size_of(rows)) for size in sizes]
                if any(count is None for count in counts):
                    raise Mismatch(f"a cut into {in_words(sizes)} falls inside rows of {in_words(size_of(rows))}")
                # Cutting may refine atoms that also occur in the rows, so they are resolved again afterwards.
                pieces = self.cut(outer, counts)
                return [self.resolve(product(piece, rows)) for piece in pieces]
            case Segments():
                return self._cut_segments(expr, sizes)

    def regroup(self, exprs: Sequence[Expr], sizes: Sequence[Size]) -> list[Expr]:
        """Group the entries of several axes, in the same order, into dims of `sizes`, as a view does.

        Raises:
            Mismatch: the old and the new boundaries do not nest.
        """
        factors: list[Expr] = []
        for expr in map(self.resolve, exprs):
            factors.extend(expr.factors if isinstance(expr, Product) else (expr,))
        grouped = [self._take(factors, size) for size in reversed(sizes)]
        if factors:
            raise Mismatch(f"a view to {in_words(sizes)} leaves {in_words([*map(size_of, factors)])} over")
        return [self.resolve(expr) for expr in reversed(grouped)]

    def _bind(self, atom: Atom, expr: Expr) -> None:
        if atom in atoms_of(expr):
            raise Mismatch(f"an axis of {in_words(atom.size)} would contain itself in one of {in_words(size_of(expr))}")
        self._bound[atom] = expr
        self._resolved.clear()

    def _take(self, factors: list[Expr], size: Size) -> Expr:
        """Remove the fastest-running `size` entries from the row-major `factors` and return them as one axis."""
        taken: list[Expr] = []
        while not (type(size) is int and size == 1):
            if not factors:
                raise Mismatch(f"nothing is left to take {in_words(size)} entries from")
            factor = self.resolve(factors.pop())
            if isinstance(factor, Product):
                factors.extend(factor.factors)
                continue
            extent = size_of(factor)
            rest = quotient(size, extent)
            if rest is None:
                if quotient(extent, size) is None:
                    raise Mismatch(f"boundaries of {in_words(extent)} and {in_words(size)} do not nest")
                outer, factor = self.split(factor, size)
                factors.append(outer)
                rest = 1
            taken.append(factor)
            size = rest
        return product(*reversed(taken))

    def _unify_products(self, a: Product, b: Product) -> None:
        left, right = list(a.factors), list(b.factors)
        while left or right:
            if not (left and right):
                raise Mismatch(f"axes of {in_words(size_of(a))} and {in_words(size_of(b))} do not line up")
            # Unifying one pair may refine the factors still to come, so each is resolved when its turn comes.
            f, g = self.resolve(left.pop()), self.resolve(right.pop())
            if isinstance(f, Product) or isinstance(g, Product):
                left.extend(f.factors if isinstance(f, Product) else (f,))
                right.extend(g.factors if isinstance(g, Product) else (g,))
                continue
            if size_of(f) != size_of(g):
                if quotient(size_of(f), size_of(g)) is not None:
                    outer, f = self.split(f, size_of(g))
                    left.append(outer)
                elif quotient(size_of(g), size_of(f)) is not None:
                    outer, g = self.split(g, size_of(f))
                    right.append(outer)
                else:
                    raise Mismatch(f"boundaries of {in_words(size_of(f))} and {in_words(size_of(g))} do not nest")
            self.unify(f, g)

    def _unify_segments(self, a: Expr, b: Expr) -> None:
        sizes = _common_sizes(_part_sizes(a), _part_sizes(b))
        for piece, other in zip(self.cut(a, sizes), self.cut(b, sizes), strict=True):
            self.unify(piece, other)

    def _cut_segments(self, expr: Segments, sizes: Sequence[Size]) -> list[Expr]:
        pieces: list[list[Expr]] = [[] for _ in sizes]
        parts = list(reversed(expr.parts))
        for piece, wanted in zip(pieces, sizes, strict=True):
            while not (type(wanted) is int and wanted == 0):
                part = parts.pop()
                size = size_of(part)
                rest = as_size(wanted - size)
                if type(rest) is not int:
                    raise Mismatch(f"cannot compare a piece of {in_words(wanted)} with a part of {in_words(size)}")
                if rest < 0:
                    part, other = self.cut(part, [wanted, as_size(size - wanted)])
                    parts.append(other)
                    rest = 0
                piece.append(part)
                wanted = rest
        return [self.resolve(segments(*piece)) for piece in pieces]


def _part_sizes(expr: Expr) -> list[Size]:
    return [size_of(part) for part in expr.parts] if isinstance(expr, Segments) else [size_of(expr)]


def _common_sizes(a: list[Size], b: list[Size]) -> list[Size]:
    """Return the sizes of the pieces between all boundaries of two concatenations of one length."""
    if a == b:
        return a
    if len(a) == 1 or len(b) == 1:
        return a if len(b) == 1 else b
    if not all(type(size) is int for size in (*a, *b)):
        raise Mismatch(f"cannot order the boundaries of {in_words(a)} and {in_words(b)}")
    ends = sorted({*accumulate(a), *accumulate(b)})
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
