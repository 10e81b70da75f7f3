"""Deployable: the couplings that a model may lose entries of and still be one that a configuration describes.

deployment(model, constraints)
  -> alike couplings shrink together, at half their size on paper
  -> Described.numbers       a configuration or arguments that make that model, which computes the same
  -> those that fail alone are tried in pairs and threes; what fails in all stays whole
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from ecospa_fx.couple.constraints import Constraints
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.couple.ties import alike
from ecospa_fx.errors import EcoSpaError, TargetError
from ecospa_fx.model.configured import configured
from ecospa_fx.model.constructed import Constructed
from ecospa_fx.model.described import Described
from ecospa_fx.model.fewer_blocks import FewerBlocks, without_empty
from ecospa_fx.model.joint_offers import joint_offers
from ecospa_fx.model.lookup import state_of
from ecospa_fx.model.making import Number, Where
from ecospa_fx.model.planning import planned

Deployable: TypeAlias = "Literal['transformers'] | Callable[[], nn.Module]"
Set: TypeAlias = "list[list[Coupling]]"  # groups of alike couplings that keep one share
MOST_TOGETHER = 3  # sets of couplings that one attempt joins
FEW = 24  # sizes that are all tried


@dataclass(frozen=True, eq=False)
class Deployment:
    """The shrinks that a model is held to so that plain transformers, or its constructor, makes it; print it.

    Attributes:
        constraints: the constraints of the trainer with those that this adds.
        forbidden: coupling name -> why it stays whole.
        tied: groups of couplings that keep the same share, because one number of the configuration stands for all.
        reachable: smallest target with these constraints, and without them.
    """

    constraints: Constraints
    forbidden: Mapping[str, str]
    tied: Sequence[Sequence[str]]
    reachable: tuple[float, float] | None = None

    def __str__(self) -> str:
        lines = []
        if self.reachable is not None:
            lines.append("targets down to {:.3g} can be reached, and {:.3g} without it".format(*self.reachable))
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.forbidden.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            lines.append(f"{', '.join(f'`{name}`' for name in names[:2])}{more} stay whole: {reason}")
        for group in self.tied:
            more = f" and {len(group) - 3} more" if len(group) > 3 else ""
            lines.append(f"{', '.join(f'`{name}`' for name in group[:3])}{more} keep the same share")
        return "deployable: " + "; ".join(lines or ["nothing is forbidden"])


def check_deployable(model: nn.Module, deployable: Deployable | None) -> None:
    """Refuse a model that nothing can describe once it has shrunk.

    Raises:
        TargetError: there is no such way to deploy.
        EcoSpaError: the model is not of transformers.
    """
    if deployable is None or callable(deployable):
        return
    if deployable != "transformers":
        raise TargetError(
            f"deployable={deployable!r} is neither 'transformers' nor a function that makes the model, such as "
            "functools.partial(timm.create_model, name, **arguments)"
        )
    kind = type(model).__name__
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise EcoSpaError(
            f"deployable='transformers': {kind} is not a model of transformers: it has no save_pretrained"
        )


def deployment(model: nn.Module, deployable: Deployable, constraints: Constraints) -> Deployment:
    """Find out what a model may lose, and return the constraints that hold it to that.

    Raises:
        FormatError: the function that `deployable` is makes another model.
    """
    compiled, names = state_of(model), {c.name: c.name for c in state_of(model).couplings()}
    gone = ""
    if callable(deployable):
        make, given = _parts(deployable)
        found = _Attempts(Constructed(model, compiled, make, given))
    else:
        fewer = without_empty(model, compiled)
        if isinstance(fewer, FewerBlocks):
            names, compiled = fewer.originals(), fewer.compiled
            found = _Attempts(configured(fewer.model, compiled))
        else:
            gone = "" if fewer is None else f"; {fewer}"
            found = _Attempts(configured(model, compiled))
    sets = _sets(compiled.couplings())
    failing: list[Set] = []
    why: dict[str, str] = {}
    for each in sets:
        reason = found.fails(each)
        if reason is not None:
            failing.append(each)
            why |= dict.fromkeys(_names(each), reason)
    joined: list[Set] = []
    for several in _several(failing):
        together = [group for each in several for group in each]
        taken = {name for each in joined for name in _names(each)}
        if not taken & set(_names(together)) and found.fails(together) is None:
            joined.append(together)
    fine = [each for each in sets if not set(_names(each)) & why.keys()] + joined
    accepted: list[Set] = []
    if found.fails(*fine) is None:
        accepted = fine
    else:
        for each in fine:
            reason = found.fails(*accepted, each)
            if reason is None:
                accepted.append(each)
            else:
                why |= dict.fromkeys(_names(each), f"with others shrunk too, {reason}")
    allowed: dict[str, Sequence[int]] = {}
    for each in list(accepted):
        sizes = found.sizes(each, [other for other in accepted if other is not each])
        if sizes is None:
            continue
        if not sizes:
            accepted.remove(each)
            why |= dict.fromkeys(_names(each), "no other size of it passes the checks of the configuration")
        allowed |= {c.name: [size * c.size // _least(each) for size in sizes] for group in each for c in group}
    kept = {name for each in accepted for name in _names(each)}
    forbidden = {names[n]: f"{why[n]}{gone}" for each in sets for n in _names(each) if n not in kept}
    tied = [[names[name] for name in _names(each)] for each in accepted if len(each) > 1]
    # All layers alike keep an entry: a configuration has fewer blocks, but none without a sublayer.
    more = replace(
        constraints, min_keep=max(1, constraints.min_keep), uniform="layers", tied=[*constraints.tied, *tied],
        whole={**forbidden, **constraints.whole},
        allowed={names[name]: set(sizes) for name, sizes in allowed.items() if names[name] not in forbidden},
    )  # fmt: skip
    return Deployment(more, forbidden, tied)


def _sets(couplings: Sequence[Coupling]) -> list[Set]:
    """Group the couplings that can lose entries: alike ones, with those that they are in step with."""
    sets: list[Set] = []
    for group in alike(couplings):
        if min(c.size for c in group) < 2:
            continue
        partners = {name for c in group for name in c.in_step}
        meeting = [each for each in sets if partners & set(_names(each))]
        sets = [each for each in sets if each not in meeting] + [[g for each in meeting for g in each] + [group]]
    return sets


def _names(each: Set) -> list[str]:
    return [c.name for group in each for c in group]


def _least(groups: Set) -> int:
    return min(c.size for group in groups for c in group)


def _several(sets: Sequence[Set]) -> Iterator[tuple[Set, ...]]:
    for number in range(2, MOST_TOGETHER + 1):
        yield from itertools.combinations(sets, number)


def _parts(make: Callable[[], nn.Module]) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """Return the function and the keyword arguments of a partial call."""
    if isinstance(make, functools.partial):
        return functools.partial(make.func, *make.args), dict(make.keywords)
    return make, {}


class _Attempts:
    """Shrinks of a model on paper."""

    def __init__(self, described: Described) -> None:
        self.compiled, self.described = described.compiled, described

    def fails(self, *sets: Set) -> str | None:
        """Say why nothing describes the model with sets of groups shrunk, each set to one share; None if it does."""
        keeps: dict[Coupling, int] = {}
        for groups in sets:
            share = self._half(groups)
            if share is None:
                sizes = sorted({c.size for group in groups for c in group})
                return f"{' and '.join(map(str, sizes))} entries have no share in common"
            keeps |= self._at(groups, share)
        found = self._numbers(keeps) if keeps else {}
        return found if isinstance(found, str) else None

    def _half(self, groups: Set) -> Fraction | None:
        """Return a share of about a half at which all couplings keep whole numbers; None where there is none."""
        parts = gcd(*(c.size for group in groups for c in group))
        return None if parts == 1 else Fraction(parts // 2, parts)

    def sizes(self, groups: Set, others: Sequence[Set]) -> Sequence[int] | None:
        """Return the sizes of the narrowest coupling of tied groups that pass the checks of the configuration.

        A few are tried, of each step that divides its size, with the other groups as they are and at half their size.

        Returns:
            The sizes below that of now; None where all that were tried pass.
        """
        least = _least(groups)
        parts = gcd(*(c.size for group in groups for c in group))
        likes = []
        for half in (False, True):
            rest: dict[Coupling, int] = {}
            for other in others if half else ():
                rest |= self._at(other, self._half(other) or Fraction(1))
            like = self._numbers({**rest, **self._at(groups, Fraction(parts // 2, parts))}, values=False)
            if isinstance(like, dict):
                likes.append((rest, like))

        def passes(share: Fraction) -> bool:
            keeps = self._at(groups, share)
            return all(
                isinstance(self._numbers({**rest, **keeps}, values=False, like=like), dict) for rest, like in likes
            )

        shares = [Fraction(part, parts) for part in range(1, parts)]
        if parts <= FEW:
            fitting = [share for share in shares if passes(share)]
            return None if fitting == shares else [int(share * least) for share in fitting]
        for step in (each for each in range(1, parts) if parts % each == 0):
            tried = {step, step * (parts // step // 2), step * (parts // step // 3 or 1), parts - step}
            if all(passes(Fraction(part, parts)) for part in tried):
                chosen = range(step, parts, step)
                return None if step == 1 else [int(Fraction(part, parts) * least) for part in chosen]
        return []

    def _at(self, groups: Set, share: Fraction) -> dict[Coupling, int]:
        return {c: int(c.size * share) for group in groups for c in group}

    def _numbers(
        self, keeps: Mapping[Coupling, int], *, values: bool = True, like: Mapping[Where, Number] | None = None
    ) -> Any:
        compiled = self.compiled
        selection = {c: torch.arange(keep) for c, keep in keeps.items()}
        joints = joint_offers(compiled.state, compiled.regions)
        plan = planned(compiled.plan, compiled.regions, compiled.couplings(), selection, joints)
        return self.described.numbers(plan, values=values, like=like)
