"""The axis algebra on its own, against slow obvious twins that write every entry of an axis out.

Facts are drawn from a *truth*: hidden axes over known atoms, for each of which the solver sees a blank variable. What
it infers must obey every fact (checked on masks), must leave the truth possible, and must not depend on the order.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import sympy
import torch
from axis_twins import BATCH, SEQUENCE, check, masks
from hypothesis import assume, given
from hypothesis import strategies as st

from ecospa_fx.passes.axes.algebra import (
    Atom,
    Axes,
    Expr,
    Mismatch,
    as_size,
    atoms_of,
    product,
    quotient,
    segments,
    size_of,
)
from ecospa_fx.passes.axes.selection import mask_of, on_diagonal, project

LARGEST = 60


def shape_of(axes: Axes, exprs: list[Expr]) -> tuple[str, ...]:
    """Resolved expressions with atoms renamed in order of appearance: equal exactly if the classes are."""
    resolved = [axes.resolve(expr) for expr in exprs]
    order = dict.fromkeys(atom.serial for expr in resolved for atom in atoms_of(expr))
    names = {serial: i for i, serial in enumerate(order)}
    return tuple(re.sub(r"a(\d+):", lambda found: f"a{names[int(found[1])]}:", repr(expr)) for expr in resolved)


@dataclass
class Truth:
    """Hidden axes, and facts about them: (kind, left, right), variables that joined as `kind` says are one axis."""

    true: list[Expr] = field(default_factory=list)
    facts: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    source: Axes = field(default_factory=Axes)

    def atom(self, size: Any) -> int:
        return self.add(self.source.fresh(size))

    def add(self, expr: Expr) -> int:
        self.true.append(expr)
        return len(self.true) - 1

    def product(self, *parts: int) -> int:
        new = self.add(product(*(self.true[i] for i in parts)))
        self.facts.append(("product", (new,), parts))
        return new

    def segments(self, *parts: int) -> int:
        new = self.add(segments(*(self.true[i] for i in parts)))
        self.facts.append(("segments", (new,), parts))
        return new

    def copy(self, i: int) -> int:
        new = self.add(self.true[i])
        self.facts.append(("unify", (new,), (i,)))
        return new

    def view(self, left: tuple[int, ...], right: tuple[int, ...]) -> None:
        self.facts.append(("product", left, right))

    def small(self, *sizes: Any) -> bool:
        return bool(sympy.Mul(*sizes).subs({BATCH: 2, SEQUENCE: 2}) <= LARGEST)


@st.composite
def truths(draw: st.DrawFn, symbolic: bool = False) -> Truth:
    """A truth and facts about it. Symbolic sizes take part in products only, as batch and sequence do."""
    truth = Truth()
    for size in draw(st.lists(st.sampled_from([2, 2, 3, 4]), min_size=2, max_size=4)):
        truth.atom(size)
    dynamic = {truth.atom(size) for size in (BATCH, SEQUENCE)} if symbolic else set()
    for _ in range(draw(st.integers(1, 6))):
        how = draw(st.sampled_from(["product", "segments", "copy", "distribute", "regroup", "meet"]))
        static = [i for i in range(len(truth.true)) if i not in dynamic]
        pick = lambda pool: draw(st.sampled_from(pool))  # noqa: E731
        size = lambda *which: [size_of(truth.true[i]) for i in which]  # noqa: E731
        if how == "copy":
            i = pick(range(len(truth.true)))
            new = truth.copy(i)
            dynamic |= {new} if i in dynamic else set()
        elif how == "segments":
            parts = tuple(pick(static) for _ in range(draw(st.integers(2, 3))))
            if sum(size(*parts)) <= LARGEST:
                truth.segments(*parts)
        elif how == "product":
            parts = tuple(pick(range(len(truth.true))) for _ in range(2))
            if truth.small(*size(*parts)):
                new = truth.product(*parts)
                dynamic |= {new} if dynamic & set(parts) else set()
        elif how == "distribute":
            a, b, c = pick(static), pick(static), pick(static)
            if truth.small(sum(size(a, b)), *size(c)):
                left = truth.product(truth.segments(a, b), c)
                right = truth.segments(truth.product(a, c), truth.product(b, c))
                truth.facts.append(("unify", (left,), (right,)))
        elif how == "regroup":
            parts = tuple(pick(range(len(truth.true))) for _ in range(3))
            if truth.small(*size(*parts)):
                one = truth.add(product(*(truth.true[i] for i in parts[:2])))
                other = truth.add(product(*(truth.true[i] for i in parts[1:])))
                truth.view((one, parts[2]), (parts[0], other))
                dynamic |= {one} if dynamic & set(parts[:2]) else set()
                dynamic |= {other} if dynamic & set(parts[1:]) else set()
        else:
            equal = [
                (i, j) for i, j in itertools.combinations(range(len(truth.true)), 2) if truth.true[i] == truth.true[j]
            ]
            if equal:
                i, j = pick(equal)
                truth.facts.append(("unify", (i,), (j,)))
    return truth


def solve(truth: Truth, order: random.Random) -> tuple[Axes, list[Expr]]:
    """The facts in a random order, each in one of the ways in which an op may state it."""
    axes = Axes()
    variables = [axes.fresh(size_of(expr)) for expr in truth.true]
    for kind, left, right in order.sample(truth.facts, len(truth.facts)):
        a, b = [variables[i] for i in left], [variables[i] for i in right]
        if order.random() < 0.5 and len(a) == len(b):
            a, b = b, a
        sizes = [size_of(expr) for expr in b]
        way = order.randrange(3)
        if kind == "unify":
            axes.unify(a[0], b[0])
        elif way == 0:
            join = product if kind == "product" else segments
            pair = join(*a), join(*b)
            axes.unify(*(pair if order.random() < 0.5 else reversed(pair)))
        elif kind == "segments":
            state(axes, axes.cut(a[0], sizes), b)
        elif way == 1 or len(a) > 1 or len(b) != 2:
            state(axes, axes.regroup(a, sizes), b)
        else:
            state(axes, list(axes.split(a[0], sizes[1])), b)
    return axes, variables


def state(axes: Axes, pieces: list[Expr], variables: list[Expr]) -> None:
    for piece, variable in zip(pieces, variables, strict=True):
        axes.unify(piece, variable)


def joined(kind: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The mask of a product or a concatenation, entry by entry."""
    if kind == "segments":
        return torch.tensor([bool(entry) for part in parts for entry in part])
    return torch.tensor([all(row) for row in itertools.product(*(part.tolist() for part in parts))])


# What is inferred


@check
@given(truths(), st.randoms(use_true_random=False))
def test_every_selection_of_the_inferred_atoms_obeys_every_fact(truth: Truth, order: random.Random) -> None:
    axes, variables = solve(truth, order)
    resolved = [axes.resolve(variable) for variable in variables]
    kept = masks({atom for expr in resolved for atom in atoms_of(expr)}, order, least=0)
    mask = [mask_of(expr, kept) for expr in resolved]
    for kind, left, right in truth.facts:
        assert torch.equal(joined(kind, [mask[i] for i in left]), joined(kind, [mask[i] for i in right]))


@check
@given(truths(), st.randoms(use_true_random=False))
def test_no_more_is_inferred_than_the_facts_say(truth: Truth, order: random.Random) -> None:
    axes, variables = solve(truth, order)
    resolved = [axes.resolve(variable) for variable in variables]
    # Any selection of the hidden atoms is a selection of the inferred ones.
    hidden = masks({atom for expr in truth.true for atom in atoms_of(expr)}, order)
    wanted = [mask_of(expr, hidden) for expr in truth.true]
    kept: dict[Atom, torch.Tensor] = {}
    for expr, mask in zip(resolved, wanted, strict=True):
        if not on_diagonal(expr):  # whose selections do not say which factor they are of
            for atom, part in project(expr, mask, {}).items():
                kept[atom] = kept.get(atom, part) | part
    for expr, mask in zip(resolved, wanted, strict=True):
        if kept.keys() >= set(atoms_of(expr)):
            assert torch.equal(mask_of(expr, kept), mask)


@check
@given(truths(), st.randoms(use_true_random=False))
def test_the_order_of_facts_does_not_matter(truth: Truth, order: random.Random) -> None:
    assert shape_of(*solve(truth, order)) == shape_of(*solve(truth, order))


@check
@given(truths(symbolic=True), st.randoms(use_true_random=False))
def test_the_order_of_facts_with_symbolic_sizes_does_not_matter(truth: Truth, order: random.Random) -> None:
    assert shape_of(*solve(truth, order)) == shape_of(*solve(truth, order))


@check
@given(truths(symbolic=True), st.randoms(use_true_random=False))
def test_facts_stated_again_add_nothing(truth: Truth, order: random.Random) -> None:
    axes, variables = solve(truth, order)
    before = [axes.resolve(variable) for variable in variables]
    for kind, left, right in truth.facts:
        join = segments if kind == "segments" else product
        axes.unify(join(*(variables[i] for i in left)), join(*(variables[i] for i in right)))
    assert [axes.resolve(variable) for variable in variables] == before


@check
@given(truths(symbolic=True), st.randoms(use_true_random=False), st.data())
def test_refinement_keeps_sizes_also_where_it_fails(truth: Truth, order: random.Random, data: st.DataObject) -> None:
    axes, variables = solve(truth, order)
    for _ in range(4):
        a, b = data.draw(st.sampled_from(variables)), data.draw(st.sampled_from(variables))
        how = data.draw(st.sampled_from(["unify", "split", "cut"]))
        number = data.draw(st.integers(1, 6))
        try:
            if how == "unify":
                axes.unify(a, b)
            elif how == "split":
                outer, inner = axes.split(a, number)
                assert (size_of(product(outer, inner)), size_of(inner)) == (size_of(a), number)
            else:
                pieces = axes.cut(a, [number, as_size(size_of(a) - number)])
                assert list(map(size_of, pieces)) == [number, size_of(a) - number]
        except Mismatch:
            pass
    for variable in variables:
        assert size_of(axes.resolve(variable)) == size_of(variable)


@check
@given(truths(symbolic=True), st.integers(), st.data())
def test_unify_is_symmetric_and_idempotent(truth: Truth, seed: int, data: st.DataObject) -> None:
    results = []
    i, j = (data.draw(st.sampled_from(range(len(truth.true)))) for _ in range(2))
    for left, right in ((i, j), (j, i)):
        axes, variables = solve(truth, random.Random(seed))
        try:
            axes.unify(variables[left], variables[right])
        except Mismatch:
            results.append(None)
            continue
        shape, made = shape_of(axes, variables), axes.fresh(2).serial
        assert axes.resolve(variables[left]) == axes.resolve(variables[right])
        axes.unify(variables[left], variables[right])
        axes.unify(variables[right], variables[left])
        assert shape_of(axes, variables) == shape
        assert axes.fresh(2).serial == made + 1
        results.append(shape)
    assert results[0] == results[1]


# Inverses


@check
@given(truths(), st.randoms(use_true_random=False), st.data())
def test_cut_and_concatenate_are_inverse(truth: Truth, order: random.Random, data: st.DataObject) -> None:
    axes, variables = solve(truth, order)
    variable = data.draw(st.sampled_from(variables))
    at = data.draw(st.integers(1, size_of(variable) - 1))
    sizes = [at, size_of(variable) - at]
    try:
        pieces = axes.cut(variable, sizes)
    except Mismatch:
        assume(False)
    assert list(map(size_of, pieces)) == sizes
    assert axes.resolve(segments(*pieces)) == axes.resolve(variable)
    assert axes.cut(segments(*pieces), sizes) == [axes.resolve(piece) for piece in pieces]


@check
@given(truths(symbolic=True), st.randoms(use_true_random=False), st.data())
def test_split_and_flatten_are_inverse(truth: Truth, order: random.Random, data: st.DataObject) -> None:
    axes, variables = solve(truth, order)
    variable = data.draw(st.sampled_from(variables))
    inner = data.draw(st.sampled_from([1, 2, 3, 4, 6, BATCH, 2 * BATCH]))
    try:
        pair = axes.split(variable, inner)
    except Mismatch:
        assume(False)
    assert axes.resolve(product(*pair)) == axes.resolve(variable)
    assert axes.split(product(*pair), inner) == tuple(map(axes.resolve, pair))


@check
@given(truths(symbolic=True), st.randoms(use_true_random=False), st.data())
def test_regroup_and_back_are_inverse(truth: Truth, order: random.Random, data: st.DataObject) -> None:
    axes, variables = solve(truth, order)
    dims = data.draw(st.lists(st.sampled_from(variables), min_size=1, max_size=3))
    before = list(map(size_of, dims))
    inner = data.draw(st.sampled_from([1, 2, 3, 4, 6, BATCH]))
    outer = quotient(size_of(product(*dims)), inner)
    assume(outer is not None)
    try:
        grouped = axes.regroup(dims, [outer, inner])
    except Mismatch:
        assume(False)
    assert list(map(size_of, grouped)) == [outer, inner]
    assert axes.regroup(grouped, before) == [axes.resolve(dim) for dim in dims]
    assert axes.regroup(dims, before) == [axes.resolve(dim) for dim in dims]


# Refusals


def impossible() -> Iterator[tuple[str, Any]]:
    def unify(make: Any) -> Any:
        return lambda axes: axes.unify(*make(axes))

    def known(axes: Axes, *sizes: Any) -> Expr:
        return product(*map(axes.fresh, sizes))

    def parts(axes: Axes, *sizes: Any) -> Expr:
        return segments(*map(axes.fresh, sizes))

    yield "an axis of 4 meets one of 6", unify(lambda x: (x.fresh(4), x.fresh(6)))
    yield "an axis of 4 meets one of a dynamic size", unify(lambda x: (x.fresh(4), x.fresh(BATCH)))
    yield "boundaries of 3 and 2 do not nest", unify(lambda x: (known(x, 2, 3), known(x, 3, 2)))
    yield (
        "boundaries of a dynamic size and a dynamic size do not nest",
        unify(lambda x: (known(x, BATCH, SEQUENCE), known(x, SEQUENCE, BATCH))),
    )
    yield "a cut into [3, 3] falls inside rows of 2", unify(lambda x: (known(x, 3, 2), parts(x, 3, 3)))
    yield (
        "cannot order the boundaries of [a dynamic size, 2, 4] and [a dynamic size, 4, 2]",
        unify(lambda x: (parts(x, BATCH, 2, 4), parts(x, BATCH, 4, 2))),
    )
    yield "an axis of 6 does not split into rows of 4", lambda x: x.split(x.fresh(6), 4)
    yield "an axis of a dynamic size does not split into rows of 2", lambda x: x.split(x.fresh(BATCH), 2)
    yield "an axis of 3 does not split into rows of 2", lambda x: x.split(parts(x, 3, 3), 2)
    yield "boundaries of 3 and 2 do not nest", lambda x: x.split(known(x, 4, 3), 2)
    yield "pieces of [1, 2] do not fill an axis of 4", lambda x: x.cut(x.fresh(4), [1, 2])
    yield "an empty piece among [0, 4]", lambda x: x.cut(x.fresh(4), [0, 4])
    yield "an empty piece among [-1, 5]", lambda x: x.cut(x.fresh(4), [-1, 5])
    yield "a cut into [1, 5] falls inside rows of 3", lambda x: x.cut(known(x, 2, 3), [1, 5])
    yield (
        "cannot compare a piece of a dynamic size with a part of a dynamic size",
        lambda x: x.cut(parts(x, BATCH, SEQUENCE), [SEQUENCE, BATCH]),
    )
    yield "boundaries of 3 and 2 do not nest", lambda x: x.regroup([x.fresh(2), x.fresh(3)], [3, 2])
    yield "a view to [2] leaves [3] over", lambda x: x.regroup([x.fresh(3), x.fresh(2)], [2])
    yield "nothing is left to take 2 entries from", lambda x: x.regroup([x.fresh(3)], [2, 3])


@pytest.mark.parametrize(("said", "attempt"), list(impossible()))
def test_what_is_impossible_is_refused(said: str, attempt: Any) -> None:
    with pytest.raises(Mismatch) as refusal:
        attempt(Axes())
    assert str(refusal.value) == said
