"""Constraints: the sizes that couplings may shrink to, and the couplings that must not shrink at all."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from math import ceil, gcd, lcm
from typing import Literal, TypeAlias, get_args

from torch import nn

from ecospa_fx.arguments import FLAG, MAPPING, MODULE, SEVERAL, check, instances, takes
from ecospa_fx.errors import ShrinkError, TargetError
from ecospa_fx.passes.find.discover import Kind
from ecospa_fx.passes.graph.tensors import parameters_of

from .coupling import Coupling
from .ties import CorrespondingAxes, TiedCouplings, Ties, alike

Uniform = Literal["layers"]
HeadDims = Literal["per_head", "per_layer", "off"]
Frozen: TypeAlias = "str | nn.Module | Coupling"


@dataclass(frozen=True)
class Constraints:
    """The conditions that every shrink meets.

    Attributes:
        min_keep: number of entries that every coupling keeps at least. With 0 a coupling may lose its last entry too
            where what it feeds is then a constant, so that its sublayer goes; see `Coupling.last_stays`.
        round_to: widths come out as multiples of it (8 or 64 for tensor cores), except those of heads and query groups,
            and of experts, which are numbers of these. A rotary pair is two rows wide, so that 8 means 4 pairs. A
            coupling narrower than it stays at full size.
        head_dims: the dims kept inside heads: `"per_head"`, as many in each head, and other ones in each where that is
            exact; `"per_layer"`, the same dims in every head of a layer; `"off"`, all dims.
        equal_head_dims: queries and keys keep as many dims as values, as FlashAttention-2 requires. Where that is
            impossible (one of them may shrink and the other may not) both stay at full size.
        frozen: patterns of coupling or parameter names (`"*.layers.0.*"`), modules and couplings that stay at full
            size.
        uniform: `"layers"`: couplings that lie on repeated blocks in the same way keep as many entries each, though not
            the same ones. Where one of them must stay whole, all do.
        multiple_of: kind of couplings -> a number that their widths are multiples of, on top of `round_to`:
            `{"heads": 4, "glu": 256}`; of `heads`, `groups` and `experts` their number. Unlike with `round_to`, a width
            that is not a multiple now shrinks to one at the first opportunity.
        tied: groups of coupling names that keep the same share of their original entries.
        whole: coupling name -> the reason why it stays as it is.
        allowed: coupling name -> the sizes that it may have beside that of now; any, where it is not named.
    """

    min_keep: int = 1
    round_to: int = 1
    head_dims: HeadDims = "per_head"
    equal_head_dims: bool = False
    frozen: Sequence[Frozen] = ()
    uniform: Uniform | None = None
    multiple_of: Mapping[str, int] = field(default_factory=dict)
    tied: Sequence[Sequence[str]] = ()
    whole: Mapping[str, str] = field(default_factory=dict)
    allowed: Mapping[str, Collection[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, least in (("min_keep", self.min_keep, 0), ("round_to", self.round_to, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise TargetError(f"{name}={value!r} is out of range; it is a whole number, at least {least}")
        _check_option("head_dims", self.head_dims, get_args(HeadDims))
        if self.uniform is not None:
            _check_option("uniform", self.uniform, get_args(Uniform))
        check(self.multiple_of, MAPPING, "multiple_of", "Constraints")
        for kind, multiple in self.multiple_of.items():
            if kind not in get_args(Kind):
                raise TargetError(
                    f"multiple_of has {kind!r}, which is not a kind; kinds are {', '.join(get_args(Kind))}"
                )
            if not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1:
                raise TargetError(
                    f"multiple_of[{kind!r}]={multiple!r} is out of range; it is a whole number, at least 1"
                )
        check(self.equal_head_dims, FLAG, "equal_head_dims", "Constraints")
        if isinstance(self.frozen, str):
            raise TargetError(f"frozen={self.frozen!r} is one string; pass a list of them")
        check(self.frozen, SEVERAL, "frozen", "Constraints")

    def described(self) -> dict[str, object]:
        """Return the constraints as plain values, to be saved."""
        frozen = [
            e if isinstance(e, str) else e.name if isinstance(e, Coupling) else type(e).__name__ for e in self.frozen
        ]
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain |= {"multiple_of": dict(self.multiple_of), "tied": [list(group) for group in self.tied]}
        allowed = {name: sorted(sizes) for name, sizes in self.allowed.items()}
        return plain | {"frozen": frozen, "whole": dict(self.whole), "allowed": allowed}

    @takes(model=MODULE, couplings=instances("couplings, as ecospa_fx.couplings(model) returns them", Coupling))
    def units(self, model: nn.Module, couplings: Sequence[Coupling]) -> tuple[list[TiedCouplings], dict[str, str]]:
        """Group the couplings that may shrink into units that shrink together.

        Returns:
            The units, and the reason for each coupling that stays at its size, by its name.

        Raises:
            TargetError: an entry of `frozen` names nothing, a multiple is larger than an axis, or no sizes meet all
                conditions at once.
        """
        whole = self._frozen(model, couplings) | {c.name: self.whole[c.name] for c in couplings if c.name in self.whole}
        whole |= {c.name: "tensor parallelism cuts its entries apart" for c in couplings if not c.parts}
        if self.head_dims == "off":
            whole |= {c.name: 'head_dims="off"' for c in couplings if _inside_heads(c)}
        ties = Ties(couplings)
        self._tie_head_dims(ties, couplings, whole)
        self._tie_named(ties, couplings)
        by_name = {c.name: c for c in couplings}
        for coupling in couplings:
            for other in (by_name[name] for name in coupling.in_step if name in by_name):
                ties.join(coupling, other, coupling.original_size, other.original_size, "its own Python")
        if self.uniform is not None:
            axes = CorrespondingAxes({name: tuple(p.shape) for name, p in parameters_of(model)})
            for group in alike(c for c in couplings if c.size):  # those that are gone say nothing
                for other in group[1:]:
                    ties.join(group[0], other, 1, 1, f"uniform={self.uniform!r}")
                loose = axes.loose(group)
                if loose is not None:
                    why = f"uniform={self.uniform!r}: `{loose}` corresponds to it and is on no coupling"
                    whole = {c.name: why for c in group} | whole
        units = []
        for tied, scales, why in ties.groups():
            sizes = self._sizes(tied, scales, why, whole)
            unit = TiedCouplings(tied, sizes, scales)
            held = next((c for c in tied if c.name in whole), None)
            if held is None or unit.due:
                units.append(unit)
            else:
                reason = f"{why} ties it to `{held.name}`, which stays whole: {whole[held.name]}"
                whole |= {c.name: reason for c in tied if c.name not in whole}
        place = {c: number for number, c in enumerate(couplings)}
        return sorted(units, key=lambda unit: min(place[c] for c in unit.couplings)), whole

    def check(self, model: nn.Module, couplings: Sequence[Coupling], keeps: Mapping[Coupling, int]) -> None:
        """Refuse sizes that do not meet the conditions.

        Args:
            model: the model.
            couplings: its couplings, at their sizes now.
            keeps: coupling -> size after a shrink; others stay as they are.

        Raises:
            ShrinkError: they do not.
        """
        units, whole = self.units(model, couplings)
        for coupling, keep in keeps.items():
            if coupling.name in whole and keep != coupling.size:
                raise ShrinkError(f"cannot shrink `{coupling.name}`: {whole[coupling.name]}")
            if not keep:
                check_none_left(coupling)
        for unit in units:
            after = {c: keeps.get(c, c.size) for c in unit.couplings}
            if after not in [unit.keeps(size) for size in unit.sizes]:
                listed = ", ".join(f"`{c.name}` to {size}" for c, size in list(after.items())[:4])
                allowed = ", ".join(map(str, unit.sizes[-8:]))
                raise ShrinkError(
                    f"cannot shrink {listed}: by the constraints `{unit.name}` may have {allowed}"
                    + (f", and {len(after) - 1} others in proportion" if len(after) > 1 else "")
                )

    def _tie_head_dims(self, ties: Ties, couplings: Sequence[Coupling], whole: dict[str, str]) -> None:
        """Tie queries and keys to values, or leave both whole."""
        groups: dict[str, list[Coupling]] = {}
        for coupling in couplings if self.equal_head_dims else ():
            if coupling.kind in ("qk", "vo"):
                groups.setdefault(coupling.attention or coupling.name, []).append(coupling)
        for group in groups.values():
            if not _can_be_equal(group) or any(c.name in whole for c in group):
                reason = "equal_head_dims: its queries and keys cannot shrink in step with its values"
                whole |= {c.name: reason for c in group if c.name not in whole}
            else:
                a, b = group
                ties.join(a, b, b.width, a.width, "equal_head_dims")

    def _tie_named(self, ties: Ties, couplings: Sequence[Coupling]) -> None:
        by_name = {c.name: c for c in couplings}
        for group in self.tied:
            present = [by_name[name] for name in group if name in by_name]
            for other in present[1:]:
                ties.join(present[0], other, present[0].original_size, other.original_size, "tied")

    def _sizes(
        self, group: Sequence[Coupling], scales: Sequence[Fraction], why: str, whole: Mapping[str, str]
    ) -> tuple[int, ...]:
        """Return the sizes that the first coupling of a group may have so that all may have theirs, ascending.

        Raises:
            TargetError: there are none.
        """
        widths = [1 if _counts_heads(c) else c.width for c in group]
        for coupling, width in zip(group, widths, strict=True):
            if coupling.name not in whole:
                self._check_multiple(coupling, width)
        parts = list(zip(group, scales, widths, strict=True))
        most = min(c.size / scale for c, scale, _ in parts)
        held = [c.size / scale for c, scale, _ in parts if c.name in whole]
        sizes: list[int] = []
        if not held:
            # The first coupling must have a multiple of this, so that all have whole, allowed numbers of entries.
            steps = [(self._step(c, width), scale) for c, scale, width in parts]
            step = lcm(*(scale.denominator * each // gcd(each, scale.numerator) for each, scale in steps))
            least = max(max(self.min_keep, c.least) / scale for c, scale, _ in parts)
            sizes = [size for size in range(step, ceil(most), step) if size >= least]
            if self.min_keep == 0 and most and all(c.smallest == 0 for c in group):
                sizes = [0, *sizes]
            for coupling, scale, _ in parts:
                if coupling.name in self.allowed:
                    sizes = [size for size in sizes if int(size * scale) in self.allowed[coupling.name]]
        last = Fraction(held[0] if held else most)
        if last <= most and all(self._allows(c, last * scale, width, whole) for c, scale, width in parts):
            sizes.append(int(last))
        if sizes:
            return tuple(sizes)
        settings = [f"`{c.name}` stays at {c.size} ({whole[c.name]})" for c in group if c.name in whole][:1]
        settings += [why] if why else []
        settings += [f"min_keep={self.min_keep}"] if self.min_keep > 1 else []
        settings += [f"at least {c.least} of `{c.name}`" for c in group if c.least > 1]
        settings += [f"round_to={self.round_to}"] if self.round_to > 1 else []
        settings += [f"multiple_of={dict(self.multiple_of)!r}"] if self.multiple_of else []
        listed = ", ".join(f"`{c.name}` {c.size}" for c in group[:4])
        raise TargetError(f"no sizes meet all of {', '.join(settings)}; the sizes now are {listed}; loosen one of them")

    def _step(self, coupling: Coupling, width: int) -> int:
        """Return the number that the entries of a coupling which shrinks are a multiple of."""
        multiple = self.multiple_of.get(coupling.kind, 1)
        round_to = 1 if _counts_heads(coupling) else self.round_to
        return lcm(round_to // gcd(round_to, width), multiple // gcd(multiple, width), coupling.parts or 1)

    def _allows(self, coupling: Coupling, keep: Fraction, width: int, whole: Mapping[str, str]) -> bool:
        """Decide whether a coupling may have `keep` entries."""
        if keep == coupling.size:
            return coupling.name in whole or not keep * width % self.multiple_of.get(coupling.kind, 1)
        if coupling.name in whole or keep.denominator != 1 or keep not in self.allowed.get(coupling.name, (keep,)):
            return False
        if not keep:
            return self.min_keep == 0 and coupling.smallest == 0
        return max(self.min_keep, coupling.least) <= keep < coupling.size and not keep % self._step(coupling, width)

    def _check_multiple(self, coupling: Coupling, width: int) -> None:
        """Refuse a multiple that a coupling is too narrow for.

        Raises:
            TargetError: it is.
        """
        multiple, rows = self.multiple_of.get(coupling.kind, 1), coupling.size * width
        if 0 < rows < multiple:
            raise TargetError(
                f"multiple_of[{coupling.kind!r}]={multiple} is more than the {rows} of `{coupling.name}`; choose at "
                f"most {rows}, or keep it whole with frozen=[{coupling.name!r}]"
            )

    def _frozen(self, model: nn.Module, couplings: Sequence[Coupling]) -> dict[str, str]:
        """Return the couplings that `frozen` keeps at full size, with the reason.

        An entry may match parameters without couplings, but it must match something.
        """
        frozen: dict[str, str] = {}
        parameters = {name: id(p) for name, p in parameters_of(model, remove_duplicate=False)}
        for entry in self.frozen:
            if isinstance(entry, str):
                what, matches = f"`{entry}`", [c for c in couplings if fits_name(entry, c)]
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


def check_none_left(coupling: Coupling) -> None:
    """Refuse to remove all entries of a coupling that needs one.

    Raises:
        ShrinkError: it does.
    """
    if coupling.size and coupling.last_stays is not None:
        raise ShrinkError(
            f"cannot shrink `{coupling.name}` to nothing: {coupling.last_stays}; keep at least {coupling.least} of its "
            f"{coupling.size} entries"
        )


def _check_option(name: str, value: object, options: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in options:
        raise TargetError(f"{name}={value!r} is none of {', '.join(map(repr, options))}")


def _counts_heads(coupling: Coupling) -> bool:
    return coupling.kind in ("heads", "groups", "experts")


def _inside_heads(coupling: Coupling) -> bool:
    return coupling.kind in ("qk", "vo")


def _can_be_equal(group: Sequence[Coupling]) -> bool:
    """Decide whether a group is one `qk` and one `vo`, equally wide, the wider entry a multiple of the narrower."""
    if sorted(c.kind for c in group) != ["qk", "vo"]:
        return False
    a, b = sorted(group, key=lambda c: -c.width)
    return a.size * a.width == b.size * b.width and a.width % b.width == 0


def fits_name(pattern: str, coupling: Coupling) -> bool:
    """Decide whether a pattern matches the name of a coupling or of one of its parameters, or a module around these."""
    return any(_names(pattern, name) for name in (coupling.name, *(m.parameter for m in coupling.members)))


def _names(pattern: str, name: str) -> bool:
    """Decide whether a pattern matches a name, or a module that contains it."""
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
