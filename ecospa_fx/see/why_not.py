"""Why not: what keeps a weight from shrinking, dim by dim, in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.passes.axes.algebra import Atom, atoms_of

from .snapshot import RegionSnapshot, Snapshot


@dataclass(frozen=True)
class WhyNot:
    """An answer in sentences.

    Attributes:
        name: the parameter or module that was asked about, in full.
        sentences: one or more per dim of each of its parameters.
    """

    name: str
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.sentences)


def why_not(known: Snapshot, couplings: tuple[Coupling, ...], name: str) -> WhyNot:
    """What keeps a parameter, or those of a module, from shrinking further.

    Raises:
        NoCouplingError: there is nothing of that name.
    """
    offered = {coupling.name: coupling for coupling in couplings}
    sentences: list[str] = []
    for parameter in known.parameters_of(name):
        region = known.region_of(parameter)
        first = known.ties.get(parameter, parameter)
        if region is None:
            sentences.append(
                f"{parameter} stays whole: it lies outside the regions that were captured "
                f"({', '.join(list(known.regions)[:2]) or 'none'}, ...), where nothing is looked at; "
                'regions="root" captures the whole model.'
            )
            continue
        inside = first.removeprefix(f"{region.name}.") if region.name else first
        if inside not in region.axis_facts.parameters:
            sentences.append(f"{parameter} stays whole: the call that was captured does not use it.")
            continue
        for dim, expr in enumerate(region.axis_facts.parameters[inside]):
            for atom in dict.fromkeys(atoms_of(expr)):
                sentences += _about(f"{parameter}[{dim}]", atom, region, offered, known.tensors[parameter][0][dim])
    return WhyNot(known.resolve(name), tuple(sentences))


def _about(axis: str, atom: Atom, region: RegionSnapshot, offered: dict[str, Coupling], size: int) -> Iterator[str]:
    entries = region.count(atom)
    along = f"its axis of {entries}" + ("" if entries == size else f" (of {size} in all)")
    found = next((name for name, other in region.couplings() if other is atom), None)
    if found in offered:
        coupling = offered[found]
        yield f"{axis} can shrink along {along}: {found} may lose all but one of its {coupling.size} entries."
        return
    others = [f"{name}[{dim}]" for name, dim in region.axes_along(atom) if f"{name}[{dim}]" != axis]
    shared = f", which it shares with {_listed(others)}," if others else ""
    reasons = region.reasons(atom)
    if found is not None:
        yield f"{axis} cannot shrink along {along}: another way in which the model was called needs it whole."
    elif reasons:
        yield f"{axis} cannot shrink along {along}{shared} because"
        for number, reason in enumerate(reasons):
            yield f"  {'and ' if number else ''}{reason}{'.' if number == len(reasons) - 1 else ''}"
    else:
        yield (
            f"{axis} has no partner along {along}: no weight of the region brings it into a "
            "product in which another one sums over it."
        )


def _listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
