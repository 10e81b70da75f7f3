"""Owners: the entry of a coupling that each row of a running model belongs to, where entries have weights of their own.

    sums_of(region, program, module, ...) -> for each coupling of experts the places where their outputs are added up
    Owners(...).taps(take)                -> taps; `take(value, owner)` sees the outputs there, and whose each row is

The graph says how rows and entries belong together (`passes/transform/contributions.py`), the values on the way do the
rest: the places that a router chose, the ends of groups, the order that rows were sorted in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.couple.coupling_index import CouplingIndex
from ecospa_fx.model.region import Region
from ecospa_fx.passes.axes.algebra import Atom, Expr, atoms_of
from ecospa_fx.passes.axes.selection import Selected, index_of, mask_of
from ecospa_fx.passes.graph.nodes import written_arguments
from ecospa_fx.passes.graph.tensors import join
from ecospa_fx.passes.ir import relations as r
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.rewrite.rewrite import Tap
from ecospa_fx.passes.transform.contributions import contributions
from ecospa_fx.passes.transform.owned import (
    Along,
    ChosenBy,
    Contributions,
    Grouped,
    Owned,
    Passed,
    Sum,
    keys_of,
)

from .products import parts

if TYPE_CHECKING:
    from ecospa_fx.model.compiled import CompiledModel


@dataclass(frozen=True, eq=False)
class SumSite:
    """One sum of the contributions of a coupling's entries, in one program.

    Attributes:
        coupling: it, at the sizes of now.
        number: number of the sum among those of the coupling.
        sum: the place.
        owners: tells whose each row is.
        parts: the number of ranks that the entries are shared out over, of which this one has its own.
    """

    coupling: Coupling
    number: int
    sum: Sum
    owners: Owners
    parts: int

    @property
    def overwritten(self) -> bool:
        """True if an op writes its sum where the contributions are."""
        return any(self.sum.owned.node in written_arguments(user) for user in self.sum.users)

    @property
    def units(self) -> int:
        """Number of entries, those of all contexts."""
        return self.coupling.contexts * self.coupling.size

    @property
    def features(self) -> tuple[int, ...]:
        """Dims of the contributions that are axes of weights, and along which no two entries lie."""
        return tuple(d for d in self._with_features() if d not in self.sum.owned.dims)

    def squares(self, product: Tensor, owner: Tensor) -> Tensor:
        """Add up a tensor in the shape of the contributions over features, square, and add up by entry, `[units]`.

        Args:
            product: the tensor.
            owner: the entry of each row.
        """
        rows = product.sum(self.features, keepdim=True) if self.features else product
        owner = owner.expand(rows.shape)
        if not any(d in self.sum.owned.dims for d in self._with_features()):
            given = owner >= 0
            return rows.new_zeros(self.units).index_add_(0, owner[given], rows[given].square())
        # Features of one entry lie side by side with those of others: first its sum at each position.
        dims = sorted(self.sum.owned.dims)
        last = list(range(-len(dims), 0))
        rows, owner = (each.movedim(dims, last).flatten(-len(dims)) for each in (rows, owner))
        rows, owner = rows.reshape(-1, rows.shape[-1]), owner.reshape(-1, owner.shape[-1])[0]
        given = owner >= 0
        along = rows.new_zeros(len(rows), self.units).index_add_(1, owner[given], rows[:, given])
        return along.square().sum(0)

    def _with_features(self) -> list[int]:
        exprs = self.owners.facts.values[self.sum.owned.node][0]
        return [d for d, expr in enumerate(exprs) if self.sum.features & set(atoms_of(expr))]


def sums_of(state: CompiledModel, region: Region, program: Program, module: nn.Module) -> Iterator[SumSite]:
    """Find the sums of the contributions of experts in a program."""
    kept, here = region.kept(program), region.kept_here(program, module)
    names = {found.key: found.name for found in region.naming_graph.discovery.couplings}
    offered = {coupling.name: coupling for coupling in state.couplings()}
    for found in region.discovery_of(program).couplings:
        coupling = offered.get(join(region.name, names.get(found.key, "")))
        if coupling is None or coupling.kind != "experts":
            continue
        context = found.context if coupling.context is not None else None
        flow = contributions(program.axis_facts, found.atom, context)
        numbers = CouplingIndex(found.atom, context, kept)
        for number, each in enumerate(flow.sums):
            owners = Owners(program.axis_facts, flow, each, found.atom, numbers, here, coupling.size)
            if owners.readable:
                yield SumSite(coupling, number, each, owners, owners.parts(kept))


def last_weights(regions: Mapping[str, Region]) -> dict[str, frozenset[str]]:
    """Return by coupling of experts the parameters in which all that an expert adds is linear, together."""
    found_in: dict[str, frozenset[str]] = {}
    for region in regions.values():
        for each in region.specializations[:1]:
            names = {found.key: found.name for found in region.naming_graph.discovery.couplings}
            for found in each.discovery.couplings:
                if found.kind != "experts":
                    continue
                sums = contributions(each.axis_facts, found.atom, found.context).sums
                if sums and all(added.weights for added in sums):
                    weights = {join(region.name, name) for added in sums for name in added.weights}
                    found_in[join(region.name, names.get(found.key, ""))] = frozenset(weights)
    return found_in


class Owners:
    """Whose each row of the operand of a sum is, in the call of a program that runs.

    Args:
        facts: axes of the program's graph.
        flow: what is known of the coupling there.
        added: the sum.
        atom: the coupling's axis.
        numbers: its entries, numbered as they are now.
        here: the entries of each atom that this process computes.
        size: number of entries now, in each context.
    """

    def __init__(
        self, facts: AxisFacts, flow: Contributions, added: Sum, atom: Atom, numbers: CouplingIndex,
        here: dict[Atom, Selected], size: int,
    ) -> None:  # fmt: skip
        self.facts, self.flow, self.sum = facts, flow, added
        self._atom, self._numbers, self._here, self._size = atom, numbers, here, size
        self._seen: dict[fx.Node, Tensor] = {}
        self._shapes: dict[fx.Node, tuple[int, ...]] = {}
        self._chain = self._chain_of(added.owned)

    def _chain_of(self, owned: Owned) -> list[Owned]:
        """Return the values on the way to a sum, the first one first."""
        chain = [owned]
        while isinstance(chain[0].origin, Passed):
            chain.insert(0, self.flow.owned[chain[0].origin.source])
        return chain

    @property
    def picked(self) -> bool:
        """True if a router chose the rows of each entry; otherwise every entry has all positions."""
        return not isinstance(self._chain[0].origin, Along)

    def taps(self, take: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Tap]:
        """Yield a tap at each value to see, and at the sum.

        Args:
            take: called with the contributions and, in a LongTensor that broadcasts with them, the entry of each row
                (contexts one after another; -1 for none); returns a value that equals them.
        """
        for owned in self._chain:
            match owned.origin:
                case ChosenBy(index=node) | Grouped(ends=node):
                    yield Tap(node, (owned.node,), self._keep(node))
                case Passed(source, r.Indexed(dim=dim, index=index)) if dim in self.flow.owned[source].dims:
                    yield Tap(index.node, (owned.node,), self._keep(index.node))
                case Passed(source, r.Regrouped()):
                    yield Tap(source, (owned.node,), self._note(source))
        after = [*((each.node,) for each in self._chain[1:]), self.sum.users]
        for owned, users in zip(self._chain, after, strict=True):
            regrouped = isinstance(owned.origin, Passed) and isinstance(owned.origin.relation, r.Regrouped)
            if regrouped or isinstance(owned.origin, Grouped):
                yield Tap(owned.node, users, self._note(owned.node))
        for factor in self.sum.factors:
            yield Tap(factor.node, self.sum.users, self._keep(factor.node))

        def stand(value: Tensor) -> Tensor:
            try:
                owner = self._owner(self.sum.owned)
                return value if owner is None else take(value, owner.to(value.device))
            finally:
                self._seen.clear()
                self._shapes.clear()

        yield Tap(self.sum.owned.node, self.sum.users, stand)

    def _keep(self, node: fx.Node) -> Callable[[Tensor], Tensor]:
        def see(value: Tensor) -> Tensor:
            self._seen[node] = value.detach()
            return value

        return see

    def _note(self, node: fx.Node) -> Callable[[Tensor], Tensor]:
        def see(value: Tensor) -> Tensor:
            self._shapes[node] = tuple(value.shape)
            return value

        return see

    @property
    def _expr(self) -> Expr:
        """The axis that rows belong to entries of."""
        first = self._chain[0].origin
        assert not isinstance(first, Passed)
        return first.expr

    @property
    def readable(self) -> bool:
        """False where entries differ by a context that the axis there does not tell."""
        return self._numbers.context is None or self._numbers.context in atoms_of(self._expr)

    def parts(self, kept: dict[Atom, Selected]) -> int:
        """Return the number of ranks that the entries are shared out over."""
        return parts(mask_of(self._expr, kept), mask_of(self._expr, self._here))

    def _units(self, expr: Expr) -> Tensor:
        """Return the entry at each position of an axis, contexts one after another."""
        entry, on = self._numbers.read(expr, index_of(expr, self._atom), mask_of(expr, self._here))
        return entry if on is None else torch.where(entry >= 0, on * self._size + entry, -1)

    def _owner(self, owned: Owned) -> Tensor | None:
        """Tell the entry of each row of a value; None where a value on the way was not seen."""
        rank = len(self.facts.values[owned.node][0])
        if isinstance(owned.origin, Passed):
            source = self.flow.owned[owned.origin.source]
            before = self._owner(source)
            return None if before is None else self._moved(owned, source, owned.origin.relation, before, rank)
        units = self._units(owned.origin.expr)
        match owned.origin:
            case Along(dim=dim):
                return units.view(*(-1 if d == dim else 1 for d in range(rank)))
            case ChosenBy(index=node, at=at):
                index = self._seen.get(node)
                if index is None:
                    return None
                for number, dim in enumerate(at):
                    index = index if dim in owned.dims else index.narrow(number, 0, 1)
                order = sorted(range(len(at)), key=lambda number: at[number])
                index = index.long().permute(*order)
                sizes = {at[number]: index.shape[place] for place, number in enumerate(order)}
                return units.to(index.device)[index].view(*(sizes.get(d, 1) for d in range(rank)))
            case Grouped(ends=node, dim=dim):
                ends, shape = self._seen.get(node), self._shapes.get(owned.node)
                if ends is None or shape is None:
                    return None
                rows = torch.arange(shape[dim], device=ends.device)
                units = torch.cat([units, units.new_tensor([-1])]).to(ends.device)  # rows after the last end: nobody's
                units = units[torch.searchsorted(ends.long(), rows, right=True)]
                return units.view(*(-1 if d == dim else 1 for d in range(rank)))

    def _moved(
        self, owned: Owned, source: Owned, relation: r.Relation | None, before: Tensor, rank: int
    ) -> Tensor | None:
        """Move the owners of rows as an op moves the rows."""
        match relation:
            case r.Permuted(order=order):
                return before.permute(*order)
            case r.Regrouped():
                old, new = self._shapes.get(source.node), self._shapes.get(owned.node)
                return None if old is None or new is None else self._regrouped(owned, source, before, old, new)
            case r.Picked(dim=dim):
                return before.squeeze(dim)
            case r.Indexed(dim=dim, index=index):
                if dim in source.dims:
                    rows = self._seen.get(index.node)
                    if rows is None:
                        return None
                    moved = before.index_select(dim, rows.flatten().long().to(before.device))
                    return moved.unflatten(dim, rows.shape) if rows.ndim != 1 else moved
                return before.unflatten(dim, (1,) * index.ndim) if index.ndim else before.squeeze(dim)
            case r.SameDims(dropped=dropped, keepdim=False):
                return before.squeeze(dropped) if dropped else before
            case r.Pattern(operands=operands):
                keys, result = keys_of(relation)
                own = keys[[o.node for o in operands].index(source.node)]
                names = [own[d] for d in sorted(source.dims)]
                compact = before.view(*(before.shape[d] for d in sorted(source.dims)))
                sorted_names = sorted(names, key=result.index)
                compact = compact.permute(*map(names.index, sorted_names))
                sizes = {result.index(name): size for name, size in zip(sorted_names, compact.shape, strict=True)}
                return compact.reshape([sizes.get(d, 1) for d in range(rank)])
            case _:
                return before.view(*(1,) * (rank - before.ndim), *before.shape)

    @staticmethod
    def _regrouped(owned: Owned, source: Owned, before: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
        compact = [size if d in owned.dims else 1 for d, size in enumerate(new)]
        if before.numel() == math.prod(compact):
            return before.reshape(compact)
        whole = before.expand(*old).reshape(*new)  # owned positions lie in one dim with others
        for d in range(len(new)):
            whole = whole if d in owned.dims else whole.narrow(d, 0, 1)
        return whole

    def factors(self) -> list[Tensor] | None:
        """Return the other factors of a product that is summed up; None where one was not seen."""
        seen = [self._seen.get(factor.node) for factor in self.sum.factors]
        return None if any(each is None for each in seen) else [each for each in seen if each is not None]
