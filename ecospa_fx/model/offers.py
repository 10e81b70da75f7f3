"""TODO."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ecospa_fx.passes.axes.algebra import Atom
from ecospa_fx.passes.find.discover import RegionCoupling


def _mark(found: RegionCoupling, context: Atom | None) -> str:
    """What a coupling, or that it may differ by context, is known by: where it lies on the parameters."""
    where = found.key if context is None else (found.key, found.context_key)
    return hashlib.sha256(repr(where).encode()).hexdigest()[:16]


def shared_prefix(a: str, b: str) -> int:
    """How many letters two names begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _nearest(name: str, matrices: Sequence[str]) -> str:
    """The matrix whose name shares the longest prefix with that of a bias."""
    return max(matrices, key=lambda matrix: shared_prefix(name, matrix))
