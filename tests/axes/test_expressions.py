"""Axis expressions against every entry written out: normal forms, sizes and selections."""

from __future__ import annotations

import itertools
import random
from typing import Any

import sympy
import torch
from axis_twins import BATCH, SEQUENCE, check, entries, masks
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv

from ecospa_fx.passes.axes.algebra import (
    UNIT,
    Axes,
    Expr,
    Product,
    Segments,
    as_size,
    atoms_of,
    product,
    quotient,
    segments,
    size_of,
)
from ecospa_fx.passes.axes.selection import count, index_of, mask_of, on_diagonal, project, touched

# Normal form

ATOMS = list(map(Axes().fresh, (2, 2, 3)))
TREES = st.recursive(
    st.sampled_from([*ATOMS, UNIT]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda factors: Product(tuple(factors))),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: Segments(tuple(parts))),
    ),
    max_leaves=6,
).filter(lambda tree: size_of(tree) <= 200)


@check
@given(TREES)
def test_normal_form_has_the_same_entries(tree: Expr) -> None:
    normal = Axes().resolve(tree)
    assert entries(normal) == entries(tree)
    assert size_of(normal) == len(entries(tree))
    assert Axes().resolve(normal) == normal


@check
@given(TREES, TREES)
def test_normal_forms_are_equal_exactly_if_the_entries_are(a: Expr, b: Expr) -> None:
    assert (Axes().resolve(a) == Axes().resolve(b)) == (entries(a) == entries(b))


@check
@given(TREES, TREES, TREES, TREES)
def test_normal_form_associates_and_distributes(a: Expr, b: Expr, c: Expr, d: Expr) -> None:
    a, b, c, d = map(Axes().resolve, (a, b, c, d))
    assert product(product(a, b), c) == product(a, product(b, c)) == product(a, b, c)
    assert segments(segments(a, b), c) == segments(a, segments(b, c)) == segments(a, b, c)
    assert product(segments(a, b), c) == segments(product(a, c), product(b, c))
    assert product(a, segments(b, c), d) == product(a, segments(product(b, d), product(c, d)))
    assert product(UNIT, a) == product(a, UNIT) == a


def test_small_normal_forms_are_equal_exactly_if_the_entries_are() -> None:
    a, b, _ = ATOMS
    small = [UNIT, a, b]
    for _ in range(2):
        pairs = list(itertools.product(small, small))
        small = list(dict.fromkeys([*small, *(product(*pair) for pair in pairs), *(segments(*pair) for pair in pairs)]))
    by_entries: dict[Any, set[Expr]] = {}
    for expr in small:
        by_entries.setdefault(tuple(entries(expr)), set()).add(expr)
    assert len(small) > 400
    assert [forms for forms in by_entries.values() if len(forms) > 1] == []


def test_printing() -> None:
    axes = Axes()
    q, k, d = axes.fresh(4), axes.fresh(BATCH), axes.fresh(2)
    assert repr(product(k, q, d)) == "(a2:s0 a1:4 a3:2)"
    assert repr(product(segments(q, d), d)) == "[(a1:4 a3:2) | (a3:2 a3:2)]"
    assert repr(UNIT) == "()"
    assert axes.fresh(1) == UNIT


# Sizes


@check
@given(st.integers(0, 40), st.integers(0, 8))
def test_quotient_of_numbers(size: int, divisor: int) -> None:
    expected = next((n for n in range(size + 1) if divisor and n * divisor == size), None)
    assert quotient(size, divisor) == expected


def test_quotient_of_symbols() -> None:
    assert quotient(6 * BATCH, 2) == 3 * BATCH
    assert quotient(6 * BATCH, 3 * BATCH) == 2
    assert type(quotient(6 * BATCH, 3 * BATCH)) is int
    assert quotient(BATCH * SEQUENCE, SEQUENCE) == BATCH
    assert quotient(4 * BATCH + 8, 4) == BATCH + 2
    assert quotient(BATCH, 2) is None
    assert quotient(BATCH, SEQUENCE) is None
    assert quotient(BATCH + 1, BATCH) is None
    assert as_size(sympy.Integer(3)) == 3 and type(as_size(sympy.Integer(3))) is int
    batch, length = sympy.symbols("b s", integer=True, positive=True)
    assert as_size(FloorDiv(batch * length**2, length)) == batch * length
    assert as_size(FloorDiv(length, 2)) == FloorDiv(length, 2)


# Selections


@check
@given(TREES, st.randoms(use_true_random=False))
def test_masks_against_every_entry(tree: Expr, order: random.Random) -> None:
    kept = masks(set(ATOMS), order, least=0)
    del kept[ATOMS[0]]  # an atom that is absent keeps every entry
    expected = [all(atom not in kept or bool(kept[atom][i]) for atom, i in entry) for entry in entries(tree)]
    for expr in (tree, Axes().resolve(tree)):
        assert mask_of(expr, kept).tolist() == expected
        assert count(expr, kept) == sum(expected)
        assert touched(expr, kept) == any(atom in kept for atom in atoms_of(expr))


def test_counts_with_symbolic_sizes() -> None:
    axes = Axes()
    batch, d = axes.fresh(BATCH), axes.fresh(4)
    kept = {d: torch.tensor([True, False, True, True])}
    assert count(product(batch, d), kept) == 3 * BATCH
    assert count(segments(batch, d), kept) == BATCH + 3


@check
@given(TREES)
def test_positions_and_diagonals_against_every_entry(tree: Expr) -> None:
    tree = Axes().resolve(tree)
    twice = {a for entry in entries(tree) for a in dict(entry) if sum(b is a for b, _ in entry) > 1}
    assert on_diagonal(tree) == twice
    for atom in set(ATOMS) - twice:
        assert index_of(tree, atom).tolist() == [dict(entry).get(atom, -1) for entry in entries(tree)]


@check
@given(TREES, st.randoms(use_true_random=False))
def test_project_is_the_inverse_of_mask_of(tree: Expr, order: random.Random) -> None:
    expr = Axes().resolve(tree)
    assume(not on_diagonal(expr))
    kept = masks(set(atoms_of(expr)), order)
    found = project(expr, mask_of(expr, kept), {})
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[atom], kept[atom]) for atom in kept)


@check
@given(TREES, st.data())
def test_project_covers_any_mask_as_tightly_as_it_can(tree: Expr, data: st.DataObject) -> None:
    expr = Axes().resolve(tree)
    assume(not on_diagonal(expr))
    size = size_of(expr)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=torch.bool)
    kept = project(expr, mask, {})
    assert not (mask & ~mask_of(expr, kept)).any()
    needed = {(atom, i) for entry, wanted in zip(entries(expr), mask) if wanted for atom, i in entry}
    assert {(atom, int(i)) for atom in kept for i in kept[atom].nonzero().flatten()} == needed
