"""Ties: couplings whose sizes stand in a fixed proportion, because blocks repeat or a setting says so.

alike(couplings)        couplings that lie on repeated blocks in the same way, found by structure
Ties                    a union-find of couplings with the proportion of their sizes
TiedCouplings           couplings that shrink together, with the sizes that all of them may have
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ecospa_fx.errors import TargetError

from .coupling import Coupling

Place = tuple[str, int, "int | None"]  # general name of a parameter, dim, segment


@dataclass(frozen=True, eq=False)
class TiedCouplings:
    """Couplings that shrink together, in a fixed proportion of their sizes; as a rule just one.

    Attributes:
        couplings: the couplings, the one with the fewest entries first.
        sizes: sizes that the first coupling may have, ascending. The last is its size now, unless a constraint forbids
            that; then `due` holds.
        scales: entries of each coupling for one of the first.
    """

    couplings: tuple[Coupling, ...]
    sizes: tuple[int, ...]
    scales: tuple[Fraction, ...]

    @property
    def name(self) -> str:
        """Name of the first coupling."""
        return self.couplings[0].name

    @property
    def due(self) -> bool:
        """True where the sizes of now are not allowed, so that the couplings must shrink at the next opportunity."""
        return any(keep != coupling.size for coupling, keep in self.keeps(self.sizes[-1]).items())

    def keeps(self, size: int) -> dict[Coupling, int]:
        """Return the size of each coupling when the first one has `size`."""
        return {c: int(size * scale) for c, scale in zip(self.couplings, self.scales, strict=True)}

    @property
    def below(self) -> int | None:
        """The largest allowed size of the first coupling at which something is removed; None where there is none."""
        return self.sizes[-1] if self.due else self.sizes[-2] if len(self.sizes) > 1 else None


class Ties:
    """Couplings joined by the proportions of their sizes.

    Args:
        couplings: all that there are.
    """

    def __init__(self, couplings: Iterable[Coupling]) -> None:
        self._root = {c: (c, Fraction(1)) for c in couplings}  # a coupling of its group, and entries for one of that
        self._groups = {c: [c] for c in self._root}
        self._why = dict.fromkeys(self._root, "")

    def join(self, a: Coupling, b: Coupling, entries_of_a: int, entries_of_b: int, why: str) -> None:
        """Let `b` have `entries_of_b` entries for each `entries_of_a` of `a`.

        Raises:
            TargetError: other ties say otherwise.
        """
        (first, of_a), (second, of_b) = self._root[a], self._root[b]
        proportion = Fraction(entries_of_b, entries_of_a)
        if first == second:
            if of_b != of_a * proportion:
                raise TargetError(
                    f"{why} wants {entries_of_b} entries of `{b.name}` for {entries_of_a} of `{a.name}`, and "
                    f"{self._why[first]} wants {of_b.numerator * of_a.denominator} for "
                    f"{of_a.numerator * of_b.denominator}; leave one of the two settings out"
                )
            return
        scale = of_a * proportion / of_b
        for coupling in self._groups.pop(second):
            self._root[coupling] = first, self._root[coupling][1] * scale
            self._groups[first].append(coupling)
        reasons = [self._why.pop(second), why]
        self._why[first] = ", ".join(dict.fromkeys(filter(None, [*self._why[first].split(", "), *reasons])))

    def groups(self) -> list[tuple[tuple[Coupling, ...], tuple[Fraction, ...], str]]:
        """Return couplings that are tied, the one with the fewest entries first, their scales, and what ties them."""
        result = []
        for first, group in self._groups.items():
            ordered = sorted(group, key=lambda c: self._root[c][1])
            least = self._root[ordered[0]][1]
            result.append((tuple(ordered), tuple(self._root[c][1] / least for c in ordered), self._why[first]))
        return result


def alike(couplings: Iterable[Coupling]) -> list[list[Coupling]]:
    """Group the couplings that lie on repeated blocks in the same way.

    They have equal kinds and original sizes, and lie on the same dims of parameters whose names differ in nothing but
    the positions of blocks in lists (`nn.ModuleList`, `nn.Sequential`): `layers.0.up.weight` and `layers.1.up.weight`.
    """
    groups: dict[tuple[object, ...], list[Coupling]] = {}
    for coupling in couplings:
        groups.setdefault((coupling.kind, coupling.original_size, _places(coupling)), []).append(coupling)
    return list(groups.values())


def _places(coupling: Coupling) -> tuple[Place, ...]:
    names = general_names([m.parameter for m in coupling.members])
    return tuple(sorted(((names[m.parameter], m.dim, m.part) for m in coupling.members), key=repr))


def general_names(names: Sequence[str]) -> dict[str, str]:
    """Return names with positions in lists counted from the first that occurs among them.

    >>> general_names(["layers.3.up.weight", "layers.4.down.weight"])
    {'layers.3.up.weight': 'layers.#0.up.weight', 'layers.4.down.weight': 'layers.#1.down.weight'}
    """
    general: dict[str, list[str]] = {name: [] for name in names}
    parts = {name: name.split(".") for name in general}
    for depth in range(max((len(each) for each in parts.values()), default=0)):
        least: dict[str, int] = {}
        here = {name: each[depth] for name, each in parts.items() if depth < len(each)}
        for name, part in here.items():
            if part.isdecimal():
                prefix = ".".join(general[name])
                least[prefix] = min(int(part), least.get(prefix, int(part)))
        before = {name: ".".join(general[name]) for name in here}
        for name, part in here.items():
            general[name].append(f"#{int(part) - least[before[name]]}" if part.isdecimal() else part)
    return {name: ".".join(each) for name, each in general.items()}


class CorrespondingAxes:
    """The axes of all parameters, by general name.

    Args:
        shapes: parameter name -> its shape now.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self._named: dict[tuple[str, int], list[tuple[str, int]]] = {}
        for name, shape in shapes.items():
            general = general_names([name])[name]
            for dim, size in enumerate(shape):
                self._named.setdefault((general, dim), []).append((name, size))

    def loose(self, group: Sequence[Coupling]) -> str | None:
        """Return an axis that corresponds to those of a group of alike couplings and lies on none of them, if any.

        One of another size is another thing; and where one coupling reaches over several blocks, none corresponds.
        """
        first = group[0]
        names = general_names([m.parameter for m in first.members])
        if any(part[0] == "#" and part != "#0" for name in names.values() for part in name.split(".")):
            return None
        on = {(m.parameter, m.dim) for c in group for m in c.members}
        for m in first.members:
            for name, size in self._named.get((names[m.parameter], m.dim), ()):
                if (name, m.dim) not in on and size == len(m.index):
                    return f"{name}[{m.dim}]"
        return None
