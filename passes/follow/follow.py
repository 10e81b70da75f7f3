"""Follow: the couplings that the model's own Python can follow, and the integers that must change with them.

    follow(module, graphs)
      -> held_integers   integers that the forward reads, and that may be sizes
      -> axes_of_size    the axes of the graph that each of them may be the size of
      -> Trial           the forward with smaller weights, against the program at the same sizes, which is proved
      -> PythonSupport   per coupling the attributes that change, or why its Python cannot follow

A forward runs on shapes first, which is quick and fails where a size is wrong; if it runs, it is compared in values,
with weights drawn at random so that attention scores differ. Then all couplings are tried together at other sizes. A
program gathers entries of inputs at each call (rotary tables, masks) and Python does not, so couplings that need this
fail the trial.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch
from torch import nn

from ecospa_fx.passes.axes.algebra import Atom, Expr, size_of
from ecospa_fx.passes.axes.selection import (
    Selected,
    Selection,
    count,
    per_context_or_shared,
    touched,
    whole,
)
from ecospa_fx.passes.find.discover import Discovery, RegionCoupling
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.region_graph import Forward

from .attributes import Attribute, Value
from .given import Given, given_along
from .search import first_that_follows, values_under
from .trial import Trial


@dataclass(frozen=True, eq=False)
class PythonSupport:
    """The couplings that the Python of a region can follow, and those that it cannot.

    Attributes:
        couplings: key of a coupling -> the attributes that change with it.
        varied: keys of the couplings that may keep other entries in each context.
        sizes: attribute -> the axis whose size it holds.
        in_step: key of a coupling -> those of the couplings that must keep the same share of their entries, because one
            integer holds the sizes of all.
        refused: key of a coupling -> why its Python cannot follow.
        last_stays: key of a coupling that its Python can follow -> why it needs one entry, where no graph does.
    """

    couplings: Mapping[Any, tuple[Attribute, ...]]
    varied: frozenset[Any]
    sizes: Mapping[Attribute, Expr]
    refused: Mapping[Any, str]
    in_step: Mapping[Any, tuple[Any, ...]] = field(default_factory=dict)
    last_stays: Mapping[Any, str] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> PythonSupport:
        return self  # its axes are compared by identity

    def values(self, kept: Selection) -> dict[Attribute, Value]:
        """Return the value of each attribute under a selection."""
        return values_under(self.sizes, kept)


def follow(
    module: nn.Module,
    programs: Sequence[tuple[AxisFacts, Discovery]],
    forward: Forward,
    numbers: Set[tuple[type, str]] = frozenset(),
) -> PythonSupport:
    """Find the couplings that the Python of a region can follow, in each call that was captured.

    Args:
        module: the region, at its original sizes; left as it is.
        programs: axes and couplings of the graph of each call, the first one first.
        forward: its own forward.
        numbers: attributes that are not sizes, see `ecospa_fx.passes.follow.attributes.numbers_in`.
    """
    trials = [Trial(module, axis_facts, forward, numbers) for axis_facts, _ in programs]
    if len({trial.training for trial in trials}) > 1:
        for trial in trials:
            trial.other_mode_tells = False  # there are graphs of both, which tell more
    generator = torch.Generator().manual_seed(0)
    couplings: dict[Any, tuple[Attribute, ...]] = {}
    refused: dict[Any, str] = {}
    failed: dict[Any, str] = {}  # the same by block, to search once where blocks are equal
    varied: set[Any] = set()
    sizes: dict[Attribute, Expr] = {}
    first = trials[0]
    if first.unable is not None:
        return PythonSupport({}, frozenset(), {}, {f.key: first.unable for f in programs[0][1].couplings})
    for coupling in programs[0][1].couplings:
        in_graphs = [discovery.same(coupling) for _, discovery in programs]
        kept = {coupling.atom: some(coupling.atom, None, 0.5, generator, coupling.least)}
        candidates = [*_candidates(first, kept, sizes, coupling.axes)]
        in_block = _in_any_block(coupling, candidates)
        if in_block in failed and (same := first.difference(kept, {}) or "") and _starred(same) == failed[in_block]:
            refused[coupling.key] = same
            continue
        needed, why = _find_needed(first, coupling, kept, candidates)
        if needed is None:
            refused[coupling.key], failed[in_block] = why, _starred(why)
            continue
        needed |= _also_sizes(first, coupling, kept, needed)
        uncertain = _uncertain(first, coupling, kept, needed)
        if uncertain is not None:
            refused[coupling.key] = uncertain
            continue
        for trial, other in zip(trials[1:], in_graphs[1:], strict=True):
            if other is not None and why == "":
                theirs: Selection = {other.atom: kept[coupling.atom]}
                why = trial.difference(theirs, values_under(needed, kept)) or ""
                if why and trial.training != first.training:
                    why += f", in {'training' if trial.training else 'eval'} mode"
        if why:
            refused[coupling.key] = why
            continue
        couplings[coupling.key] = tuple(sorted(needed, key=str))
        sizes.update(needed)
        if coupling.context is not None and not any(isinstance(each, Given) for each in needed):
            apart = {coupling.atom: some(coupling.atom, coupling.context, 0.5, generator, coupling.least)}
            if first.difference(apart, values_under(needed, apart)) is None:
                varied.add(coupling.key)
    in_step: dict[Any, tuple[Any, ...]] = {}
    for group in _of_one_attention(programs[0][1], refused):
        joint, why = _jointly(trials, [discovery for _, discovery in programs], group, sizes, generator)
        if joint is None:
            refused |= {
                c.key: f"{refused[c.key]}; with the same share of {_listed(group)} removed {why}" for c in group
            }
        else:
            sizes.update(joint)
            for coupling in group:
                del refused[coupling.key]
                couplings[coupling.key] = tuple(sorted(joint, key=str))
                in_step[coupling.key] = tuple(other.key for other in group if other is not coupling)
    last_stays = _last_stay(trials, programs, couplings, sizes)
    support = PythonSupport(couplings, frozenset(varied), sizes, refused, in_step, last_stays)
    return _together(first, programs[0][1], support, generator)


def _of_one_attention(discovery: Discovery, refused: Collection[Any]) -> list[list[RegionCoupling]]:
    """Return the queries and keys, and the values, of each attention that its Python follows none of alone."""
    groups: dict[str, list[RegionCoupling]] = {}
    for coupling in discovery.couplings:
        if coupling.key in refused and coupling.attention is not None and coupling.kind in ("qk", "vo"):
            groups.setdefault(coupling.attention, []).append(coupling)
    return [group for group in groups.values() if len(group) > 1]


def _jointly(
    trials: Sequence[Trial],
    discoveries: Sequence[Discovery],
    group: Sequence[RegionCoupling],
    sizes: Mapping[Attribute, Expr],
    generator: torch.Generator,
) -> tuple[dict[Attribute, Expr] | None, str]:
    """Find the attributes that must change if couplings keep the same share, one integer being the size of all.

    Returns:
        Attribute -> the axis whose size it holds; None and the reason where its Python cannot follow them so either.
    """
    share = _common_share(group, 0.5)
    if share is None:
        return None, "nothing is left out: their sizes have no common factor"
    kept = {coupling.atom: some(coupling.atom, None, share, generator, coupling.least) for coupling in group}
    first = trials[0]
    axes = [axis for coupling in group for axis in coupling.axes]
    candidates = _candidates(first, kept, sizes, axes)
    near = [(a, expr) for a, expr in candidates if all(_near(a, coupling) for coupling in group)]
    needed, _, end = first_that_follows(first, near, kept)
    if needed is None:
        return None, f"it {end}"
    for coupling in group:
        needed |= _also_sizes(first, coupling, kept, needed)
    if any((uncertain := _uncertain(first, coupling, kept, needed)) is not None for coupling in group):
        return None, f"it {uncertain}"
    values = values_under(needed, kept)
    for trial, discovery in zip(trials[1:], discoveries[1:], strict=True):
        others = {c.key: other for c in group if (other := discovery.same(c)) is not None}
        theirs: Selection = {others[c.key].atom: kept[c.atom] for c in group if c.key in others}
        if len(theirs) < len(group):
            return None, "another call needs one of them whole"
        if (difference := trial.difference(theirs, values)) is not None:
            return None, f"it {difference} in another call"
    return needed, ""


def _listed(group: Sequence[RegionCoupling]) -> str:
    return " and ".join(f"`{coupling.name}`" for coupling in group)


def _last_stay(
    trials: Sequence[Trial],
    programs: Sequence[tuple[AxisFacts, Discovery]],
    couplings: Mapping[Any, tuple[Attribute, ...]],
    sizes: Mapping[Attribute, Expr],
) -> dict[Any, str]:
    """Say of the couplings that may lose all entries in a graph why one must stay in the Python, where that is so."""
    found: dict[Any, str] = {}
    in_block: dict[Any, str] = {}  # equal blocks are tried once
    for coupling in programs[0][1].couplings:
        if coupling.key not in couplings or coupling.last_stays is not None:
            continue
        needed = couplings[coupling.key]
        axes = tuple((_starred(name), dim) for name, dim in coupling.axes)
        block = coupling.kind, coupling.atom.size, axes, tuple(_starred(str(each)) for each in needed)
        if block not in in_block:
            in_block[block] = _last_stays(trials, programs, coupling, {each: sizes[each] for each in needed})
        if in_block[block]:
            found[coupling.key] = in_block[block]
    return found


def _last_stays(
    trials: Sequence[Trial],
    programs: Sequence[tuple[AxisFacts, Discovery]],
    coupling: RegionCoupling,
    needed: Mapping[Attribute, Expr],
) -> str:
    """Say why an entry of a coupling must stay in the Python; empty where none must."""
    if coupling.kind == "heads":
        return "would keep keys of no heads, and a cache counts tokens by the keys that it holds"
    none: Selection = {coupling.atom: ~whole(coupling.atom)}
    for trial, (_, discovery) in zip(trials, programs, strict=True):
        theirs = discovery.same(coupling)
        if theirs is not None:
            kept = none if theirs is coupling else {theirs.atom: ~whole(theirs.atom)}
            why = trial.difference(kept, values_under(needed, none))
            if why is not None:
                return f"without any entry {why}"
    return ""


def _common_share(group: Sequence[RegionCoupling], about: float) -> float | None:
    """Return a share, about so large, at which all keep whole numbers of entries; None where there is none below 1."""
    parts = gcd(*(coupling.atom.size for coupling in group))
    return None if parts == 1 else min(max(1, round(about * parts)), parts - 1) / parts


def some(atom: Atom, context: Atom | None, share: float, generator: torch.Generator, least: int = 1) -> Selected:
    """Select a random share of the entries of `atom`, at least `least`, not all; others in each entry of `context`."""
    keep = min(max(least, round(atom.size * share)), atom.size - 1)
    rows = torch.stack([torch.randperm(atom.size, generator=generator) for _ in range(context.size if context else 1)])
    masks = rows < keep
    return masks[0] if context is None else per_context_or_shared(context, masks, whole(context))


def _find_needed(
    trial: Trial, coupling: RegionCoupling, kept: Selection, candidates: Sequence[tuple[Attribute, Expr]]
) -> tuple[dict[Attribute, Expr] | None, str]:
    """Find the attributes that must change for a coupling, as few as possible; or None, and why a trial failed."""
    # Those of modules around its weights come first: in a whole model there are as many as there are layers.
    nearest_first = sorted(candidates, key=lambda each: not _near(each[0], coupling))
    return first_that_follows(trial, nearest_first, kept)[:2]


def _in_any_block(coupling: RegionCoupling, candidates: Sequence[tuple[Attribute, Expr]]) -> tuple[Any, ...]:
    """Return all that a search for attributes starts from, without the numbers of blocks."""
    axes = tuple((_starred(name), dim) for name, dim in coupling.axes)
    attributes = Counter((_starred(f"{a.module}.{a.name}"), a.inside, size_of(expr)) for a, expr in candidates)
    return coupling.kind, coupling.atom.size, axes, frozenset(attributes.items())


def _starred(text: str) -> str:
    """Replace the positions in lists that a text names."""
    return re.sub(r"(?<=[.`])\d+(?=[.`])|^\d+(?=\.)", "*", text)


def _uncertain(trial: Trial, coupling: RegionCoupling, kept: Selection, needed: Mapping[Attribute, Expr]) -> str | None:
    """Say why it is uncertain that a coupling can be followed: an integer may be its size, and no trial can tell.

    The forward reads the integer, and its value makes no difference in the calls that were captured; in another it may.
    """
    for attribute, value in trial.held.items():
        meanings = trial.axes_of_size.get(value, [])
        if attribute in needed or type(attribute.inside) is str or not _near(attribute, coupling):
            continue
        if not any(touched(expr, kept) for expr in meanings):
            continue
        if trial.is_idle(attribute):
            return (
                f"reads `{attribute}`, which is {value} and may be the size of this axis or of another, and which "
                "makes no difference in the call that was captured (capture one in which it does, say with a mask)"
            )
    return None


def _also_sizes(
    trial: Trial, coupling: RegionCoupling, kept: Selection, needed: Mapping[Attribute, Expr]
) -> dict[Attribute, Expr]:
    """Find attributes that need not change in this call but may in another: a number of heads, for example.

    Only where every axis with that many entries runs along the coupling, so that the integer can be nothing else, and
    the forward gives the same results with it changed.
    """
    more: dict[Attribute, Expr] = {}
    for attribute, value in (trial.held | trial.unread).items():
        meanings = trial.axes_of_size.get(value, [])
        if attribute in needed or attribute.inside is not None or not _near(attribute, coupling) or not meanings:
            continue
        sizes = {int(count(expr, kept)) if touched(expr, kept) else None for expr in meanings}
        if len(sizes) > 1 or None in sizes:
            continue
        tried = {**needed, **more, attribute: meanings[0]}
        if trial.difference(kept, values_under(tried, kept)) is None:
            more[attribute] = meanings[0]
    return more


def _near(attribute: Attribute, coupling: RegionCoupling) -> bool:
    """Return whether the module that holds the attribute also holds weights of the coupling, itself or below."""
    return any(not attribute.module or name.startswith(f"{attribute.module}.") for name, _ in coupling.axes)


def _candidates(
    trial: Trial, kept: Selection, sizes: Mapping[Attribute, Expr], axes: Sequence[tuple[str, int]]
) -> Iterator[tuple[Attribute, Expr]]:
    """Yield the attributes whose integer may be the size of an axis that a selection touches, with that axis.

    Then the tensors from outside that may run along one, of the module that holds all weights along the selection.
    """
    for attribute, value in trial.held.items():
        meanings = [sizes[attribute]] if attribute in sizes else trial.axes_of_size.get(value, [])
        seen = set()
        for expr in meanings:
            if touched(expr, kept) and (size := int(count(expr, kept))) not in seen:
                seen.add(size)
                yield attribute, expr
    for given, expr in given_along(trial.given, axes, trial.axes_of_size, kept):
        if sizes.get(given, expr) == expr:
            yield given, expr


def _together(trial: Trial, discovery: Discovery, support: PythonSupport, generator: torch.Generator) -> PythonSupport:
    """Drop the couplings that fail beside others: try all at once, and if that fails add them one after another."""
    followed = [coupling for coupling in discovery.couplings if coupling.key in support.couplings]
    groups = [[c, *(o for o in followed if o.key in support.in_step[c.key])] if c.key in support.in_step else [c]
              for c in followed]  # fmt: skip
    kept: dict[Atom, Selected] = {}
    for group in groups:
        share = 0.7 if len(group) == 1 else _common_share(group, 0.7) or 0.7
        for coupling in group:
            context = coupling.context if coupling.key in support.varied else None
            kept.setdefault(coupling.atom, some(coupling.atom, context, share, generator, coupling.least))
    if trial.difference(kept, support.values(kept)) is None:
        return support
    refused, accepted = dict(support.refused), dict[Atom, Selected]()
    couplings: dict[Any, tuple[Attribute, ...]] = {}
    for group in groups:
        if any(coupling.key in couplings or coupling.key in refused for coupling in group):
            continue  # with one that it is in step with
        more = accepted | {coupling.atom: kept[coupling.atom] for coupling in group}
        keys = [coupling.key for coupling in group]
        needed = {a: support.sizes[a] for key in (*couplings, *keys) for a in support.couplings[key]}
        difference = trial.difference(more, values_under(needed, more))
        if difference is None:
            accepted = more
            couplings |= {key: support.couplings[key] for key in keys}
        else:
            refused |= dict.fromkeys(keys, f"with other couplings shrunk too, {difference}")
    sizes = {a: support.sizes[a] for needed in couplings.values() for a in needed}
    in_step = {key: others for key, others in support.in_step.items() if key in couplings}
    return PythonSupport(couplings, support.varied & couplings.keys(), sizes, refused, in_step, support.last_stays)
