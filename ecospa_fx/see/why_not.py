"""Why not: the reasons that keep a weight from shrinking, dim by dim, in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.passes.axes.algebra import Atom, atoms_of

from .snapshot import RegionSnapshot, Snapshot


@dataclass(frozen=True)
class WhyNot:
    """The answer to `why_not`, in sentences.

    Attributes:
        name: full name of the parameter or module in question.
        sentences: one or more per dim of each of its parameters.
    """

    name: str
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.sentences)


def why_not(snapshot: Snapshot, couplings: tuple[Coupling, ...], name: str) -> WhyNot:
    """Explain what keeps a parameter, or those of a module, from shrinking further.

    Raises:
        NoCouplingError: the model has nothing of that name.
    """
    offered = {coupling.name: coupling for coupling in couplings}
    sentences: list[str] = []
    for parameter in snapshot.parameters_of(name):
        region = snapshot.region_of(parameter)
        first = snapshot.ties.get(parameter, parameter)
        outside = [c for c in couplings if region is None and any(m.parameter == first for m in c.members)]
        for coupling in outside:
            dims = ", ".join(f"{m.parameter}[{m.dim}]" for m in coupling.members if m.parameter == first)
            sentences.append(f"{dims} can shrink: {coupling.name} may lose all but one of its {coupling.size} entries.")
        if outside:
            continue
        if region is None:
            sentences.append(
                f"{parameter} stays whole: it lies outside the captured regions "
                f"({', '.join(list(snapshot.regions)[:2]) or 'none'}, ...), and only these are analysed; "
                'regions="root" captures the whole model.'
            )
            continue
        inside = first.removeprefix(f"{region.name}.") if region.name else first
        if inside not in region.axis_facts.parameters:
            sentences.append(f"{parameter} stays whole: the captured call does not use it.")
            continue
        for dim, expr in enumerate(region.axis_facts.parameters[inside]):
            for atom in dict.fromkeys(atoms_of(expr)):
                sentences += _about(f"{parameter}[{dim}]", atom, region, offered, snapshot.tensors[parameter][0][dim])
    return WhyNot(snapshot.resolve(name), tuple(sentences))


def _about(axis: str, atom: Atom, region: RegionSnapshot, offered: dict[str, Coupling], size: int) -> Iterator[str]:
    entries = region.count(atom)
    along = f"its axis of {entries}" + ("" if entries == size else f" (of {size} in all)")
    coupled = next((name for name, other in region.couplings() if other is atom), None)
    if coupled in offered:
        coupling = offered[coupled]
        yield f"{axis} can shrink along {along}: {coupled} may lose all but one of its {coupling.size} entries."
        return
    others = [f"{name}[{dim}]" for name, dim in region.axes_along(atom) if f"{name}[{dim}]" != axis]
    shared = f", which it shares with {_listed(others)}," if others else ""
    reasons = region.reasons(atom)
    if coupled is not None:
        yield f"{axis} cannot shrink along {along}: another captured call of the model needs it whole."
    elif reasons:
        yield f"{axis} cannot shrink along {along}{shared} because"
        for number, reason in enumerate(reasons):
            yield f"  {'and ' if number else ''}{reason}{'.' if number == len(reasons) - 1 else ''}"
    else:
        yield (
            f"{axis} has no partner along {along}: no weight of the region sums over entries that another one "
            "produces along it."
        )


def _listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
