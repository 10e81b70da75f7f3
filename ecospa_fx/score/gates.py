"""GateReader: gradients along the gates of entries, squared and added up over training steps.

An entry's gate multiplies it wherever it is summed over. The gradient along the gate is `sum(w * g)` over the weights
that the entry is multiplied by: over columns of the weights that sum over it, or, where two activations meet along it,
over the rows that make either. Of an expert it is the sum over the last weights of its own. Where a weight is a
function of its parameters, these are the parameters: the sum is the gradient along the gate if the function is linear
in them (a mask, a fixed scale), and close to it if it is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.couple.coupling import Coupling, Member
from ecospa_fx.errors import TargetError
from ecospa_fx.model.lookup import couplings, regions_of
from ecospa_fx.passes.graph.tensors import join, parameters_of
from ecospa_fx.passes.transform.consumers import WeightDim, consumers
from ecospa_fx.ranks.members import sharing_ranks
from ecospa_fx.ranks.shards import held_along, is_first_replica, is_sharded, local_part

from .judging import places_of
from .owners import last_weights
from .reader import NO_GRADIENT, ZERO_GRADIENT, GradientStep, ReaderOptions
from .slices import SliceKey
from .totals import GateTotals


@dataclass(frozen=True, eq=False)
class Gate:
    """The share of one member in the gates of a coupling: its products at `owned` are added to the gates at `place`.

    Attributes:
        parameter: the member's.
        dim: the member's.
        owned: LongTensor `[rows that belong to an entry]`, these rows.
        place: LongTensor of the same length, the gate of each in a flat `[contexts * size]`.
    """

    parameter: str
    dim: int
    owned: Tensor
    place: Tensor

    @classmethod
    def of(cls, member: Member, coupling: Coupling) -> Gate:
        """Find the rows and the gates of a member."""
        owned, place = places_of(member, coupling, by_context=True)
        return cls(member.parameter, member.dim, owned.nonzero().flatten(), place)


class GateReader:
    """Gradients along the gates of entries.

    Where an entry's weights have their gradients read one after another (`attach_backward`, several optimizers), each
    counts on its own.

    Args:
        options: of all readers.
    """

    learns = True
    kinds: tuple[str, ...] | None = None
    unjudged = 0.0

    def __init__(self, options: ReaderOptions) -> None:
        self.model, self.count = options.model, options.count
        self.totals = GateTotals(options.rule)
        self._gates: dict[str, tuple[int, list[list[Gate]]]] = {}
        self._built_for: Coupling | None = None
        self._step: weakref.ref[GradientStep] | None = None

    @property
    def sums(self) -> dict[SliceKey, Tensor]:
        """Sums over steps by (coupling name, 0), `[contexts * size]`."""
        return self.totals.sums

    @property
    def empty(self) -> bool:
        """True if no gradient has been read since the last reset."""
        return not self.sums

    def lacking(self) -> str | None:
        """Return the message where there was no gradient, or none but zeros."""
        if self.empty:
            return NO_GRADIENT
        return None if any(bool((total != 0).any()) for total in self.sums.values()) else ZERO_GRADIENT

    def observe(self) -> None:
        """Do nothing: it reads gradients."""

    def add(self, step: GradientStep) -> None:
        """Add the squared gradients along the gates."""
        self.count.note(step.found_inf, step.new_step)
        self.read(step)

    def read(self, step: GradientStep, but: Container[str] = (), odd: bool = True) -> None:
        """Add the squared gradients along the gates.

        Where parameters are sharded the gradients along gates are added up over ranks, which must all call it, with
        the same `but`: the square of a sum is no sum of what each rank has.

        Args:
            step: the step.
            but: names of couplings that are left out.
            odd: refuse gradients that are tensors of other classes; otherwise their couplings are left out.
        """
        parameters, gradients = step.tensors
        if not odd:
            gradients = {name: each for name, each in gradients.items() if _whole(each) or is_sharded(each)}
        chosen: dict[str, list[list[Gate]]] = {}
        gates = self._gates_at(step)
        for name, (width, sides) in gates.items():
            here = [[gate for gate in side if gate.parameter in gradients] for side in sides if name not in but]
            if width and any(here):  # of a sublayer that is gone there is nothing to read
                chosen[name] = [side for side in here if side]
        # A fused projection has members in many couplings.
        keys = dict.fromkeys((g.parameter, g.dim) for sides in chosen.values() for side in sides for g in side)
        products = {key: _products(*key, parameters[key[0]], gradients[key[0]], step.scale) for key in keys}
        self._add_up(products, gradients)
        squares: dict[str, Tensor] = {}
        for name, sides in chosen.items():
            first = sides[0][0]
            total = torch.zeros(gates[name][0], dtype=torch.float32, device=products[first.parameter, first.dim].device)
            for side in sides:
                along = torch.zeros_like(total)
                for gate in side:
                    product = products[gate.parameter, gate.dim]
                    along.index_add_(0, gate.place.to(along.device), product[gate.owned.to(product.device)].to(along))
                total += along.square() / len(sides)
            squares[name] = total
        self.totals.add(squares, step)

    def _add_up(self, products: dict[WeightDim, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Add up those of sharded parameters over ranks, in place."""
        shared = {f"{name} {dim}": (name, dim) for name, dim in products if is_sharded(gradients[name])}
        if shared:
            ranks, mine = sharing_ranks(self.model), {label: products[key] for label, key in shared.items()}
            for label, each in ranks.totals(mine, "gradients along gates").items():
                if label in shared:
                    mesh: Any = getattr(gradients[shared[label][0]], "device_mesh", None)
                    products[shared[label]] = each / (ranks.count // mesh.size())  # as often as others hold the same

    def along(self, name: str, step: GradientStep) -> Tensor | None:
        """Return the gradient along the gates of one coupling, from one side, if that has gradients, and whole ones."""
        parameters, gradients = step.tensors
        width, sides = self._gates_at(step).get(name, (0, []))
        for side in sides:
            if not all(gate.parameter in gradients and _whole(gradients[gate.parameter]) for gate in side):
                continue
            total = torch.zeros(width, dtype=torch.float32, device=gradients[side[0].parameter].device)
            for gate in side:
                weight, gradient = parameters[gate.parameter], gradients[gate.parameter]
                product = _products(gate.parameter, gate.dim, weight, gradient, None)
                total.index_add_(0, gate.place.to(total.device), product[gate.owned.to(total.device)])
            return total
        return None

    def importance(self, coupling: Coupling) -> float | None:
        """Return the mean over the coupling's entries; None where gradients have said nothing of it."""
        entries = self.entries(coupling, by_context=False)
        return None if entries is None else float(entries.mean())

    def entries(self, coupling: Coupling, *, by_context: bool) -> Tensor | None:
        """Return the mean over steps of each gate's square; None where there is none, or one is inf or NaN."""
        means = self.totals.mean(coupling.name, self.count)
        if means is None or means.numel() != coupling.contexts * coupling.size or not bool(means.isfinite().all()):
            return None
        means = means.view(coupling.contexts, -1)
        return means if by_context else means.sum(0)

    def at_once(self) -> AbstractContextManager[None]:
        """Do nothing: sums are read coupling by coupling."""
        return nullcontext()

    def reset(self) -> None:
        """Drop the sums, and look again at which weights train."""
        self.totals.reset()
        self._built_for = None

    def detach(self) -> None:
        """Do nothing: there is nothing to take off."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name; those of other sizes than the model's are dropped where they are read."""
        return self.totals.tensors()

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Go on with what `tensors` returned."""
        self.totals.load_tensors(named)

    def _gates_at(self, step: GradientStep) -> dict[str, tuple[int, list[list[Gate]]]]:
        """Return the gates, looked for once in a step: a look walks through the whole model."""
        if self._step is None or self._step() is not step:
            self.gates()
            self._step = weakref.ref(step)
        return self._gates

    def gates(self) -> dict[str, tuple[int, list[list[Gate]]]]:
        """Return by coupling name the number of gates, and the members whose products add up to them, side by side.

        Each side alone adds up to the gradients along the gates.
        """
        offered = couplings(self.model)
        first = offered[0] if offered else None
        if first is None or self._built_for is not first:
            self._built_for = first
            summing = {
                (join(region.name, name), dim)
                for region in regions_of(self.model).values()
                for first in region.specializations[:1]
                for name, dim in consumers(first.axis_facts)
            }
            learned = {n for n, p in parameters_of(self.model, remove_duplicate=False) if p.requires_grad}
            last = last_weights(regions_of(self.model))
            self._gates = {c.name: (c.contexts * c.size, _sides(c, summing, learned, last)) for c in offered}
        return self._gates


def _sides(
    coupling: Coupling, summing: set[WeightDim], learned: set[str], last: Mapping[str, frozenset[str]]
) -> list[list[Gate]]:
    over = [m for m in coupling.members if (m.parameter, m.dim) in summing]
    if coupling.kind == "experts" and not over:
        over = [m for m in coupling.members if m.parameter in last.get(coupling.name, ())]
        if not over:  # rows of a router do not scale what an expert adds
            return []
    groups: dict[str, list[Member]] = {}
    for member in coupling.members:
        groups.setdefault(member.of, []).append(member)
    # If some weights of a side are frozen, its gradients are those of a part of the gate only: too small, so drop it.
    sides = [side for side in ([over] if over else groups.values()) if all(m.parameter in learned for m in side)]
    return [[Gate.of(member, coupling) for member in side] for side in sides]


def _whole(gradient: Tensor) -> bool:
    return type(gradient) in (Tensor, nn.Parameter)


def _products(name: str, dim: int, weight: Tensor, gradient: Tensor, scale: Tensor | None) -> Tensor:
    """Sum a weight's entries times their gradients over all dims but one; of a shard those of this rank."""
    if not _whole(gradient) and not is_sharded(gradient):
        raise TargetError(
            f'policy="adaptive" needs plain gradients, and that of `{name}` is a {type(gradient).__name__}; use '
            'policy="paper"'
        )
    products = (local_part(weight) * local_part(gradient)).float()
    if products.ndim > 1:
        products = products.sum([other for other in range(products.ndim) if other != dim])
    if is_sharded(gradient):
        part = products
        products = part.new_zeros(gradient.shape[dim])
        if is_first_replica(gradient):
            products[held_along(gradient, dim).to(part.device)] = part
    return products if scale is None else products / scale.to(products.device)
