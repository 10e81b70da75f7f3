"""Constraints: the sizes that couplings may shrink to, and the couplings that must not shrink at all."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import gcd
from typing import Literal, TypeAlias, get_args

from torch import nn

from ecospa_fx.arguments import FLAG, MODULE, SEVERAL, Kind, check, takes
from ecospa_fx.errors import TargetError

from .coupling import Coupling

COUPLINGS = Kind(
    "couplings, as ecospa_fx.couplings(model) returns them",
    lambda value: isinstance(value, Sequence) and all(isinstance(each, Coupling) for each in value),
)
HeadDims = Literal["per_head", "per_layer", "off"]
Frozen: TypeAlias = "str | nn.Module | Coupling"


@dataclass(frozen=True)
class Constraints:
    """The conditions that every shrink meets.

    Attributes:
        min_keep: number of entries that every coupling keeps at least.
        round_to: widths come out as multiples of it (8 or 64 for tensor cores), except those of heads and query groups,
            which are numbers of heads. A rotary pair is two rows wide, so that 8 means 4 pairs. A coupling narrower
            than it stays at full size.
        head_dims: the dims kept inside heads: `"per_head"`, as many in each head, and other ones in each where that is
            exact; `"per_layer"`, the same dims in every head of a layer; `"off"`, all dims.
        equal_head_dims: queries and keys keep as many dims as values, as FlashAttention-2 requires. Where that is
            impossible (one of them may shrink and the other may not) both stay at full size.
        frozen: patterns of coupling or parameter names (`"*.layers.0.*"`), modules and couplings that stay at full
            size.
    """

    min_keep: int = 1
    round_to: int = 1
    head_dims: HeadDims = "per_head"
    equal_head_dims: bool = False
    frozen: Sequence[Frozen] = ()

    def __post_init__(self) -> None:
        for name, value in (("min_keep", self.min_keep), ("round_to", self.round_to)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TargetError(f"{name}={value!r} is out of range; it is a whole number, at least 1")
        if not isinstance(self.head_dims, str) or self.head_dims not in get_args(HeadDims):
            raise TargetError(f"head_dims={self.head_dims!r} is none of {', '.join(map(repr, get_args(HeadDims)))}")
        check(self.equal_head_dims, FLAG, "equal_head_dims", "Constraints")
        if isinstance(self.frozen, str):
            raise TargetError(f"frozen={self.frozen!r} is one string; pass a list of them")
        check(self.frozen, SEVERAL, "frozen", "Constraints")

    def described(self) -> dict[str, object]:
        """Return the constraints as plain values, to be saved."""
        frozen = [
            e if isinstance(e, str) else e.name if isinstance(e, Coupling) else type(e).__name__ for e in self.frozen
        ]
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"frozen": frozen}

    @takes(model=MODULE, couplings=COUPLINGS)
    def units(self, model: nn.Module, couplings: Sequence[Coupling]) -> tuple[list[TiedCouplings], dict[str, str]]:
        """Group the couplings that may shrink into units that shrink together.

        Returns:
            The units, and the reason for each coupling that stays at full size, by its name.

        Raises:
            TargetError: an entry of `frozen` names nothing.
        """
        full_size = self._frozen(model, couplings)
        if self.head_dims == "off":
            full_size |= {c.name: 'head_dims="off"' for c in couplings if _inside_heads(c)}
        groups: dict[str, list[Coupling]] = {}
        if self.equal_head_dims:
            for coupling in couplings:
                if coupling.kind in ("qk", "vo"):
                    groups.setdefault(coupling.attention or coupling.name, []).append(coupling)
            for group in groups.values():
                if not _can_be_equal(group) or any(c.name in full_size for c in group):
                    reason = "equal_head_dims: its queries and keys cannot shrink in step with its values"
                    full_size |= {c.name: reason for c in group if c.name not in full_size}
        paired = {c.name: group for group in groups.values() for c in group}
        units = []
        for coupling in couplings:
            group = paired.get(coupling.name, [coupling])
            if coupling.name not in full_size and coupling is group[0]:
                units.append(TiedCouplings(tuple(sorted(group, key=lambda c: -c.width)), self._sizes(group)))
        return units, full_size

    def _sizes(self, group: Sequence[Coupling]) -> tuple[int, ...]:
        """Return the sizes that the coupling of a group with the widest entries may shrink to, ascending."""
        leader = max(group, key=lambda c: c.width)
        step = 1
        if leader.kind not in ("heads", "groups"):
            step = self.round_to // gcd(self.round_to, leader.width)
        return (*(size for size in range(step, leader.size, step) if size >= self.min_keep), leader.size)

    def _frozen(self, model: nn.Module, couplings: Sequence[Coupling]) -> dict[str, str]:
        """Return the couplings that `frozen` keeps at full size, with the reason.

        An entry may match parameters without couplings, but it must match something.
        """
        frozen: dict[str, str] = {}
        parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
        for entry in self.frozen:
            if isinstance(entry, str):
                what, matches = f"`{entry}`", [c for c in couplings if _matches(entry, c)]
                exists = bool(matches) or any(_names(entry, name) for name in parameters)
            elif isinstance(entry, Coupling):
                what, matches = f"`{entry.name}`", [c for c in couplings if c == entry]
                exists = bool(matches)
            elif isinstance(entry, nn.Module):
                what, inside = f"this {type(entry).__name__}", {id(p) for p in entry.parameters()}
                matches = [c for c in couplings if any(parameters[m.parameter] in inside for m in c.members)]
                exists = any(entry is module for module in model.modules())
            else:
                raise TargetError(f"frozen holds {entry!r}; it takes name patterns, modules and couplings")
            if not exists:
                raise TargetError(
                    f"frozen: nothing in this {type(model).__name__} matches {what}; ecospa_fx.couplings(model) and "
                    "model.named_parameters() list the names"
                )
            frozen |= {c.name: f"frozen by {what}" for c in matches}
        return frozen


@dataclass(frozen=True, eq=False)
class TiedCouplings:
    """Couplings that shrink together, so that their widths stay equal; as a rule just one.

    Attributes:
        couplings: the couplings, the one with the widest entries first.
        sizes: sizes that the first coupling may shrink to, ascending; the last is its size now.
    """

    couplings: tuple[Coupling, ...]
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the first coupling."""
        return self.couplings[0].name

    def keeps(self, size: int) -> dict[Coupling, int]:
        """Return the size of each coupling when the first one has `size`."""
        first = self.couplings[0]
        return {c: size * first.width // c.width for c in self.couplings}

    def rounded(self, size: int) -> int:
        """Return the least allowed size of the first coupling that is not below `size`."""
        return next(allowed for allowed in self.sizes if allowed >= min(size, self.sizes[-1]))

    def size_for(self, coupling: Coupling, keep: int) -> int:
        """Return the least size of the first coupling at which `coupling` keeps `keep` entries."""
        return -(-keep * coupling.width // self.couplings[0].width)


def _inside_heads(coupling: Coupling) -> bool:
    return coupling.kind in ("qk", "vo")


def _can_be_equal(group: Sequence[Coupling]) -> bool:
    """Decide whether a group is one `qk` and one `vo`, equally wide, the wider entry a multiple of the narrower."""
    if sorted(c.kind for c in group) != ["qk", "vo"]:
        return False
    a, b = sorted(group, key=lambda c: -c.width)
    return a.size * a.width == b.size * b.width and a.width % b.width == 0


def _matches(pattern: str, coupling: Coupling) -> bool:
    return any(_names(pattern, name) for name in (coupling.name, *(m.parameter for m in coupling.members)))


def _names(pattern: str, name: str) -> bool:
    """Decide whether a pattern matches a name, or a module that contains it."""
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
