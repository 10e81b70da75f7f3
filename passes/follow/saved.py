"""Saved changes: the integers and positions that follow shrinks, as plain values in a file, and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple
from typing import Any

from ecospa_fx.errors import CheckpointError

from .attributes import Attribute, Changes
from .given import GIVEN, Given


def changes_listed(changes: Changes) -> list[list[Any]]:
    """Write changes as lists: `[module, name, inside, original, now]`, for a `Given` with dim, size."""
    return [[*astuple(attribute), *values] for attribute, values in sorted(changes.items(), key=str)]


def changes_in(listed: Iterable[Any], where: str) -> Changes:
    """Read changes from lists of a save.

    Raises:
        CheckpointError: they are none.
    """
    changes: Changes = {}
    for item in listed:
        kinds: tuple[Any, ...] = (str, str, (str, int, type(None)), int, int)
        if type(item) is list and len(item) == 7:
            kinds = (str, str, str, int, int, (list, tuple), (list, tuple))
        fits = type(item) is list and len(item) == len(kinds)
        if not fits or not all(isinstance(part, kind) for part, kind in zip(item, kinds, strict=True)):
            raise CheckpointError(f"{where} has an attribute that is none: {item!s:.60}")
        if len(item) == 7:
            given, original, now = Given(*item[:5]), tuple(item[5]), tuple(item[6])
            rising = all(type(n) is int for n in now) and now == tuple(sorted(set(now)))
            if given.name != GIVEN or original != tuple(range(given.size)) or not rising:
                raise CheckpointError(f"{where} has an attribute that is none: {item!s:.60}")
            if not set(now) <= set(original) or not now:
                raise CheckpointError(f"{where} lets `{given}` take {now!s:.60} of {given.size}, which is no shrinking")
            changes[given] = (original, now)
            continue
        attribute, original, now = Attribute(*item[:3]), item[3], item[4]
        if not 0 < now <= original:
            raise CheckpointError(f"{where} lets `{attribute}` go from {original} to {now}, which is no shrinking")
        changes[attribute] = (original, now)
    return changes
