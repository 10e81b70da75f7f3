"""Solve: what a relation says about the axes of one op, carried out. The one reader of the rules' vocabulary."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx

from ecospa_fx.passes.axes.algebra import (
    EMPTY,
    UNIT,
    Expr,
    Mismatch,
    Size,
    as_size,
    product,
    quotient,
    segments,
    size_of,
)
from ecospa_fx.passes.graph.nodes import op_name
from ecospa_fx.passes.ir import relations as r
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Exprs, Fact, Role


class Solver:
    """Carries out relations on the axes of one inference."""

    def __init__(self, known: AxisFacts, apart: Collection[fx.Node] = ()) -> None:
        self.known, self.axes, self.apart = known, known.axes, apart

    def opaque(self, node: fx.Node, operands: tuple[r.Operand, ...], shapes: list[Any], reason: str) -> None:
        """Pin everything that goes into `node` and comes out of it."""
        for operand in operands:
            for expr in operand.exprs:
                self.known.pin(expr, node, reason)
        outputs = tuple(tuple(self.axes.fresh(size) for size in shape) for shape in shapes)
        for expr in (expr for exprs in outputs for expr in exprs):
            self.known.pin(expr, node, reason)
        self.known.values[node] = outputs

    def _pin(self, expr: Expr, node: fx.Node, why: str) -> None:
        self.known.pin(expr, node, f"{op_name(node)}: {why[:1].lower()}{why[1:]}")

    def solve(
        self, relation: r.Relation, node: fx.Node, operands: tuple[r.Operand, ...], shapes: list[Any], why: str
    ) -> list[Exprs]:
        """The axes of the outputs of `node`, after recording what `relation` says about those of its operands."""
        axes, shape = self.axes, shapes[0]
        match relation:
            case r.Pattern():
                made = self._pattern(relation, node, shape, why)
                # Statistics come beside some results, with one entry along what they are taken over.
                return [
                    tuple(UNIT if size == 1 else expr for expr, size in zip(made, each, strict=False))
                    if len(each) == len(made) and each != shape
                    else made
                    for each in shapes
                ]
            case r.Pointwise():
                made = self._pointwise(relation, node, shape)
                return [made for _ in shapes]
            case r.Regrouped(x, like):
                exprs = tuple(axes.regroup(x.exprs, shape))
                for a, b in zip(exprs, like.exprs if like else (), strict=like is not None):
                    axes.unify(a, b)
                return [exprs]
            case r.Permuted(x, order):
                return [tuple(x.exprs[i] for i in order)]
            case r.SameDims(x, pinned, dropped, keepdim, apart):
                for i in pinned:
                    self._pin(x.exprs[i], node, why)
                for i in set(dropped) - set(pinned):
                    self.known.facts.append(Fact("contracted", x.exprs[i], node, operands=(x,)))
                    if apart:
                        self.known.facts.append(Fact("nonlinear", x.exprs[i], node))
                if keepdim:
                    exprs = tuple(UNIT if i in dropped else expr for i, expr in enumerate(x.exprs))
                else:
                    exprs = tuple(expr for i, expr in enumerate(x.exprs) if i not in dropped)
                return [exprs for _ in shapes]
            case r.Sliced(x, dim):
                return [_replaced(x.exprs, dim, self._sliced(relation, node, why))]
            case r.Parted(x, dim):
                return [_replaced(x.exprs, dim, piece) for piece in self._parted(relation, node)]
            case r.Picked(x, dim, index):
                self._pin(x.exprs[dim], node, why)
                rest = x.exprs[:dim] + x.exprs[dim + 1 :]
                return [rest] * (len(shapes) if index is None else 1)
            case r.Halved(x, dim):
                return [_replaced(x.exprs, dim, self._halved(x, dim, node))]
            case r.Joined(xs, dim):
                # The empty 1-d tensors that torch lets one concatenate carry nothing.
                xs = tuple(x for x in xs if x.ndim == len(shape))
                for i in range(len(shape)):
                    for other in xs[1:]:
                        if i != dim:
                            self._meet(xs[0].exprs[i], other.exprs[i], node)
                return [_replaced(xs[0].exprs, dim, segments(*(x.exprs[dim] for x in xs)))]
            case r.Stacked(xs, dim):
                for other in xs[1:]:
                    for a, b in zip(xs[0].exprs, other.exprs, strict=True):
                        self._meet(a, b, node)
                new = axes.fresh(len(xs))
                self._pin(new, node, why)
                return [(*xs[0].exprs[:dim], new, *xs[0].exprs[dim:])]
            case r.Expanded(x, like):
                if like is not None:
                    return [self._pointwise(r.Pointwise((x, like), "linear"), node, shape)]
                return [self._expanded(x, node, shape)]
            case r.Repeated():
                return [self._repeated(relation, node)]
            case r.Indexed(x, dim, index):
                self._pin(x.exprs[dim], node, why)
                if x.parameter is None or x.ndim < 3:  # a matrix that is picked meets something only later
                    self._free(x.exprs[dim + 1 :] + x.exprs[:dim], node, x)
                return [(*x.exprs[:dim], *index.exprs, *x.exprs[dim + 1 :])]
            case r.Created():
                return [tuple(axes.fresh(size) for size in shape) for shape in shapes]
            case r.Probed():
                return self._tried(relation, node, shapes, why)
            case r.Opaque(xs):
                self.opaque(node, xs, shapes, f"{op_name(node)}: {why[:1].lower()}{why[1:]}")
                return list(self.known.values[node])

    def _tried(self, relation: r.Probed, node: fx.Node, shapes: list[Any], why: str) -> list[Exprs]:
        known: dict[int, Expr] = {}
        for x, numbers in zip(relation.operands, relation.axes, strict=True):
            for expr, number in zip(x.exprs, numbers, strict=True):
                self.axes.unify(known.setdefault(number, expr), expr)
        carried = {number for output in relation.outputs for number in output}
        for number, expr in known.items():
            if number in carried:
                self.known.facts.append(Fact("nonlinear", expr, node))
            else:
                self._pin(expr, node, why)
        results = []
        for output, shape in zip(relation.outputs, shapes, strict=True):
            exprs = [
                self.axes.fresh(size) if axis is None else known[axis] for axis, size in zip(output, shape, strict=True)
            ]
            for axis, expr in zip(output, exprs, strict=True):
                if axis is None:
                    self._pin(expr, node, why)
            results.append(tuple(exprs))
        return results

    def _meet(self, a: Expr, b: Expr, node: fx.Node) -> None:
        """Unify two axes; where that cannot be, the op is right as long as both stay whole, and the others go on."""
        try:
            self.axes.unify(a, b)
        except Mismatch as mismatch:
            for expr in (a, b):
                self.known.pin(expr, node, f"{op_name(node)}: {mismatch}")

    def _parted(self, relation: r.Parted, node: fx.Node) -> list[Expr]:
        expr = relation.x.exprs[relation.dim]
        try:
            return self.axes.cut(expr, relation.sizes)
        except Mismatch as mismatch:
            pieces = [self.axes.fresh(size) for size in relation.sizes]
            for each in (expr, *pieces):
                self.known.pin(each, node, f"{op_name(node)}: {mismatch}")
            return pieces

    def _free(self, exprs: Exprs, node: fx.Node, x: r.Operand) -> None:
        for expr in exprs:
            self.known.facts.append(Fact("free", expr, node, operands=(x,)))

    def _halved(self, x: r.Operand, dim: int, node: fx.Node) -> Expr:
        size = x.shape[dim]
        if type(size) is not int:
            raise Mismatch(f"halves of an axis of {size}")
        first, second = self.axes.cut(x.exprs[dim], [size // 2, size // 2])
        self.axes.unify(first, second)
        first = self.axes.resolve(first)
        self.known.facts.append(Fact("nonlinear", first, node))
        self.known.facts.append(Fact("gate", first, node, operands=(x,)))
        return first

    def _sliced(self, relation: r.Sliced, node: fx.Node, why: str) -> Expr:
        x, (start, stop, step) = relation.x, (relation.start, relation.stop, relation.step)
        expr = x.exprs[relation.dim]
        size = x.shape[relation.dim]
        if step != 1:
            # A strided slice of the whole axis picks one entry of each row of `step`.
            if not (type(start) is int and start < step and stop == size):
                raise Mismatch(f"a slice {start}:{stop}:{step} of {size} entries")
            rows, column = self.axes.split(expr, step)
            self._pin(column, node, why)
            return rows
        if start == 0 and stop == size:
            return expr
        if start == stop:
            return EMPTY
        sizes = [start, as_size(stop - start), as_size(size - stop)]
        pieces = iter(self.axes.cut(expr, [s for s in sizes if s != 0]))
        if start != 0:
            next(pieces)
        return next(pieces)

    def _expanded(self, x: r.Operand, node: fx.Node, shape: tuple[Size, ...]) -> Exprs:
        new = len(shape) - x.ndim
        exprs = []
        for i, size in enumerate(shape):
            if i >= new and x.shape[i - new] == size:
                exprs.append(x.exprs[i - new])
            else:
                exprs.append(self.axes.fresh(size))
                self.known.facts.append(Fact("expanded", exprs[-1], node, operands=(x,)))
        return tuple(exprs)

    def _repeated(self, relation: r.Repeated, node: fx.Node) -> Exprs:
        x, times = relation.x, relation.times
        exprs = (*(UNIT for _ in range(len(times) - x.ndim)), *x.exprs)
        copies = tuple(self.axes.fresh(n) for n in times)
        self.known.made[node] = copies
        for copy in copies:
            self.known.facts.append(Fact("expanded", copy, node, operands=(x,)))
        if relation.interleaved:
            return tuple(product(expr, copy) for expr, copy in zip(exprs, copies, strict=True))
        return tuple(product(copy, expr) for expr, copy in zip(exprs, copies, strict=True))

    def _pointwise(self, relation: r.Pointwise, node: fx.Node, shape: tuple[Size, ...]) -> Exprs:
        exprs: list[Expr] = []
        for place in range(-len(shape), 0):
            here = [x for x in relation.operands if -place <= x.ndim and x.exprs[place] != UNIT]
            if not here:
                exprs.append(self.axes.fresh(shape[place]))
                continue
            expr = here[0].exprs[place]
            exprs.append(expr)
            for other in here[1:]:
                self._meet(expr, other.exprs[place], node)
            self._pointwise_facts(relation, node, expr, here)
        return tuple(exprs)

    def _pointwise_facts(self, relation: r.Pointwise, node: fx.Node, expr: Expr, here: list[r.Operand]) -> None:
        activations = [x for x in here if x.weighted and x.parameter is None]
        meeting = tuple(activations) if len({x.node for x in activations}) > 1 else ()
        scaled = relation.how in ("product", "quotient") and len(here) > 1
        if relation.how == "nonlinear" or scaled:
            self.known.facts.append(Fact("nonlinear", expr, node))
        if meeting:
            role: Role = "merge" if relation.how in ("linear", "affine") else "gate"
            self.known.facts.append(Fact(role, expr, node, operands=meeting))

    def _pattern(self, relation: r.Pattern, node: fx.Node, shape: tuple[Size, ...], why: str) -> Exprs:
        *terms, out = parse_pattern(relation.spec, len(relation.operands))
        letters: dict[str, Expr] = {letter: self.axes.fresh(size) for letter, size in relation.sizes.items()}
        held: dict[str, list[r.Operand]] = {}

        def meet(letter: str, expr: Expr) -> None:
            if letter not in letters or letters[letter] == UNIT:
                letters[letter] = expr
            elif expr != UNIT and (node not in self.apart or letter in out.letters or letter[0] == "."):
                self._meet(letters[letter], expr, node)

        placed = [
            (term, operand, name, expr)
            for term, operand in zip(terms, relation.operands, strict=True)
            for name, expr in zip(term.names(operand.ndim), operand.exprs, strict=True)
        ]
        for term, operand, name, expr in placed:
            for letter in name if isinstance(name, tuple) else (name,):
                if not term.added:
                    held.setdefault(letter, []).append(operand)
            if not isinstance(name, tuple):
                meet(name, expr)
        # Products come second: single dims of other operands may name their letters.
        for _, _, name, expr in placed:
            if isinstance(name, tuple) and expr != UNIT:
                self._meet_product(name, expr, letters, node)
        for _, _, name, expr in placed:
            if isinstance(name, tuple) and expr == UNIT:
                for letter in name:
                    letters.setdefault(letter, UNIT)  # one entry is one of each, unless others say more
        exprs = []
        for name, size in zip(out.names(len(shape)), shape, strict=True):
            if isinstance(name, tuple):
                exprs.append(product(*(letters[letter] for letter in name)))
            else:
                exprs.append(letters.setdefault(name, self.axes.fresh(size)))
        for letter in {letter for term in (*terms, out) for letter in term.pinned}:
            if letter in letters:
                self._pin(letters[letter], node, why)
        for term, operand, name, expr in placed:
            # One entry meets many: the axis is one that this operand repeats along, as `expand` would have made it.
            if not (term.added or isinstance(name, tuple)) and expr == UNIT and letters[name] != UNIT:
                self.known.facts.append(Fact("expanded", letters[name], node, operands=(operand,)))
        self._pattern_facts(node, out, letters, held, sum(not term.added for term in terms))
        if relation.apart:
            for letter in held.keys() & set(out.letters):
                self.known.facts.append(Fact("nonlinear", letters[letter], node))
        return tuple(exprs)

    def _meet_product(self, name: tuple[str, ...], expr: Expr, letters: dict[str, Expr], node: fx.Node) -> None:
        """Unify a dim that is a product of letters, of which all but one may be known already."""
        rest = size_of(expr)
        for letter in name:
            if letter in letters:
                rest = _exactly(rest, size_of(letters[letter]))
        for letter in name:
            if letter not in letters:
                letters[letter] = self.axes.fresh(rest)
                rest = 1
        self._meet(product(*(letters[letter] for letter in name)), expr, node)

    def _pattern_facts(
        self, node: fx.Node, out: _Term, letters: dict[str, Expr], held: dict[str, list[r.Operand]], factors: int
    ) -> None:
        for letter, operands in held.items():
            if letter not in out.letters and not (letter[0] == "." and "." in out.letters):
                role: Role = "contracted"
            else:
                role = "batch" if len(operands) == factors else "free"
            self.known.facts.append(Fact(role, letters[letter], node, operands=tuple(operands)))


def parse_pattern(spec: str, operands: int) -> list[_Term]:
    """The terms of a pattern, one per operand that there is, and that of the output."""
    before, after = spec.split("->")
    return [*(_Term(term) for term in before.split(",")[:operands]), _Term(after)]


class _Term:
    """One operand of a pattern, parsed: `... (h g) s! d`."""

    def __init__(self, text: str) -> None:
        text = text.strip()
        self.added = text.startswith("+")
        tokens = text.lstrip("+").replace("(", " ( ").replace(")", " ) ").split()
        self.pinned = {token.rstrip("!") for token in tokens if token.endswith("!")}
        self.dims: list[str | tuple[str, ...]] = []
        group: list[str] | None = None
        for token in (token.rstrip("!") for token in tokens):
            if token == "(":
                group = []
            elif token == ")":
                self.dims.append(tuple(group or ()))
                group = None
            elif group is not None:
                group.append(token)
            else:
                self.dims.append("." if token == "..." else token)
        self.letters = {letter for dim in self.dims for letter in (dim if isinstance(dim, tuple) else (dim,))}

    def names(self, ndim: int) -> list[str | tuple[str, ...]]:
        """The letter (or product of letters) of each of `ndim` dims; dims under `...` are numbered from the right."""
        if "." not in self.dims:
            if len(self.dims) != ndim:
                raise Mismatch(f"the rule names {len(self.dims)} dims of {ndim}")
            return self.dims
        at = self.dims.index(".")
        hidden = ndim - (len(self.dims) - 1)
        return [*self.dims[:at], *(f".{i}" for i in range(hidden, 0, -1)), *self.dims[at + 1 :]][max(0, -hidden) :]


def _replaced(exprs: Exprs, dim: int, expr: Expr) -> Exprs:
    return (*exprs[:dim], expr, *exprs[dim + 1 :])


def _exactly(size: Size, divisor: Size) -> Size:
    result = quotient(size, divisor)
    if result is None:
        raise Mismatch(f"an axis of {size} is no multiple of {divisor}")
    return result
