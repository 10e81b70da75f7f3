"""Fold: equal couplings and refusals of repeated blocks as one, for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ecospa_fx.couple.coupling import Coupling, Member
from ecospa_fx.passes.find.discover import Refusal
from ecospa_fx.text import starred


@dataclass(frozen=True, eq=False)
class Fold:
    """Couplings that are alike but for the number of their block.

    Attributes:
        module: what they are named after, `*` for the number where there are several.
        tail: the rest of their names.
        couplings: one or more; the first stands for all.
    """

    module: str
    tail: str
    couplings: tuple[Coupling, ...]

    @property
    def members(self) -> list[str]:
        """What the first runs along, below `module`, the parts of one dim of a fused projection in one."""
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
    """One fold per sort of coupling, in the order in which they first occur, those of a module together."""
    folded: dict[tuple[Any, ...], list[Coupling]] = {}
    for c in couplings:
        members = tuple(starred(str(member)) for member in c.members)
        key = starred(c.name), c.kind, c.size, c.original_size, c.linear, members
        folded.setdefault(key, []).append(c)
    folds = []
    for (name, *_), group in folded.items():
        module, _, tail = (name if len(group) > 1 else group[0].name).rpartition(".")
        folds.append(Fold(module, tail, tuple(group)))
    order = list(dict.fromkeys(fold.module for fold in folds))
    return sorted(folds, key=lambda fold: order.index(fold.module))


def fold_refusals(refusals: Sequence[Refusal]) -> list[tuple[Refusal, int]]:
    """The first of each sort of refusal, and how many there are."""
    folded: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        folded.setdefault(starred(str(refusal)), []).append(refusal)
    return [(group[0], len(group)) for group in folded.values()]


def heading(module: str) -> str:
    """A module's name as a heading; the model itself has none."""
    return module or "the model itself"
