"""Savings: the parameters, bytes and FLOPs that each coupling can save. Arithmetic on axes; no tensor is touched."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod

from rich.table import Table

from ecospa_fx.couple.coupling import Coupling, Member
from ecospa_fx.model.cost import flop_terms
from ecospa_fx.passes.axes.algebra import Atom, atoms_of
from ecospa_fx.passes.graph.tensors import join
from ecospa_fx.text import count, plain, size

from .fold import fold_couplings, heading
from .snapshot import RegionSnapshot, Snapshot


@dataclass(frozen=True)
class Saving:
    """The savings from removing entries of one coupling.

    Attributes:
        coupling: name of the coupling.
        entries: number of entries that can be removed: all but one.
        parameters: parameters saved per entry.
        bytes: bytes of weights saved per entry; four times as many in training, with gradients and AdamW's two moments.
        flops: FLOPs saved per entry in one forward of the captured call; a backward takes about twice as many.
        most_parameters: parameters saved if all but one entry are removed.
        most_bytes: bytes saved if all but one entry are removed.
        most_flops: FLOPs saved if all but one entry are removed.
    """

    coupling: str
    entries: int
    parameters: int
    bytes: int
    flops: int
    most_parameters: int
    most_bytes: int
    most_flops: int


@dataclass(frozen=True, eq=False)
class Savings:
    """The savings of all couplings. Entries that two couplings share (a head's dims) count in both: do not add them up.

    Attributes:
        by_coupling: savings by name of the coupling.
        parameters: parameters of the model now.
        bytes: bytes of its parameters.
        flops: FLOPs of one forward of the captured regions: matrix products and convolutions.
        couplings: the couplings.
    """

    by_coupling: dict[str, Saving]
    parameters: int
    bytes: int
    flops: int
    couplings: tuple[Coupling, ...]

    def __getitem__(self, coupling: Coupling | str) -> Saving:
        return self.by_coupling[coupling if isinstance(coupling, str) else coupling.name]

    def __iter__(self) -> Iterator[Saving]:
        return iter(self.by_coupling.values())

    def __len__(self) -> int:
        return len(self.by_coupling)

    def __repr__(self) -> str:
        return f"<Savings of {len(self)} couplings in {self.parameters:,} parameters>"

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, show_edge=False)
        table.add_column("coupling", overflow="fold")
        table.add_column("times", justify="right")
        for name in ("an entry:\nparameters", "\nFLOPs", "all but one:\nparameters", "\nshare", "\nFLOPs"):
            table.add_column(name, justify="right", no_wrap=True)
        last = None
        for fold in fold_couplings(self.couplings):
            if fold.module != last:
                last = fold.module
                table.add_row(heading(fold.module))
            saving = self[fold.couplings[0]]
            times = len(fold.couplings)
            table.add_row(
                f"  {fold.tail}",
                str(times),
                count(saving.parameters),
                count(saving.flops),
                count(times * saving.most_parameters),
                f"{times * saving.most_parameters / max(1, self.parameters):.1%}",
                count(times * saving.most_flops),
            )
        return table

    def __str__(self) -> str:
        head = (
            f"{self.parameters:,} parameters, {size(self.bytes)}; {count(self.flops)} FLOPs in one forward of the "
            f"{'regions' if self.by_coupling else 'model'}"
        )
        return f"{head}\n\n{plain(self.__rich__())}"

    def to_json(self) -> str:
        """Return the savings as JSON."""
        document = {
            "parameters": self.parameters,
            "bytes": self.bytes,
            "flops": self.flops,
            "by_coupling": {name: asdict(saving) for name, saving in self.by_coupling.items()},
        }
        return json.dumps(document, indent=1)


def savings_of(snapshot: Snapshot, couplings: tuple[Coupling, ...]) -> Savings:
    """Compute the savings of each coupling."""
    offered = {coupling.name: coupling for coupling in couplings}
    by_coupling: dict[str, Saving] = {}
    flops = 0
    shared: dict[tuple[int, str], Saving] = {}  # equal blocks of original size share their axis facts
    totals: dict[int, int] = {}
    for region in snapshot.regions.values():
        key = id(region.axis_facts.facts)
        costs = _Costs(snapshot, region)
        if region.sizes:
            flops += costs.flops(region.sizes)
        else:
            totals[key] = totals.get(key) or costs.flops({})
            flops += totals[key]
        for name, atom in region.couplings():
            if name not in offered:
                continue
            mark = key, name.removeprefix(f"{region.name}.")
            if region.sizes or atom in region.across:
                # A coupling across regions saves something in each; weights tied across them count in one.
                by_coupling[name] = _sum(by_coupling.get(name), costs.saving(name, atom, offered[name].size))
                continue
            if mark not in shared:
                shared[mark] = costs.saving(name, atom, offered[name].size)
            by_coupling[name] = replace(shared[mark], coupling=name)
    for coupling in couplings:
        for member in coupling.members:
            if snapshot.region_of(member.parameter) is None and coupling.name in by_coupling:
                by_coupling[coupling.name] = _sum(by_coupling[coupling.name], _outside(snapshot, coupling, member))
    weights = sum(prod(shape) * width for name, (shape, width) in snapshot.tensors.items() if name not in snapshot.ties)
    return Savings(by_coupling, snapshot.parameters, weights, flops, couplings)


def _sum(a: Saving | None, b: Saving) -> Saving:
    if a is None:
        return b
    names = ("parameters", "bytes", "flops", "most_parameters", "most_bytes", "most_flops")
    return replace(a, **{name: getattr(a, name) + getattr(b, name) for name in names})


def _outside(snapshot: Snapshot, coupling: Coupling, member: Member) -> Saving:
    """Return what a weight saves that lies in no region."""
    shape, width = snapshot.tensors[member.parameter]
    each, most = prod(shape) // coupling.size, max(0, coupling.size - 1)
    return Saving(coupling.name, most, each, each * width, 0, each * most, each * most * width, 0)


class _Costs:
    """Parameters, bytes and FLOPs of one region as functions of the sizes of its atoms."""

    def __init__(self, snapshot: Snapshot, region: RegionSnapshot) -> None:
        self.snapshot, self.region = snapshot, region
        self.terms = list(flop_terms(region.axis_facts))

    def saving(self, name: str, atom: Atom, now: int) -> Saving:
        entries = max(0, now - 1)
        one = self._saved(atom, now, max(1, now - 1))
        most = self._saved(atom, now, 1)
        return Saving(name, entries, *one, *most)

    def _saved(self, atom: Atom, now: int, then: int) -> tuple[int, int, int]:
        before = {**self.region.sizes, atom: now}
        after = {**self.region.sizes, atom: then}
        parameters = weights = 0
        for name, exprs in self.region.axis_facts.parameters.items():
            full = join(self.region.name, name)
            if full not in self.snapshot.tensors or full in self.snapshot.ties:
                continue
            if any(atom in atoms_of(expr) for expr in exprs):
                removed = prod(self.region.count(e, before) for e in exprs)
                removed -= prod(self.region.count(e, after) for e in exprs)
                parameters += removed
                weights += removed * self.snapshot.tensors[full][1]
        return parameters, weights, self.flops(before, atom) - self.flops(after, atom)

    def flops(self, sizes: Mapping[Atom, int], only: Atom | None = None) -> int:
        """Count the FLOPs of the region with atoms at `sizes`; with `only`, of the products that involve this atom."""
        total = 0.0
        for factor, exprs in self.terms:
            if only is None or any(only in atoms_of(expr) for expr in exprs):
                total += factor * prod(self.region.count(expr, sizes) for expr in exprs)
        return round(total)
