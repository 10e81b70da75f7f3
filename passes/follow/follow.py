"""Follow: which couplings the model's own Python can follow, and which integers it must hold anew for that.

    follow(module, graphs)
      -> held_integers   what the forward was seen to read, and so may be a size
      -> sizes           what each of them would become, by the axes of the graph that have that many entries
      -> Trial           the forward with smaller weights, against the program at the same sizes, which is proved
      -> Following       per coupling the attributes that change, or why its Python cannot follow

A forward runs on shapes first, which is quick and fails where a size is missing; what runs is compared in values, with
weights drawn at random so that scores are not all alike. Then all couplings are tried together at other sizes. What a
program gathers per call (rotary tables, masks) Python does not, so such couplings fall out by themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ecospa_fx.passes.axes.algebra import Atom, Expr
from ecospa_fx.passes.axes.selection import (
    Selected,
    Selection,
    count,
    in_first_contexts,
    per_context_or_shared,
    touched,
    whole,
)
from ecospa_fx.passes.find.discover import Discovery, RegionCoupling
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.region_graph import Forward

from .attributes import Attribute
from .trial import Trial

MOST_ATTRIBUTES = 4  # that one coupling may need changed; every set of them is tried
MOST_TRIALS = 400  # per coupling


@dataclass(frozen=True, eq=False)
class PythonSupport:
    """What the Python of a region can follow.

    Attributes:
        couplings: key of a coupling -> the attributes that change with it.
        varied: those among them that may keep other entries in each context.
        sizes: attribute -> the axis that it holds the size of.
        refused: key of a coupling -> why its Python cannot follow.
    """

    couplings: Mapping[Any, tuple[Attribute, ...]]
    varied: frozenset[Any]
    sizes: Mapping[Attribute, Expr]
    refused: Mapping[Any, str]

    def __deepcopy__(self, memo: dict[int, Any]) -> PythonSupport:
        return self  # its axes are compared by identity

    def values(self, kept: Selection) -> dict[Attribute, int]:
        """What each attribute must hold under a selection."""
        return _sizes_under(self.sizes, kept)


def _sizes_under(axes: Mapping[Attribute, Expr], kept: Selection) -> dict[Attribute, int]:
    """What attributes must hold under a selection, which are the sizes of these axes."""
    counts = in_first_contexts(kept)
    return {attribute: int(count(expr, counts)) for attribute, expr in axes.items()}


def follow(
    module: nn.Module,
    programs: Sequence[tuple[AxisFacts, Discovery]],
    forward: Forward,
    numbers: Set[tuple[type, str]] = frozenset(),
) -> PythonSupport:
    """Find out what the Python of a region can follow, in every one of the calls it was captured in.

    Args:
        module: the region, at its original sizes; left as it is.
        programs: what was inferred and discovered in the graph of each of its calls, the first one first.
        forward: its own forward.
        numbers: attributes that are no sizes, see `ecospa_fx.passes.follow.attributes.numbers_in`.
    """
    trials = [Trial(module, axis_facts, forward, numbers) for axis_facts, _ in programs]
    generator = torch.Generator().manual_seed(0)
    couplings: dict[Any, tuple[Attribute, ...]] = {}
    refused: dict[Any, str] = {}
    varied: set[Any] = set()
    sizes: dict[Attribute, Expr] = {}
    first = trials[0]
    if first.unable is not None:
        return PythonSupport({}, frozenset(), {}, {f.key: first.unable for f in programs[0][1].couplings})
    for found in programs[0][1].couplings:
        each = [next((f for f in discovery.couplings if f.key == found.key), None) for _, discovery in programs]
        kept = {found.atom: some(found.atom, None, 0.5, generator)}
        needed, why = _needed(first, found, kept, sizes)
        if needed is None:
            refused[found.key] = why
            continue
        needed |= _described(first, found, kept, needed)
        doubtful = _doubtful(first, found, kept, needed)
        if doubtful is not None:
            refused[found.key] = doubtful
            continue
        for trial, other in zip(trials[1:], each[1:], strict=True):
            if other is not None and why == "":
                theirs: Selection = {other.atom: kept[found.atom]}
                why = trial.difference(theirs, _sizes_under(needed, kept)) or ""
        if why:
            refused[found.key] = why
            continue
        couplings[found.key] = tuple(sorted(needed))
        sizes.update(needed)
        if found.context is not None:
            apart = {found.atom: some(found.atom, found.context, 0.5, generator)}
            if first.difference(apart, _sizes_under(needed, apart)) is None:
                varied.add(found.key)
    following = PythonSupport(couplings, frozenset(varied), sizes, refused)
    return _together(first, programs[0][1], following, generator)


def some(atom: Atom, context: Atom | None, share: float, generator: torch.Generator) -> Selected:
    """A random share of the entries of `atom`, at least one and not all; others in each entry of `context`."""
    keep = min(max(1, round(atom.size * share)), atom.size - 1)
    rows = torch.stack([torch.randperm(atom.size, generator=generator) for _ in range(context.size if context else 1)])
    masks = rows < keep
    return masks[0] if context is None else per_context_or_shared(context, masks, whole(context))


def _needed(
    trial: Trial, found: RegionCoupling, kept: Selection, sizes: Mapping[Attribute, Expr]
) -> tuple[dict[Attribute, Expr] | None, str]:
    """The attributes that must change for a coupling, as few as will do; or None, and what fails without."""
    candidates = list(_candidates(trial, found.atom, kept, sizes))
    why = ""
    tried = 0
    for number in range(min(len(candidates), MOST_ATTRIBUTES) + 1):
        for chosen in itertools.combinations(candidates, number):
            needed = dict(chosen)
            if len(needed) < number:
                continue  # one attribute in two meanings
            tried += 1
            if tried > MOST_TRIALS:
                return None, why
            difference = trial.difference(kept, _sizes_under(needed, kept))
            if difference is None:
                return needed, ""
            why = why or difference
    return None, why


def _doubtful(trial: Trial, found: RegionCoupling, kept: Selection, needed: Mapping[Attribute, Expr]) -> str | None:
    """Why a coupling cannot be followed for certain: an integer may be its size and may be another, and no trial tells.

    The forward reads it and does nothing with it in the calls that were captured; in another it may.
    """
    for attribute, value in trial.held.items():
        meanings = trial.axes_of_size.get(value, [])
        if attribute in needed or type(attribute.inside) is str or not _near(attribute, found):
            continue
        if not any(touched(expr, kept) for expr in meanings):
            continue
        if trial.is_idle(attribute):
            return (
                f"reads `{attribute}`, which is {value} and may be the size of this axis or of another, and which "
                "makes no difference in the call that was captured (capture one in which it does, with a mask say)"
            )
    return None


def _described(
    trial: Trial, found: RegionCoupling, kept: Selection, needed: Mapping[Attribute, Expr]
) -> dict[Attribute, Expr]:
    """Attributes beside those that must change in this call, and that another call may need: numbers of heads, say.

    Only where every axis of that many entries runs along the coupling, so that there is no other thing it could be,
    and the forward gives the same with it.
    """
    more: dict[Attribute, Expr] = {}
    for attribute, value in (trial.held | trial.unread).items():
        meanings = trial.axes_of_size.get(value, [])
        if attribute in needed or attribute.inside is not None or not _near(attribute, found) or not meanings:
            continue
        sizes = {int(count(expr, kept)) if touched(expr, kept) else None for expr in meanings}
        if len(sizes) > 1 or None in sizes:
            continue
        tried = {**needed, **more, attribute: meanings[0]}
        if trial.difference(kept, _sizes_under(tried, kept)) is None:
            more[attribute] = meanings[0]
    return more


def _near(attribute: Attribute, found: RegionCoupling) -> bool:
    """Whether the module that holds it also holds weights of the coupling, itself or further down."""
    return any(not attribute.module or name.startswith(f"{attribute.module}.") for name, _ in found.axes)


def _candidates(
    trial: Trial, atom: Atom, kept: Selection, sizes: Mapping[Attribute, Expr]
) -> Iterator[tuple[Attribute, Expr]]:
    """Attributes whose integer is the size of an axis that runs along `atom`, with that axis."""
    for attribute, value in trial.held.items():
        meanings = [sizes[attribute]] if attribute in sizes else trial.axes_of_size.get(value, [])
        seen = set()
        for expr in meanings:
            if touched(expr, kept) and (size := int(count(expr, kept))) not in seen:
                seen.add(size)
                yield attribute, expr


def _together(
    trial: Trial, discovery: Discovery, following: PythonSupport, generator: torch.Generator
) -> PythonSupport:
    """Leave out what fails beside others: all at once at other sizes, and where that fails one after another."""
    followed = [found for found in discovery.couplings if found.key in following.couplings]
    kept: dict[Atom, Selected] = {
        found.atom: some(found.atom, found.context if found.key in following.varied else None, 0.7, generator)
        for found in followed
    }
    if trial.difference(kept, following.values(kept)) is None:
        return following
    refused, left = dict(following.refused), dict[Atom, Selected]()
    couplings: dict[Any, tuple[Attribute, ...]] = {}
    for found in followed:
        more = {**left, found.atom: kept[found.atom]}
        needed = {a: following.sizes[a] for key in (*couplings, found.key) for a in following.couplings[key]}
        difference = trial.difference(more, _sizes_under(needed, more))
        if difference is None:
            left, couplings[found.key] = more, following.couplings[found.key]
        else:
            refused[found.key] = f"with others beside it, {difference}"
    sizes = {a: following.sizes[a] for needed in couplings.values() for a in needed}
    return PythonSupport(couplings, following.varied & couplings.keys(), sizes, refused)
