"""Twins of axis expressions: every entry written out, and masks of atoms drawn at random."""

from __future__ import annotations

import itertools
import random

import sympy
import torch
from hypothesis import settings

from ecospa_fx.passes.axes.algebra import Atom, Expr, Product, Segments

BATCH = sympy.Symbol("s0", positive=True, integer=True)
SEQUENCE = sympy.Symbol("s1", positive=True, integer=True)

check = settings(deadline=None, max_examples=150)


def entries(expr: Expr) -> list[tuple[tuple[Atom, int], ...]]:
    """Every entry of an axis, in normal form or not: a tuple of (atom, position), the outermost factor first."""
    match expr:
        case Atom():
            return [((expr, i),) for i in range(expr.size)]
        case Product():
            rows = itertools.product(*map(entries, expr.factors))
            return [tuple(itertools.chain(*row)) for row in rows]
        case Segments():
            return list(itertools.chain(*map(entries, expr.parts)))


def masks(atoms: set[Atom], generator: random.Random, least: int = 1) -> dict[Atom, torch.Tensor]:
    kept = {}
    for atom in sorted(atoms, key=lambda atom: atom.serial):
        chosen = generator.sample(range(atom.size), generator.randint(least, atom.size))
        kept[atom] = torch.zeros(atom.size, dtype=torch.bool)
        kept[atom][chosen] = True
    return kept
