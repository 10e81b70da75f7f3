"""Unit dims: the dims of a tensor, matched before and after dims of one entry are added or removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def dims_before(before: Sequence[Any], after: Sequence[Any]) -> list[int | None] | None:
    """Match the dims of two shapes of the same entries that differ in dims of one entry only.

    Returns:
        For each dim of `after` the dim of `before` that it is, None for an added one; None where the shapes differ in
        more than dims of one entry.
    """
    matched: list[int | None] = []
    i = 0
    for size in after:
        while i < len(before) and before[i] != size and before[i] == 1 and size != 1:
            i += 1
        if i < len(before) and before[i] == size:
            matched.append(i)
            i += 1
        elif size == 1:
            matched.append(None)
        else:
            return None
    return matched if all(size == 1 for size in before[i:]) else None
