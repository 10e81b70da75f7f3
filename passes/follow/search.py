"""Search: the attributes with which the forward of a region follows a selection, as few as possible."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ecospa_fx.passes.axes.algebra import Expr
from ecospa_fx.passes.axes.selection import Selection, count, in_first_contexts

from .attributes import Attribute, Value
from .given import Given, positions_under
from .trial import Trial

MOST_TRIALS = 400  # per coupling
MOST_STUCK = 60  # of them, one after another, with which the forward comes no further


def values_under(axes: Mapping[Attribute, Expr], kept: Selection) -> dict[Attribute, Value]:
    """Return the values of attributes under a selection: the sizes of these axes, or the positions that are left."""
    counts = in_first_contexts(kept)
    return {
        attribute: positions_under(expr, kept) if isinstance(attribute, Given) else int(count(expr, counts))
        for attribute, expr in axes.items()
    }


def first_that_follows(
    trial: Trial, candidates: Sequence[tuple[Attribute, Expr]], kept: Selection
) -> tuple[dict[Attribute, Expr] | None, str, str]:
    """Find a set of attributes with which the forward follows a selection.

    Returns:
        The set, or None; why the forward does not follow without; and how it ends with the set that comes furthest.

    A forward with a wrong size fails where that is used. A set with which it comes further is gone on from, by the
    attributes of the modules where it fails now: as many trials as attributes, and not as sets of them. An attribute
    that changes no shape up to one failure is tried again with the sets that come further than that, and no others.
    """
    why = trial.difference(kept, {})
    if why is None:
        return {}, "", ""
    steps = _steps(candidates)
    order = itertools.count()
    seen: set[frozenset[tuple[Attribute, Expr]]] = set()
    idle_up_to: dict[_Step, tuple[int, ...]] = {}  # how far the forward came, of the same shapes as without
    waiting: list[_Start] = []

    def wait(chosen: dict[Attribute, Expr], why: str, reached: tuple[int, ...]) -> None:
        nearest, shapes = trial.course.nearest, trial.course.shapes
        free = [step for step in steps if not any(attribute in chosen for attribute, _ in step)]
        more = sorted(free, key=lambda step: nearest(step[0][0].module))
        furthest_first = tuple(-n for n in reached) or (0,)
        heapq.heappush(waiting, (furthest_first, len(chosen), next(order), chosen, why, reached, shapes, iter(more)))

    wait({}, why, trial.course.reached)
    furthest, end, stuck = trial.course.reached, why, 0
    while waiting and stuck < MOST_STUCK and len(seen) < MOST_TRIALS:
        *_, chosen, failure, before, shapes, rest = waiting[0]
        more = next(rest, None)
        if more is None:
            heapq.heappop(waiting)
            continue
        if before and before <= idle_up_to.get(more, ()):
            continue
        needed = dict([*chosen.items(), *more])
        if (key := frozenset(needed.items())) in seen:
            continue
        seen.add(key)
        difference = trial.difference(kept, values_under(needed, kept))
        if difference is None:
            return _fewest(trial, needed, kept), "", ""
        # One that runs to a wrong end has come further than the failure before, and nobody knows how much.
        reached = trial.course.reached or (before if difference == failure else before and (*before, 1))
        stuck += 1
        if reached > furthest:
            furthest, end, stuck = reached, difference, 0
        if difference != failure or reached != before:
            wait(needed, difference, reached)
        elif trial.course.shapes == shapes:  # it was not read so far, or only for values
            idle_up_to[more] = max(reached, idle_up_to.get(more, ()))
    return None, why, end


_Step = tuple[tuple[Attribute, Expr], ...]
_Start = tuple[tuple[int, ...], int, int, dict[Attribute, Expr], str, tuple[int, ...], int, Iterator[_Step]]


def _steps(candidates: Sequence[tuple[Attribute, Expr]]) -> list[_Step]:
    """Return what a search adds at a time: a candidate, or all given tensors along one axis (sines, cosines)."""
    along: dict[Any, list[tuple[Attribute, Expr]]] = {}
    for attribute, expr in candidates:
        if isinstance(attribute, Given):
            along.setdefault((expr, attribute.size), []).append((attribute, expr))
    joint = [tuple(dict(each).items()) for each in along.values() if len(dict(each)) > 1]
    integers = [(each,) for each in candidates if not isinstance(each[0], Given)]
    return [*integers, *joint, *((each,) for each in candidates if isinstance(each[0], Given))]


def _fewest(trial: Trial, needed: dict[Attribute, Expr], kept: Selection) -> dict[Attribute, Expr]:
    """Leave out the attributes without which the forward follows too."""
    for attribute in [*needed] if len(needed) > 1 else ():
        fewer = {other: expr for other, expr in needed.items() if other != attribute}
        if trial.difference(kept, values_under(fewer, kept)) is None:
            needed = fewer
    return needed
