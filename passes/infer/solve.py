"""Solver: it applies the relation that a rule gives to the axes of one op. Nothing else reads relations."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

from torch import fx

from ecospa_fx.passes.axes.algebra import (
    EMPTY,
    UNIT,
    Expr,
    Mismatch,
    Size,
    as_size,
    in_words,
    product,
    quotient,
    segments,
    size_of,
)
from ecospa_fx.passes.graph.nodes import op_name
from ecospa_fx.passes.ir import relations as r
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Exprs, Fact, Role
from ecospa_fx.passes.ir.patterns import DOTS, ParsedPattern, bind


class Solver:
    """Applies relations to the axes of one graph."""

    def __init__(self, axis_facts: AxisFacts, apart: Collection[fx.Node] = ()) -> None:
        self.axis_facts, self.axes, self.apart = axis_facts, axis_facts.axes, apart

    def opaque(self, node: fx.Node, operands: tuple[r.Operand, ...], shapes: list[Any], reason: str) -> None:
        """Pin everything that goes into `node` and comes out of it."""
        for operand in operands:
            for expr in operand.exprs:
                self.axis_facts.pin(expr, node, reason)
        outputs = tuple(tuple(self.axes.fresh(size) for size in shape) for shape in shapes)
        for expr in (expr for exprs in outputs for expr in exprs):
            self.axis_facts.pin(expr, node, reason)
        self.axis_facts.values[node] = outputs

    def _pin(self, expr: Expr, node: fx.Node, why: str) -> None:
        self.axis_facts.pin(expr, node, f"{op_name(node)}: {why[:1].lower()}{why[1:]}")

    def _reduce(self, expr: Expr, node: fx.Node, operands: tuple[r.Operand, ...]) -> None:
        """Record that an op takes all that is left of an axis."""
        self.axis_facts.facts.append(Fact("reduced", expr, node, operands=operands))
        self.axis_facts.facts.append(Fact("nonlinear", expr, node))

    def solve(
        self, relation: r.Relation, node: fx.Node, operands: tuple[r.Operand, ...], shapes: list[Any], why: str
    ) -> list[Exprs]:
        """Record what `relation` says about the axes of the operands of `node`, and return those of its outputs."""
        axes, shape = self.axes, shapes[0]
        match relation:
            case r.Pattern():
                return self._pattern(relation, node, shapes, why)
            case r.Pointwise():
                exprs = self._pointwise(relation, node, shape)
                return [exprs for _ in shapes]
            case r.Regrouped(x, like):
                exprs = self._regrouped(x, shape, node)
                for a, b in zip(exprs, like.exprs if like else (), strict=like is not None):
                    axes.unify(a, b)
                return [exprs]
            case r.Permuted(x, order):
                return [tuple(x.exprs[i] for i in order)]
            case r.SameDims(x, pinned, absent, dropped, keepdim, apart):
                if relation.positions is not None and len({*pinned, *absent}) > 1 and _uses(node, relation.positions):
                    pinned, absent = (*pinned, *absent), ()
                    why = "Its result holds positions along several axes at once"
                if relation.running is not None:
                    self.axis_facts.facts.append(Fact("contracted", x.exprs[relation.running], node, operands=(x,)))
                    self.axis_facts.facts.append(Fact("nonlinear", x.exprs[relation.running], node))
                for i in pinned:
                    self._pin(x.exprs[i], node, why)
                for i in absent:
                    self._reduce(x.exprs[i], node, (x,))
                for i in set(dropped) - {*pinned, *absent}:
                    self.axis_facts.facts.append(Fact("contracted", x.exprs[i], node, operands=(x,)))
                    if apart:
                        self.axis_facts.facts.append(Fact("nonlinear", x.exprs[i], node))
                if keepdim:
                    exprs = tuple(UNIT if i in dropped else expr for i, expr in enumerate(x.exprs))
                else:
                    exprs = tuple(expr for i, expr in enumerate(x.exprs) if i not in dropped)
                return [exprs for _ in shapes]
            case r.Sliced(x, dim):
                return [_replaced(x.exprs, dim, self._sliced(relation, node, shape[dim], why))]
            case r.Parted(x, dim):
                return [_replaced(x.exprs, dim, piece) for piece in self._parted(relation, node)]
            case r.Picked(x, dim, index):
                self._pin(x.exprs[dim], node, why)
                rest = x.exprs[:dim] + x.exprs[dim + 1 :]
                return [rest] * (len(shapes) if index is None else 1)
            case r.Halved(x, dim):
                return [_replaced(x.exprs, dim, self._halved(x, dim, node))]
            case r.Joined(xs, dim):
                # torch lets one concatenate empty 1-d tensors with any others; they carry nothing.
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
                self._choose(x.exprs[dim], index, node, (x,), why)
                if not x.parameters or x.ndim < 3:  # a picked matrix is multiplied only later
                    self._free(x.exprs[dim + 1 :] + x.exprs[:dim], node, x)
                return [(*x.exprs[:dim], *index.exprs, *x.exprs[dim + 1 :])]
            case r.Created():
                return [tuple(axes.fresh(size) for size in shape) for shape in shapes]
            case r.Probed():
                return self._probed(relation, node, shapes, why)
            case r.Opaque(xs):
                self.opaque(node, xs, shapes, f"{op_name(node)}: {why[:1].lower()}{why[1:]}")
                return list(self.axis_facts.values[node])

    def _probed(self, relation: r.Probed, node: fx.Node, shapes: list[Any], why: str) -> list[Exprs]:
        axis_of: dict[int, Expr] = {}
        for x, numbers in zip(relation.operands, relation.axes, strict=True):
            for expr, number in zip(x.exprs, numbers, strict=True):
                self.axes.unify(axis_of.setdefault(number, expr), expr)
        passing = {number for output in relation.outputs for number in output}
        for number, expr in axis_of.items():
            if number in passing:
                self.axis_facts.facts.append(Fact("nonlinear", expr, node))
            else:
                self._pin(expr, node, why)
        results = []
        for output, shape in zip(relation.outputs, shapes, strict=True):
            exprs = [
                self.axes.fresh(size) if axis is None else axis_of[axis]
                for axis, size in zip(output, shape, strict=True)
            ]
            for axis, expr in zip(output, exprs, strict=True):
                if axis is None:
                    self._pin(expr, node, why)
            results.append(tuple(exprs))
        return results

    def _meet(self, a: Expr, b: Expr, node: fx.Node) -> None:
        """Unify two axes. Where they cannot be one, pin both: the op is right while both stay whole."""
        try:
            self.axes.unify(a, b)
        except Mismatch as mismatch:
            for expr in (a, b):
                self.axis_facts.pin(expr, node, f"{op_name(node)}: {mismatch}")

    def _parted(self, relation: r.Parted, node: fx.Node) -> list[Expr]:
        expr = relation.x.exprs[relation.dim]
        try:
            return self.axes.cut(expr, relation.sizes)
        except Mismatch as mismatch:
            pieces = [self.axes.fresh(size) for size in relation.sizes]
            for each in (expr, *pieces):
                self.axis_facts.pin(each, node, f"{op_name(node)}: {mismatch}")
            return pieces

    def _regrouped(self, x: r.Operand, shape: tuple[Size, ...], node: fx.Node) -> Exprs:
        """Group the axes of `x` anew; where boundaries do not nest, pin all but equal dims at the ends."""
        try:
            return tuple(self.axes.regroup(x.exprs, shape))
        except Mismatch as mismatch:
            first = _equal(x.shape, shape)
            last = min(_equal(x.shape[::-1], shape[::-1]), x.ndim - first, len(shape) - first)
            middle = tuple(self.axes.fresh(size) for size in shape[first : len(shape) - last])
            for expr in (*x.exprs[first : x.ndim - last], *middle):
                self.axis_facts.pin(expr, node, f"{op_name(node)}: {mismatch}")
            return (*x.exprs[:first], *middle, *x.exprs[x.ndim - last :])

    def _free(self, exprs: Exprs, node: fx.Node, x: r.Operand) -> None:
        for expr in exprs:
            self.axis_facts.facts.append(Fact("free", expr, node, operands=(x,)))

    def _halved(self, x: r.Operand, dim: int, node: fx.Node) -> Expr:
        size = x.shape[dim]
        if type(size) is not int:
            half = self.axes.fresh(as_size(size / 2))
            for expr in (x.exprs[dim], half):
                self.axis_facts.pin(expr, node, f"{op_name(node)}: it is halved, and its size is dynamic")
            return half
        first, second = self.axes.cut(x.exprs[dim], [size // 2, size // 2])
        self.axes.unify(first, second)
        first = self.axes.resolve(first)
        self.axis_facts.facts.append(Fact("nonlinear", first, node))
        self.axis_facts.facts.append(Fact("gate", first, node, operands=(x,)))
        return first

    def _sliced(self, relation: r.Sliced, node: fx.Node, left: Size, why: str) -> Expr:
        """Return the axis of a slice of `left` entries; an axis that cannot be cut so is pinned, as is the slice."""
        try:
            return self._cut_out(relation, node, why)
        except Mismatch as mismatch:
            piece = self.axes.fresh(left)
            for expr in (relation.x.exprs[relation.dim], piece):
                self.axis_facts.pin(expr, node, f"{op_name(node)}: {mismatch}")
            return piece

    def _cut_out(self, relation: r.Sliced, node: fx.Node, why: str) -> Expr:
        x, (start, stop, step) = relation.x, (relation.start, relation.stop, relation.step)
        expr = x.exprs[relation.dim]
        size = x.shape[relation.dim]
        if step != 1:
            # A strided slice of the whole axis picks one entry of each row of `step`.
            if not (type(start) is int and start < step and stop == size):
                raise Mismatch(f"one entry in {step} is taken, of a part of the axis")
            if type(size) is not int and quotient(size, step) is None:
                raise Mismatch(f"one entry in {step} is taken, of an axis of dynamic size")
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
                self.axis_facts.facts.append(Fact("expanded", exprs[-1], node, operands=(x,)))
        return tuple(exprs)

    def _repeated(self, relation: r.Repeated, node: fx.Node) -> Exprs:
        x, times = relation.x, relation.times
        exprs = (*(UNIT for _ in range(len(times) - x.ndim)), *x.exprs)
        copies = tuple(self.axes.fresh(n) for n in times)
        self.axis_facts.made[node] = copies
        for copy in copies:
            self.axis_facts.facts.append(Fact("expanded", copy, node, operands=(x,)))
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
        """Record what a pointwise op does to an axis that the operands `here` have."""
        activations = [x for x in here if x.weighted and not x.parameters]
        meeting = tuple(activations) if len({x.node for x in activations}) > 1 else ()
        scaled = relation.how in ("product", "quotient") and len(here) > 1
        if relation.how == "nonlinear" or scaled:
            self.axis_facts.facts.append(Fact("nonlinear", expr, node))
        if meeting:
            role: Role = "merge" if relation.how in ("linear", "affine") else "gate"
            self.axis_facts.facts.append(Fact(role, expr, node, operands=meeting))

    def _pattern(self, relation: r.Pattern, node: fx.Node, shapes: Sequence[tuple[Size, ...]], why: str) -> list[Exprs]:
        pattern = bind(relation.spec, len(relation.operands), tuple(relation.sizes))
        terms, outputs = pattern.operands, pattern.outputs
        if len(outputs) == 1:
            outputs *= len(shapes)
        elif len(outputs) != len(shapes):
            raise Mismatch(f"the rule names {len(outputs)} outputs of {len(shapes)}")
        axis_of: dict[str, Expr] = {name: self.axes.fresh(size) for name, size in relation.sizes.items()}
        carriers: dict[str, list[r.Operand]] = {}  # the operands, but added ones, that have a name

        def meet(name: str, expr: Expr) -> None:
            if name not in axis_of or axis_of[name] == UNIT:
                axis_of[name] = expr
            elif expr != UNIT and (node not in self.apart or name in pattern.kept or name[0] == DOTS):
                self._meet(axis_of[name], expr, node)

        dims = [
            (term, operand, key, expr)
            for term, operand in zip(terms, relation.operands, strict=True)
            for key, expr in zip(term.keys_of(operand.shape), operand.exprs, strict=True)
        ]
        for term, operand, key, expr in dims:
            for name in key if isinstance(key, tuple) else (key,):
                if not term.added:
                    carriers.setdefault(name, []).append(operand)
            if not isinstance(key, tuple):
                meet(key, expr)
        # Groups come second: single dims of other operands may tell the axes of their names.
        for _, _, key, expr in dims:
            if isinstance(key, tuple) and expr != UNIT:
                self._meet_product(key, expr, axis_of, node)
        for _, _, key, expr in dims:
            if isinstance(key, tuple) and expr == UNIT:
                for name in key:
                    axis_of.setdefault(name, UNIT)  # one entry is one of each, unless others say more
        results = []
        for term, shape in zip(outputs, shapes, strict=True):
            exprs: list[Expr] = []
            for key, size in zip(term.keys_of(shape), shape, strict=True):
                if size == 1 and shape != shapes[0]:
                    exprs.append(UNIT)  # statistics come beside some results, with one entry along what they are of
                elif isinstance(key, tuple):
                    exprs.append(product(*(axis_of[name] for name in key)))
                else:
                    exprs.append(axis_of.setdefault(key, self.axes.fresh(size)))
            results.append(tuple(exprs))
        for name in pattern.pinned:
            if name in axis_of:
                self._pin(axis_of[name], node, why)
        for name, by in relation.chosen.items():
            along = any(operand.node is by.node and key == name for _, operand, key, _ in dims)
            if not (along and by.counted):  # numbers of entries along the axis itself need no places
                self._choose(axis_of[name], by, node, tuple(carriers.get(name, ())), why)
            else:
                self._note_chosen(axis_of[name], node, tuple(carriers.get(name, ())))
        for name in pattern.absent:
            self._reduce(axis_of[name], node, tuple(carriers.get(name, ())))
        if relation.least is not None:
            name, number = relation.least
            self.axis_facts.least.append((axis_of[name], number, node))
        for term, operand, key, expr in dims:
            # One entry meets many: the operand repeats along that axis, as after `expand`.
            if not (term.added or isinstance(key, tuple)) and expr == UNIT and axis_of[key] != UNIT:
                self.axis_facts.facts.append(Fact("expanded", axis_of[key], node, operands=(operand,)))
        meeting = {name: xs for name, xs in carriers.items() if name not in relation.chosen or name in pattern.kept}
        self._pattern_facts(node, pattern, axis_of, meeting, sum(not term.added for term in terms))
        if relation.apart:
            for name in carriers:
                if name in pattern.kept:
                    self.axis_facts.facts.append(Fact("nonlinear", axis_of[name], node))
        return results

    def _choose(self, expr: Expr, by: r.Operand, node: fx.Node, carriers: tuple[r.Operand, ...], why: str) -> None:
        """Record that the values of an operand choose entries of an axis; pin it where they are no places."""
        size = size_of(expr)
        if by.places is None or type(size) is not int or type(size_of(by.places)) is not int:
            self._pin(expr, node, why)
            if by.places is not None:
                self._pin(by.places, node, why)
            return
        more = size - size_of(by.places)  # entries beyond all places are never chosen
        self._meet(expr, segments(by.places, self.axes.fresh(more)) if more > 0 else by.places, node)
        self._note_chosen(expr, node, carriers)

    def _note_chosen(self, expr: Expr, node: fx.Node, carriers: tuple[r.Operand, ...]) -> None:
        self.axis_facts.facts.append(Fact("chosen", expr, node, operands=carriers))
        self.axis_facts.facts.append(Fact("nonlinear", expr, node))

    def _meet_product(self, names: tuple[str, ...], expr: Expr, axis_of: dict[str, Expr], node: fx.Node) -> None:
        """Unify a dim with a product of named axes, all of which but one have axes already."""
        rest = size_of(expr)
        for name in names:
            if name in axis_of:
                rest = _exactly(rest, size_of(axis_of[name]))
        for name in names:
            if name not in axis_of:
                axis_of[name] = self.axes.fresh(rest)
                rest = 1
        self._meet(product(*(axis_of[name] for name in names)), expr, node)

    def _pattern_facts(
        self,
        node: fx.Node,
        pattern: ParsedPattern,
        axis_of: dict[str, Expr],
        carriers: dict[str, list[r.Operand]],
        factors: int,
    ) -> None:
        """Record for each name whether it is contracted, shared by all factors of the product, or free."""
        for name, operands in carriers.items():
            if name not in pattern.kept and not (name[0] == DOTS and DOTS in pattern.kept):
                if name in pattern.absent:
                    continue
                role: Role = "contracted"
            else:
                role = "batch" if len(set(operands)) == factors else "free"
            self.axis_facts.facts.append(Fact(role, axis_of[name], node, operands=tuple(operands)))


def _uses(node: fx.Node, output: int) -> bool:
    """Return whether anything uses one output of an op."""
    return any(user.target is not operator.getitem or user.args[1] == output for user in node.users)


def _replaced(exprs: Exprs, dim: int, expr: Expr) -> Exprs:
    return (*exprs[:dim], expr, *exprs[dim + 1 :])


def _equal(shape: tuple[Size, ...], other: tuple[Size, ...]) -> int:
    """Return the number of first dims in which two shapes agree."""
    return next((i for i, (a, b) in enumerate(zip(shape, other, strict=False)) if a != b), min(len(shape), len(other)))


def _exactly(size: Size, divisor: Size) -> Size:
    result = quotient(size, divisor)
    if result is None:
        raise Mismatch(f"an axis of {in_words(size)} is not a multiple of {in_words(divisor)}")
    return result
