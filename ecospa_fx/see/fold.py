"""Fold: the equal couplings or refusals of repeated blocks as one entry, for people to read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ecospa_fx.couple.coupling import Coupling, Member
from ecospa_fx.passes.find.left_whole import Refusal, UncoupledAxis
from ecospa_fx.text import starred


@dataclass(frozen=True, eq=False)
class Fold:
    """The couplings that are alike except for the number of their block.

    Attributes:
        module: name of the module that their names begin with; `*` is the block number if there are several.
        tail: the rest of their names.
        couplings: one or more; the first represents all.
    """

    module: str
    tail: str
    couplings: tuple[Coupling, ...]

    @property
    def members(self) -> list[str]:
        """The members of the first coupling, named below `module`; parts of one fused dim are one word."""
        first = self.couplings[0]
        prefix = first.name.rpartition(".")[0]
        grouped: dict[str, list[Member]] = {}
        for member in first.members:
            name = f"{member.parameter}[{member.dim}]"
            grouped.setdefault(name.removeprefix(f"{prefix}.") if prefix else name, []).append(member)
        words = []
        for name, members in grouped.items():
            parts = [str(member.part) for member in members if member.part is not None]
            words.append(f"{name} part{'s' if len(parts) > 1 else ''} {'+'.join(parts)}" if parts else name)
        return words


def fold_couplings(couplings: Iterable[Coupling]) -> list[Fold]:
    """Group couplings that are alike, in order of first occurrence, those of a module together."""
    groups: dict[tuple[Any, ...], list[Coupling]] = {}
    for c in couplings:
        members = tuple(starred(str(member)) for member in c.members)
        key = starred(c.name), c.kind, c.size, c.original_size, c.linear, members
        groups.setdefault(key, []).append(c)
    folds = []
    for (name, *_), group in groups.items():
        module, _, tail = (name if len(group) > 1 else group[0].name).rpartition(".")
        folds.append(Fold(module, tail, tuple(group)))
    order = list(dict.fromkeys(fold.module for fold in folds))
    return sorted(folds, key=lambda fold: order.index(fold.module))


def fold_refusals(refusals: Sequence[Refusal]) -> list[tuple[Refusal, int]]:
    """Group refusals that are alike: the first of each group, and the size of the group."""
    groups: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        groups.setdefault(starred(str(refusal)), []).append(refusal)
    return [(group[0], len(group)) for group in groups.values()]


def fold_uncoupled(axes: Sequence[UncoupledAxis]) -> dict[str, list[str]]:
    """Group axes by their first reason, without its place: reason -> names of the dims, those of most first."""
    groups: dict[str, list[str]] = {}
    for axis in axes:
        reason = starred(_PLACE.sub("", axis.reasons[0]))
        groups.setdefault(reason, []).extend(axis.members)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


_PLACE = re.compile(r" \([^()]*\)$")


def heading(module: str) -> str:
    """Return a module's name as a heading; the root has an empty name."""
    return module or "the model itself"
