"""Other paths: what the model's own Python may run between its regions in another call than the one that was followed.

    on_other_paths(model, ..., found) -> the joints that do not hold there, with the reasons

One path is the other mode: training, where the first call was in eval mode; another is one with gradients. Where Python
draws numbers, other draws are some more. One more is each line in which Python asks
a tensor yes or no (`if mask.all():`), answered the other way round. A joint holds on a path if nothing pins it there,
no other weight meets it, and the Python follows at the sizes that a shrink leaves. Numbers that Python reads from
tensors (a count of groups) are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ecospa_fx.logs import logger
from ecospa_fx.passes.axes.algebra import atoms_of
from ecospa_fx.passes.capture.between import Between, ForwardPath, follow_between
from ecospa_fx.passes.graph.nodes import file_and_line
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.passes.ir.border import WeightDim

from .joint import BETWEEN, Across, Place
from .joints import JointSearch
from .joints_tried import not_followed

MOST = 16
"""Lines with conditions that are tried, in the order in which they are met."""

DRAWS = range(1, 9)
"""More forwards that are tried where Python draws numbers."""


def on_other_paths(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    between: Between,
    found: Across,
    path: ForwardPath,
    experiments: bool,
) -> dict[WeightDim, str]:
    """Return the joints that do not hold on another path than the one followed, by their first member, with the reason.

    Args:
        model: the model.
        args: positional arguments of the forward that `between` has seen.
        kwargs: keyword arguments of it.
        between: what it ran between its regions.
        found: the joints.
        path: the forward that `between` is.
        experiments: see `infer_axes`.
    """
    if not found.joints:
        return {}
    seen = [between]
    for other, words in _paths(model, path, seen):
        try:
            after = follow_between(model, args, kwargs, found.analyses, path=other)
        except (Exception, SystemExit) as error:  # it does not run so with these arguments
            line = (str(error).strip().splitlines() or [""])[0]
            logger("discover").info("not followed %s: %s: %s", words, type(error).__name__, line)
            continue
        seen.append(after)
        if _steps(after) == _steps(between):
            continue
        reasons, there = _held(model, after, found, experiments)
        reasons = reasons or not_followed(model, args, kwargs, after, there, named_tensors(model), other)
        if reasons:
            return {member: f"{words}, {why}" for member, why in reasons.items()}
    return {}


def _paths(model: nn.Module, path: ForwardPath, seen: Sequence[Between]) -> Iterator[tuple[ForwardPath, str]]:
    """Yield paths to try, with words for them; `seen` grows by what each has run."""
    if seen[0].draws:
        yield from ((replace(path, attempt=path.attempt + more), "with other draws") for more in DRAWS)
    yield replace(path, gradients=True), "with gradients"
    training = not model.training
    words = "in training mode" if training else "in eval mode"
    yield replace(path, training=training), words
    if seen[-1].draws:
        for more in DRAWS:
            yield replace(path, training=training, attempt=path.attempt + more), f"{words} with other draws"
    for line in seen[0].conditions[:MOST]:
        code = line.splitlines()[-1].strip()
        yield replace(path, inverted=line), f"where `{code}` ({file_and_line(line)}) goes the other way"


def _held(model: nn.Module, between: Between, found: Across, experiments: bool) -> tuple[dict[WeightDim, str], Across]:
    """Return the joints that do not hold in another forward, with reasons, and the joints with their places in it."""
    search = JointSearch(model, between, found.analyses, {}, experiments, found.edges)
    outer = search.infer()
    classes = search.classes(outer)
    members = classes.members()
    reasons: dict[WeightDim, str] = {}
    owners: dict[Place, int] = {}
    everywhere = []
    for number, (joint, places) in enumerate(zip(found.joints, found.places, strict=True)):
        roots = dict.fromkeys(classes.find(place) for place in places if place[0] != BETWEEN)
        here = [place for root in roots for place in members[root]]
        everywhere.append(tuple(here))
        atoms = {atom for where, _, atom in here if where == BETWEEN}
        why = [reason for root in roots for reason in classes.reasons(root)]
        why += [
            f"`{name}` meets it along dim {dim}"
            for name, exprs in outer.parameters.items()
            for dim, expr in enumerate(exprs)
            if atoms & {*atoms_of(expr)} and (joint.aliases.get(name, name), dim) not in joint.members
        ]
        why += [
            f"it is one axis with `{found.joints[other].name}`"
            for other in {owners.setdefault(root, number) for root in roots} - {number}
        ]
        if why:
            reasons[joint.members[0]] = why[0]
    return reasons, replace(found, places=tuple(everywhere), between=outer)


def _steps(between: Between) -> tuple[str, list[tuple[str, list[str]]]]:
    """Return what was run, in words that are equal for equal forwards."""
    calls = [(call.region, [f"{name}={node}" for name, node in call.arguments.items()]) for call in between.calls]
    return str(between.captured.graph), calls
