"""PositionReader: gradients along the gates of entries, position by position, squared and added up.

    x -> tap -> the ops that sum over the coupling         backward: (x * dL/dx) at each position, per entry
      -> summed over the columns of an entry, and over weights that read the same position
      -> squared, added up over positions and training steps

The loss changes by what all positions say together. `gates.py` squares that sum, one number per training step; the sum
of the squares has the same mean where positions are independent, and as many samples as there are positions, so that
it tells entries apart after a few steps (Molchanov et al. 2019, arXiv 1906.10771, with positions for examples).

Experts of a mixture are not summed over along an axis; their gates act on the outputs that the mixture adds up.

Couplings where no such place is in the graph (hidden units of an LSTM), or whose gradient never comes by (the model's
own Python runs, or torch.compile), are judged by `gates.py`.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.model.joint_offers import parts_across
from ecospa_fx.model.lookup import compiled_state
from ecospa_fx.model.region import Region
from ecospa_fx.passes.axes.algebra import atoms_of
from ecospa_fx.passes.graph.tensors import join, parameters_of
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.rewrite.rewrite import Tap
from ecospa_fx.passes.transform.consumers import consumers
from ecospa_fx.ranks.members import ranks_of, sharing_ranks
from ecospa_fx.ranks.tensor_parallel import parallel_count

from .gates import GateReader
from .owners import SumSite, sums_of
from .products import ProductSite, Side, product_sites
from .reader import NO_GRADIENT, ZERO_GRADIENT, Averaged, GradientStep, ReaderOptions
from .slices import SliceKey
from .tapping import Tapping
from .totals import GateTotals

GATES = "gates of "
"""Prefix of the names of the sums that `gates.py` keeps, in a saved state."""

ALL = "all of "
"""Prefix of the names of the sums for all entries of a coupling at once."""

SCALED = 16.0
"""Factor above which gradients in backward have been multiplied by a gradient scaler; less may be clipping."""


@dataclass(frozen=True, eq=False)
class Place:
    """A place at which gates of a coupling act on an activation.

    Attributes:
        coupling: its name.
        units: number of gates, contexts times entries.
        side: the factor that the gates act on.
        columns: LongTensor, the positions of the factor's last dims (contexts beside, `dim`), flattened, that belong
            to a gate.
        unit: LongTensor, the gate of each of them.
        slot: names of the weights that sum over it; places of other weights at the same position add up.
        share: weight of its squares; where both factors of a product are activations, each alone is a gate.
    """

    coupling: str
    units: int
    side: Side
    columns: Tensor
    unit: Tensor
    slot: str
    share: float = 1.0
    _copies: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, site: ProductSite, side: Side, slot: str, share: float) -> Place:
        """Number the gates along one factor of a product."""
        entry = site.entry
        if side.beside is not None:
            unit = side.beside[:, None] * site.size + torch.where(entry >= 0, entry, -1 - site.size * site.contexts)
        elif site.context is not None:
            unit = torch.where(entry >= 0, site.context * site.size + entry, -1)
        else:
            unit = entry
        unit = unit.flatten()
        columns = (unit >= 0).nonzero().flatten()
        return cls(site.coupling, site.contexts * site.size, side, columns, unit[columns], slot, share)

    def rows(self, product: Tensor) -> Tensor:
        """Lay a tensor of the factor's shape out as `[positions, columns]`."""
        dim, along = self.side.dim % product.ndim, self.side.along
        if along is None or self.side.beside is None:
            rows = product.movedim(dim, -1)
            rows = rows.reshape(-1, rows.shape[-1])
        else:
            rows = product.movedim((along % product.ndim, dim), (-2, -1)).flatten(-2)
            rows = rows.reshape(-1, rows.shape[-1])
        return rows if len(self.columns) == rows.shape[1] else rows[:, self._on(rows.device)[0]]

    def by_unit(self, rows: Tensor) -> Tensor:
        """Add up the columns of each gate, `[positions, units]`."""
        if self.whole:
            return rows.clone()  # other places may read the same tensor
        return rows.new_zeros(len(rows), self.units).index_add_(1, self._on(rows.device)[1], rows)

    def sums(self, columns: Tensor) -> Tensor:
        """Add up the values of the columns `[columns]` of each gate, `[units]`."""
        if self.whole:
            return columns
        return columns.new_zeros(self.units).index_add_(0, self._on(columns.device)[1], columns)

    @functools.cached_property
    def apart(self) -> bool:
        """True if every gate has one column at most."""
        return len(self.unit.unique()) == len(self.unit)

    @functools.cached_property
    def whole(self) -> bool:
        """True if the columns are the gates in their order."""
        return torch.equal(self.unit, torch.arange(self.units))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return columns and units on a device: copied there once, and not at every backward."""
        if device not in self._copies:
            self._copies[device] = self.columns.to(device), self.unit.to(device)
        return self._copies[device]


class _Read(torch.autograd.Function):
    """The identity, of which a function sees the value and its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.take = take
        ctx.save_for_backward(value)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        ctx.take(value.detach(), gradient.detach())
        return gradient, None


@dataclass(eq=False)
class _Pending:
    """Sums of the backwards since the last training step.

    Attributes:
        squares: coupling name -> sums of squares.
        terms: (coupling name, how many times its weights have been read before, positions) -> sums by position, of
            couplings that several weights sum over.
        read: (coupling name, slot) -> how many times it was read.
        gradient: sums of the terms themselves, of one coupling: the gradient along its gates.
    """

    squares: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    read: Counter[tuple[str, str]] = field(default_factory=Counter)
    gradient: Tensor | None = None

    def add(self, name: str, squares: Tensor) -> None:
        """Add squares."""
        before = self.squares.get(name)
        same = before is not None and before.shape == squares.shape
        self.squares[name] = before.add_(squares.to(before.device)) if same and before is not None else squares

    def add_terms(self, place: Place, terms: Tensor) -> None:
        """Add terms by position to those of the other weights that sum over the coupling."""
        key = place.coupling, self.read[place.coupling, place.slot], len(terms)
        self.read[place.coupling, place.slot] += 1
        before = self.terms.get(key)
        same = before is not None and before.shape == terms.shape
        self.terms[key] = before.add_(terms.to(before.device)) if same and before is not None else terms

    def all_squares(self, at_once: Collection[str] = ()) -> dict[str, Tensor]:
        """Return the sums of squares of every coupling, and of all entries of those in `at_once` together."""
        for (name, _, _), terms in self.terms.items():
            self.add(name, terms.square().sum(0))
            if name in at_once:
                self.add(ALL + name, terms.sum(1).square().sum()[None])
        return self.squares


class PositionReader(Tapping, Averaged[str]):
    """Squared changes of the loss without an entry at a position, to first order, added up over positions.

    They are read in backward: before gradients are clipped, and of weights that are frozen too, as long as others
    before them train. `scale` and `found_inf` of a training step apply to all backwards since the step before.

    Args:
        options: of all readers.

    Attributes:
        gates: judges what has no such place.
        begins: gradients begin at the first place where no weight before it trains, so that no weight need have one.
        wholes: couplings whose entries may all go are judged as a whole, too.
    """

    learns = True
    kinds: tuple[str, ...] | None = None
    unjudged = 0.0

    def __init__(self, options: ReaderOptions) -> None:
        self.model, self.count = options.model, options.count
        self.totals = GateTotals(options.rule)
        self.gates = GateReader(replace(options, rule=copy.deepcopy(options.rule)))
        self._seen: set[str] = set()  # couplings whose gradients have come by
        self._partly: set[str] = set()  # couplings that some weight sums over where it cannot be seen
        self._common: set[str] | None = None  # of these, those that all ranks have seen
        self._slots: dict[str, set[str]] = {}
        self._parts: dict[str, int] = {}  # coupling -> the number of ranks that its entries are shared out over
        self._may_go: set[str] = set()  # couplings that are judged as a whole, too
        self._measure: str | None = None  # the coupling whose gradient tells by how much a loss was scaled
        self._pending = _Pending()
        self.begins = self.wholes = False

    @property
    def sums(self) -> Mapping[SliceKey, Tensor]:
        """Sums over steps by (coupling name, 0), `[contexts * size]`."""
        return self.gates.sums | self.totals.sums

    @property
    def empty(self) -> bool:
        """True if no gradient has been read since the last reset."""
        return not self.sums

    def lacking(self) -> str | None:
        """Return the message where there was no gradient, or none but zeros."""
        if self.empty:
            return NO_GRADIENT
        by_step = [each for key, each in self.gates.sums.items() if key not in self.totals.sums]
        known = [sums for sums in (list(self.totals.sums.values()), by_step) if sums]
        # Zeros of one kind beside numbers of the other would make entries worthless that nothing is known of.
        seen = [any(bool((each != 0).any()) for each in sums) for sums in known]
        return None if all(seen) else ZERO_GRADIENT

    def taps_of(self, region: Region, program: Program, module: nn.Module) -> list[Tap]:
        """Return a tap at each place of the program's graph at which gates of couplings act."""
        by_place: dict[tuple[fx.Node, tuple[fx.Node, ...]], list[Place]] = {}
        sites = [site for site in sums_of(compiled_state(self.model), region, program, module) if not site.overwritten]
        self._parts |= {site.coupling.name: site.parts for site in sites}
        for place, users in self._places_in(region, program, module, {site.coupling.name for site in sites}):
            by_place.setdefault((place.side.node, users), []).append(place)
            self._slots.setdefault(place.coupling, set()).add(place.slot)
            if self._measure is None and place.share == 1.0 and self.gates.gates()[place.coupling][1]:
                self._measure = place.coupling
        taps = [Tap(node, users, self._tap(places)) for (node, users), places in by_place.items()]
        return taps + [tap for site in sites for tap in site.owners.taps(self._tap_of_experts(site))]

    def _tap(self, places: list[Place]) -> Callable[[Tensor], Tensor]:
        return lambda value: self._read(value, lambda each, gradient: self._take(places, each, gradient))

    def _tap_of_experts(self, site: SumSite) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda value, owner: self._read(
            value, lambda each, gradient: self._take_experts(site, owner, each, gradient)
        )

    def _read(self, value: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        """Let a function see a value, and its gradient once that is known."""
        if not value.requires_grad:
            if not self.begins:
                return value
            value = value.detach().requires_grad_()
        read: Tensor = _Read.apply(value, take)  # type: ignore[no-untyped-call]
        return read

    def _places_in(
        self, region: Region, program: Program, module: nn.Module, but: Container[str]
    ) -> Iterator[tuple[Place, tuple[fx.Node, ...]]]:
        """Find the places, and the ops at each that sum over the coupling; not those of the couplings `but`."""
        facts, kept = program.axis_facts, (region.kept(program), region.kept_here(program, module))
        names = {found.key: found.name for found in region.naming_graph.discovery.couplings}
        offered = {coupling.name: coupling for coupling in compiled_state(self.model).couplings()}
        weights = {o.node: o.parameters for each in facts.operands.values() for o in each if o.parameters}
        summing = consumers(facts)
        here = [(join(region.name, names.get(f.key, "")), f) for f in region.discovery_of(program).couplings]
        for name, found in (*here, *parts_across(region.state, facts)):
            if name not in offered or name in but:
                continue
            sites = list(product_sites(facts, found, offered[name], *kept))
            if self.wholes and offered[name].last_stays is None:
                self._may_go.add(name)
            self._parts[name] = max((site.parts for site in sites), default=1)
            unseen = {weight for weight, dim in summing if found.atom in atoms_of(facts.parameters[weight][dim])}
            over: dict[tuple[fx.Node, int], list[tuple[ProductSite, Side, str]]] = {}
            pairs: list[tuple[ProductSite, Side]] = []
            for site in sites:
                of_weights = [side for side in site.sides if side.node in weights]
                activations = [side for side in site.sides if side.node not in weights]
                if len(activations) == 1:
                    unseen -= set(weights[of_weights[0].node])
                    slot = ", ".join(join(region.name, each) for each in weights[of_weights[0].node])
                    over.setdefault((activations[0].node, activations[0].dim), []).append((site, activations[0], slot))
                elif not of_weights:
                    pairs += [(site, side) for side in site.sides]
            if unseen:
                self._partly.add(name)
                continue
            for together in over.values():
                site, side, _ = together[0]
                slots = " | ".join(sorted({slot for _, _, slot in together}))
                yield Place.of(site, side, slots, 1.0), tuple(each.op for each, _, _ in together)
            for site, side in pairs if not over else ():
                slot = f"{region.name} {site.op.name} {side.node.name}"
                yield Place.of(site, side, slot, 0.5), (site.op,)

    @torch.no_grad()
    def _take(self, places: Sequence[Place], value: Tensor, gradient: Tensor) -> None:
        """Add what one backward shows at one value."""
        product = _product(value, gradient)
        for place in places:
            rows = place.rows(product)
            if place.coupling == self._measure:
                along = place.sums(rows.sum(0))
                before = self._pending.gradient
                self._pending.gradient = along if before is None or before.shape != along.shape else before.add_(along)
            whole = place.coupling in self._may_go and place.share == 1.0 and self._parts[place.coupling] == 1
            if whole and len(self._slots[place.coupling]) == 1:
                self._pending.add(ALL + place.coupling, rows.sum(1).square().sum()[None])
            if place.share == 1.0 and len(self._slots[place.coupling]) > 1:
                self._pending.add_terms(place, place.by_unit(rows))
            else:
                squares = place.sums(rows.square().sum(0)) if place.apart else place.by_unit(rows).square().sum(0)
                self._pending.add(place.coupling, squares.mul_(place.share))

    @torch.no_grad()
    def _take_experts(self, site: SumSite, owner: Tensor, value: Tensor, gradient: Tensor) -> None:
        """Add what one backward shows where the outputs of experts are added up."""
        product = _product(value, gradient)
        self._pending.add(site.coupling.name, site.squares(product, owner))

    def add(self, step: GradientStep) -> None:
        """Add what the backwards since the last training step have shown; read gates where they have shown nothing."""
        self.observe()
        self.count.note(step.found_inf, step.new_step)
        pending, self._pending = self._pending, _Pending()
        at_once = {name for name in self._may_go if self._parts[name] == 1}
        squares = pending.all_squares(at_once)
        scale = step.scale if step.scale is not None else self._scale(pending, step)
        if scale is not None:
            squares = {name: each / scale.to(each).square() for name, each in squares.items()}
        alone = {name: name.removeprefix(ALL) for name in squares}
        squares = {n: each * self._parts[alone[n]] for n, each in squares.items() if alone[n] not in self._partly}
        self._seen.update(name for name in squares if not name.startswith(ALL))
        self.totals.add(squares, step)
        self.gates.read(step, self._read_by_position(), odd=False)

    def _read_by_position(self) -> set[str]:
        """Return the couplings that gates are not read for; those of all ranks where these read gates together."""
        seen, ranks = self._seen - self._partly, sharing_ranks(self.model)
        if not ranks:
            return seen
        if self._common is None:  # asked once per reset: nothing is sent in between, if all couplings are read so
            self._common = set(ranks.common(seen, "couplings that are read by position"))
        return self._common

    def _scale(self, pending: _Pending, step: GradientStep) -> Tensor | None:
        """Find the factor between gradients in backward and those that are left now, which may have been unscaled.

        A gradient scaler multiplies the loss, and divides gradients of weights afterwards. Both sums are the gradient
        along the same gates. Between processes gradients are averaged, and say nothing.
        """
        if pending.gradient is None or self._measure is None or ranks_of(self.model):
            return None
        now = self.gates.along(self._measure, step)
        if now is None or now.shape != pending.gradient.shape:
            return None
        now = now.to(pending.gradient)
        factor = (pending.gradient * now).sum() / now.square().sum()
        told = factor.isfinite() & (factor > SCALED)
        return torch.where(told, factor, torch.ones_like(factor))

    def importance(self, coupling: Coupling) -> float | None:
        """Return the mean over the coupling's weights, as other scores do; None where gradients say nothing of it."""
        entries = self.entries(coupling, by_context=False)
        return None if entries is None else float(entries.sum()) / max(1, self._weights_on(coupling))

    def _weights_on(self, coupling: Coupling) -> int:
        """Count the weights in the rows and columns of a coupling's matrices."""
        parameters = dict(parameters_of(self.model, remove_duplicate=False))
        return sum(
            int((member.index >= 0).sum()) * (parameters[member.parameter].numel() // len(member.index))
            for member in coupling.members
            if member.matrix and member.parameter in parameters
        )

    def entries(self, coupling: Coupling, *, by_context: bool) -> Tensor | None:
        """Return the mean over steps of each entry's sum over positions; None where there is none, or an inf or NaN.

        Where ranks train the model together, each of them must call it: a loss is a mean over them all.
        """
        shape = coupling.contexts, coupling.size
        mean = self.means_now().get(coupling.name)
        if coupling.name in self._partly or mean is None or mean.numel() not in (shape[1], shape[0] * shape[1]):
            return self.gates.entries(coupling, by_context=by_context)
        if not bool(mean.isfinite().all()):
            return None
        mean = mean.view(-1, shape[1])
        return mean.expand(shape) if by_context else mean.sum(0)

    def whole(self, coupling: Coupling) -> float | None:
        """Return the mean over steps of the squared change without any entry, summed over positions; None: unknown."""
        mean = self.means_now().get(ALL + coupling.name)
        return None if mean is None or not bool(mean.isfinite().all()) else float(mean.sum())

    def means(self) -> dict[str, Tensor]:
        """Return by coupling name the mean over steps of each gate, of the positions of all ranks."""
        found = {name: self.totals.mean(name, self.count) for name, _ in self.totals.sums}
        ranks = ranks_of(self.model)
        means = {name: mean for name, mean in found.items() if mean is not None}
        summed = ranks.totals(means, "the squared terms by position")
        return {name: each.cpu() / self._added_up() for name, each in summed.items()}

    def reset(self) -> None:
        """Drop the sums."""
        self.totals.reset()
        self.gates.reset()
        self._pending, self._common = _Pending(), None

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, in the unit of one process on the whole batch; of replicas those of this rank."""
        gates = {f"{GATES}{name}": tensor for name, tensor in self.gates.tensors().items()}
        whole = sharing_ranks(self.model).totals(self.totals.tensors(), "the state of scores by position")
        return gates | {name: tensor / self._unit() for name, tensor in whole.items()}

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Go on with what `tensors` returned."""
        self.observe()
        unit = self._unit() if sharing_ranks(self.model).is_first else 0.0  # or they would count once per rank
        self.gates.load_tensors({n.removeprefix(GATES): tensor for n, tensor in named.items() if n.startswith(GATES)})
        self.totals.load_tensors({name: each * unit for name, each in named.items() if not name.startswith(GATES)})
        self._seen, self._common = {name for name, _ in self.totals.sums if not name.startswith(ALL)}, None

    def _unit(self) -> float:
        """Return the factor of sums here on those of one process: each rank's loss is a mean over its part alone."""
        return float(self._added_up() if sharing_ranks(self.model) else ranks_of(self.model).count)

    def _added_up(self) -> int:
        """Return the factor of sums over all ranks on those of one process; some ranks may have the same positions."""
        ranks = ranks_of(self.model)
        beside = parallel_count(self.model) if ranks else 1
        return int(beside * (ranks.count // beside) ** 2)


def _product(value: Tensor, gradient: Tensor) -> Tensor:
    """Return what the loss changes by along each entry of a value, to first order."""
    precise = torch.promote_types(value.dtype, torch.float32)
    if precise.is_complex:
        return (value * gradient.conj()).real
    return value.to(precise) * gradient.to(precise)
