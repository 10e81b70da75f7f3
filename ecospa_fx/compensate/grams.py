"""Grams: second moments of the inputs of weights, gathered while the model runs, so that a shrink can be absorbed.

    Grams(model) -> an observer per region -> X.T @ X per weight that sums over a coupling -> shrink(..., absorb=grams)

`X` is the input of the weight, one row per position. The size of its Gram matrix does not depend on the batches, and
it is a sum, so that ranks add theirs up. No activation is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from ecospa_fx.arguments import FLAG, MODULE, NAMED, SEVERAL, instance, takes
from ecospa_fx.collectives import all_reduce_sum
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import TargetError
from ecospa_fx.logs import logger
from ecospa_fx.model.journal import Journal, take_state
from ecospa_fx.model.lookup import compiled_state, plan, regions_of
from ecospa_fx.model.observers import check_observable, ignore, observe
from ecospa_fx.model.region import Region
from ecospa_fx.model.slicing import kept_positions
from ecospa_fx.model.wrappers import unwrapped
from ecospa_fx.passes.graph.tensors import named_tensors, storage_key
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.transform.absorb import Absorption, Moments, absorb
from ecospa_fx.passes.transform.consumers import Consumer, WeightDim, consumers
from ecospa_fx.passes.transform.eliminate import Summing
from ecospa_fx.passes.transform.judged import HeldOut, absorb_judged
from ecospa_fx.passes.transform.rotate import FAR, BasisChange, Part
from ecospa_fx.plan import Plan
from ecospa_fx.score.products import ProductSite

from .moments import (
    GramInput,
    InputMoments,
    MaskInput,
    PairMoments,
    RowChoice,
    columns,
    mask_inputs,
    over_ranks,
    pair_sites,
)  # fmt: skip

ROWS = 512
"""Positions read of one call at most, or a quarter of the columns if that is more: 16 calls are 4 rows a column."""


Read: TypeAlias = GramInput | MaskInput | ProductSite


@dataclass(frozen=True, eq=False)
class _Absorber:
    """A weight that may absorb: how it is used, and the (parameter, dim) under which its inputs' moments are kept."""

    consumer: Consumer
    gram: WeightDim


class Grams:
    """Gathers the moments by which a shrink is absorbed: `X.T @ X` for each weight that sums over a coupling.

    >>> with ecospa_fx.Grams(model) as grams, torch.no_grad():
    ...     for batch in some_batches:
    ...         model(batch)
    >>> ecospa_fx.shrink(model, {coupling: keep}, absorb=grams)

    `EcoSpaTrainer(..., absorb=True)` does this by itself, with its training batches.

    Args:
        model: a compiled model that has been called.
        rows: positions (tokens, pixels) that are read of one call at most, evenly spaced; by default 512, or a quarter
            of the columns that the weight sums over if that is more.
        ridge: regularisation of the regression: added to the diagonal of `X.T @ X`, as a share of each entry's own;
            None: every fourth call is held out, and the ridge that does best there is taken, or the weights stay as
            they are if that does best. Before the fourth call it is 1, or 0.3 from 8 rows per column on.
        training: read only forwards in training mode with gradients on, not every forward.
        mask: the positions to read: the name of an argument of the region that tells positions from padding, as a
            tensor of integers or booleans over the first dims (batch, positions); or such a tensor itself, which may be
            assigned anew before each call. None: all.

    Attributes:
        refused: (parameter, dim) of a weight that sums over a coupling and cannot take over -> the reason.
        left: (parameter, dim) -> share of the squares of the removed part at the last shrink that nothing took over;
            at the positions held out, if there are any.

    Raises:
        TargetError: `rows`, `ridge` or `mask` is out of range.
    """

    @takes(model=MODULE, training=FLAG)
    def __init__(
        self,
        model: nn.Module,
        *,
        rows: int | None = None,
        ridge: float | None = None,
        training: bool = False,
        mask: str | Tensor | None = "attention_mask",
    ) -> None:
        model = unwrapped(model)
        if rows is not None and (not isinstance(rows, int) or rows < 1):
            raise TargetError(f"rows={rows!r} is out of range; it is a whole number of positions, at least 1")
        if ridge is not None and (not isinstance(ridge, (int, float)) or not ridge >= 0):
            raise TargetError(
                f"ridge={ridge!r} is out of range; it is a share of each entry's second moment, at least 0, or None"
            )
        self.model, self.rows, self.ridge, self.training = model, rows, ridge, training
        self.mask = mask
        self.active = True
        self.refused: dict[WeightDim, str] = {}
        self.left: dict[WeightDim, float] = {}
        self._grams: dict[WeightDim, InputMoments] = {}
        self._pairs: dict[str, PairMoments] = {}
        self._graphs: dict[int, tuple[AxisFacts, Mapping[WeightDim, Consumer | str]]] = {}
        self._absorbers: dict[WeightDim, _Absorber] = {}
        self._read_for: list[object] = []  # a coupling and the graphs that absorbers have been found for
        self._regions = list(regions_of(model).values())
        if self._regions:
            check_observable(model)
        for region in self._regions:
            observe(region, self)

    def __enter__(self) -> Grams:
        """Return itself, to gather until the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop gathering; the moments stay."""
        self.detach()

    def detach(self) -> None:
        """Stop gathering; the moments stay."""
        for region in self._regions:
            ignore(region, self)

    def reset(self) -> None:
        """Forget the moments."""
        self._grams.clear()
        self._pairs.clear()

    @property
    def mask(self) -> str | Tensor | None:
        """The positions to read, see the arguments."""
        return self._mask

    @mask.setter
    def mask(self, mask: str | Tensor | None) -> None:
        if isinstance(mask, Tensor) and mask.is_floating_point():
            raise TargetError(
                f"mask is a tensor of {mask.dtype}; it has booleans or integers, 0 where there is padding"
            )
        if mask is not None and not isinstance(mask, (str, Tensor)):
            raise TargetError(f"mask={mask!r} is neither the name of an argument nor a tensor")
        self._mask = mask

    @property
    def absorbing(self) -> tuple[WeightDim, ...]:
        """(parameter, dim) of the weights that can take over."""
        self._read_all()
        return tuple(self._absorbers)

    @property
    def empty(self) -> bool:
        """True if no moments have been gathered."""
        return not self._grams

    @property
    def positions(self) -> int:
        """Positions (tokens, pixels) of the calls that were read, at the input that has most."""
        return max((gram.total for gram in self._grams.values()), default=0)

    @property
    def rows_per_column(self) -> float | None:
        """Rows per column where there are fewest, those held out included; None if nothing has been gathered."""
        counts = [
            (gram.moments.count + (0 if gram.held is None else len(gram.held))) / len(gram.moments.sums)
            for gram in self._grams.values()
        ]
        return min(counts, default=None)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moments by name."""
        tensors: dict[str, Tensor] = {}
        for (name, dim), gram in self._grams.items():
            label = f"{name}[{dim}]"
            tensors |= {f"squares {label}": gram.moments.squares, f"sums {label}": gram.moments.sums}
            tensors[f"counts {label}"] = torch.tensor([gram.moments.count, gram.window, gram.calls, gram.total])
            if gram.positions is not None:
                tensors[f"positions {label}"] = gram.positions
            if gram.held is not None:
                tensors[f"held {label}"] = gram.held
        for name, pair in self._pairs.items():
            tensors |= {f"near {name}": pair.near, f"far {name}": pair.far, f"calls {name}": torch.tensor(pair.calls)}
        return tensors

    @takes(state=NAMED)
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ArgumentError: the state is none that `state_dict` returned.
        """
        take_state("Grams", [self], lambda: self._take(*_moments_in(state)))

    def _take(self, grams: dict[WeightDim, InputMoments], pairs: dict[str, PairMoments]) -> None:
        self._grams, self._pairs = grams, pairs

    # The methods of an observer of regions, see `ecospa_fx.model.observers`.

    def wants(self, module: nn.Module) -> bool:
        """Return True at every forward, or at those that train."""
        return self.active and (not self.training or (torch.is_grad_enabled() and module.training))

    def nodes_of(self, region: Region, program: Program) -> tuple[list[fx.Node], list[Read]]:
        """Return the nodes whose values the weights of a region meet, and which input each is."""
        self._read(region)
        here = self._consumers(program.axis_facts)
        found: list[Read] = [] if not isinstance(self.mask, str) else list(mask_inputs(program, self.mask))
        found += pair_sites(region, program)
        for key in dict.fromkeys(self._absorbers[key].gram for key in self._offered(region) if key in self._absorbers):
            consumer = here.get(_key_in_region(region, key))
            if isinstance(consumer, Consumer):
                found.append(GramInput(key, consumer.inputs, consumer.window, region.state.plan.kept.get(key)))
        return [node for place in found for node in place.nodes], found

    def receive(self, known: list[Read], values: Sequence[Tensor]) -> None:
        """Add up what one call shows."""
        given = iter(values)
        if not known:
            return
        mask = self.mask.bool() if isinstance(self.mask, Tensor) else None
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(values[0].device.type, enabled=False):
            for place in known:
                own = [next(given) for _ in place.nodes]
                if isinstance(place, MaskInput):
                    mask = None if own[0].is_floating_point() else own[0].bool()
                elif isinstance(place, GramInput):
                    self._add_input(place, own, mask)
                else:
                    self._add_pair(place, own)

    def _add_input(self, gram_input: GramInput, values: Sequence[Tensor], mask: Tensor | None) -> None:
        before = self._grams.get(gram_input.gram)
        limit = self.rows or max(ROWS, values[0].shape[gram_input.inputs[0].dim] * gram_input.window // 4)
        reading = RowChoice(limit, mask, judged=self.ridge is None)
        moments = InputMoments.of_call(gram_input, values, reading, 0 if before is None else before.calls)
        if before is not None and before.narrow_to(gram_input.positions):
            before.add(moments)
        else:
            self._grams[gram_input.gram] = moments

    def _matrix(self, gram: WeightDim, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Return the weights that sum over the inputs of a Gram matrix, `[outputs, columns]`; None where none is whole.

        Args:
            gram: the (parameter, dim) under which the matrix is kept.
            tensors: those of the model by name; one that is not there is left out.
        """
        found = [
            absorber.consumer.columns(weight.detach())
            for (name, _), absorber in self._absorbers.items()
            if absorber.gram == gram and (weight := tensors.get(name)) is not None and _has_values(weight)
        ]
        return torch.cat([each.to(found[0]) for each in found]) if found else None

    def _add_pair(self, site: ProductSite, values: Sequence[Tensor]) -> None:
        before = self._pairs.get(site.coupling)
        moments = PairMoments.of_call(site, values, self.rows or ROWS, 0 if before is None else before.calls)
        if before is not None and before.near.shape == moments.near.shape:
            before.add(moments)
        else:
            self._pairs[site.coupling] = moments

    def of_sides(self, coupling: Coupling, parts: Sequence[Part], near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Gram matrices of the two sides of a coupling, of activations if they were read, else of weights.

        Args:
            coupling: a coupling whose basis is free.
            parts: the parts of weights that its sides lie on.
            near: the matrix of the weights on one side, `[contexts, d, d]`.
            far: likewise on the other side.
        """
        self._read_all()
        pair = self._pairs.get(coupling.name)
        if pair is not None and pair.near.shape == near.shape:
            near, far = all_reduce_sum(pair.near.to(near), pair.far.to(far))
            return near, far
        inputs = torch.zeros_like(near)
        for part, absorber, gram in self._summing(parts):
            if absorber is None or gram is None:
                return near, far
            gram.add_blocks(part, absorber.consumer.bias is not None, inputs)  # a bias can hold the constant part
        return (inputs, far) if bool(inputs.any()) else (near, far)

    def summing(self, coupling: Coupling) -> list[Summing] | None:
        """Return the weights that sum over a coupling, and their inputs' moments; None if one cannot take over."""
        self._read_all()
        tensors, summing = named_tensors(self.model), []
        for member in coupling.members:
            key = member.parameter, member.dim
            absorber = self._absorbers.get(key)
            if absorber is None:
                if key in self.refused:
                    return None
                continue
            gram, weight = self._grams.get(absorber.gram), tensors[member.parameter]
            if gram is None or not gram.narrow_to(plan(self.model).kept.get(key)) or not _has_values(weight):
                return None
            unit = member.index if member.context is None else member.context * coupling.size + member.index
            unit = torch.where(member.index >= 0, unit, -1).repeat_interleave(gram.window)
            matrix = absorber.consumer.columns(weight.detach())
            summing.append(Summing(matrix, over_ranks(gram.moments), unit, absorber.consumer.bias is not None))
        return summing or None

    def follow(self, coupling: Coupling, parts: Sequence[Part], change: BasisChange, journal: Journal) -> None:
        """Follow a change of basis."""
        for moments in (*self._grams.values(), *self._pairs.values()):
            journal.note_object(moments)
        if coupling.name in self._pairs:
            self._pairs[coupling.name].follow(change)
        done: set[int] = set()
        for part, _, gram in self._summing(parts):
            if gram is not None and id(gram) not in done:
                done.add(id(gram))
                gram.follow(part, change)

    def _summing(self, parts: Sequence[Part]) -> Iterator[tuple[Part, _Absorber | None, InputMoments | None]]:
        """Return the weights that sum over a coupling, with the moments of their inputs at the sizes of now."""
        for part in parts:
            if part.side == FAR:
                absorber = self._absorbers.get((part.parameter, part.dim))
                gram = None if absorber is None else self._grams.get(absorber.gram)
                positions = plan(self.model).kept.get((part.parameter, part.dim))
                yield part, absorber, gram if gram is not None and gram.narrow_to(positions) else None

    def _consumers(self, axis_facts: AxisFacts) -> Mapping[WeightDim, Consumer | str]:
        cached = self._graphs.get(id(axis_facts))
        if cached is None or cached[0] is not axis_facts:
            self._graphs[id(axis_facts)] = cached = (axis_facts, consumers(axis_facts))
        return cached[1]

    def _offered(self, region: Region) -> list[WeightDim]:
        """Return the dims of matrices that couplings of a region lie on."""
        prefix = f"{region.name}." if region.name else ""
        members = (m for c in compiled_state(self.model).couplings() for m in c.members if m.matrix)
        return sorted({(m.parameter, m.dim) for m in members if m.parameter.startswith(prefix)})

    def _read_all(self) -> None:
        """Find the weights of all regions that may absorb, once for the couplings and the graphs that there are."""
        graphs = [program for region in self._regions for program in region.specializations]
        now = [*compiled_state(self.model).couplings()[:1], *graphs]
        if len(now) == len(self._read_for) and all(a is b for a, b in zip(now, self._read_for, strict=True)):
            return
        self._read_for = now
        for region in self._regions:
            if region.specializations:
                self._read(region)

    def _read(self, region: Region) -> None:
        """Find the weights of a region that may absorb: every graph of it must sum over the dim in the same way."""
        groups: dict[Any, WeightDim] = {}
        for key in self._offered(region):
            self._absorbers.pop(key, None)
            self.refused.pop(key, None)
            inside = _key_in_region(region, key)
            graphs = [p.axis_facts for p in reversed(region.specializations) if _uses(p.captured, inside[0])]
            found = [self._consumers(axis_facts).get(inside) for axis_facts in graphs]
            if not any(found):
                continue  # its outputs are summed over by other weights
            reasons = [each for each in found if isinstance(each, str)]
            same = [each for each in found if isinstance(each, Consumer)]
            if reasons or len(same) < len(found) or len({each.window for each in same}) > 1:
                self.refused[key] = reasons[0] if reasons else "not every call of its region sums over it"
                continue
            bias = same[0].bias if len({each.bias for each in same}) == 1 else None
            inputs = tuple(tuple((i.node, i.dim, i.window) for i in each.inputs) for each in same)
            self._absorbers[key] = _Absorber(replace(same[0], bias=bias), groups.setdefault(inputs, key))

    @takes(before=instance("an ecospa_fx.Plan", Plan), after=instance("an ecospa_fx.Plan", Plan), held=SEVERAL)
    def absorbed(self, before: Plan, after: Plan, held: Sequence[Mapping[str, Tensor]]) -> dict[int, Tensor]:
        """Compute the new values of the weights that take over, at their sizes before the shrink.

        Where the model runs in several processes, each of them must call it: their moments are added up.

        Args:
            before: the plan now.
            after: the plan after the shrink.
            held: tensors by name in the model: its own, those of copies, and averages of weights in optimizers. Each
                of these is linear in the weights, so that the same regression holds for all of them.

        Returns:
            `id` of a tensor in `held` -> its new value, for those that change.
        """
        self._read_all()
        values: dict[int, Tensor] = {}
        solved: dict[tuple[WeightDim, bool], Absorption | None] = {}
        self.left = {}
        for (name, dim), absorber in sorted(self._absorbers.items()):
            steps = kept_positions(name, before, after).get(dim) if (name, dim) in after.kept else None
            if steps is None:
                continue
            consumer, constant = absorber.consumer, absorber.consumer.bias is not None
            if (absorber.gram, constant) not in solved:
                positions = before.kept.get((name, dim))
                solved[absorber.gram, constant] = self._solve(absorber, positions, steps, held[0])
            absorption = solved[absorber.gram, constant]
            if absorption is None or not _has_values(held[0].get(name)):
                continue
            self.left[name, dim] = absorption.left
            bias = None if consumer.bias is None else name.removesuffix(consumer.parameter) + consumer.bias
            for tensors in held:
                weight = tensors.get(name)
                if weight is None or not _has_values(weight):
                    continue
                matrix = consumer.columns(weight.detach())
                _assign(values, tensors, weight, consumer.as_weight(absorption.columns(matrix), weight))
                if bias is not None and _has_values(tensors.get(bias)):
                    _assign(values, tensors, tensors[bias], absorption.bias(tensors[bias].detach(), matrix))
        self._log(before, after)
        return values

    def _solve(
        self, absorber: _Absorber, positions: Tensor | None, steps: Tensor, tensors: Mapping[str, Tensor]
    ) -> Absorption | None:
        gram, constant = self._grams.get(absorber.gram), absorber.consumer.bias is not None
        if gram is None or not gram.narrow_to(positions):
            return None
        moments, kept = over_ranks(gram.moments), columns(steps, gram.window)
        if self.ridge is not None:
            return absorb(moments, kept, constant=constant, ridge=self.ridge)
        rows, matrix = gram.held, self._matrix(absorber.gram, tensors)
        rows = moments.squares[:0] if rows is None else rows
        number = torch.tensor([len(rows) if matrix is not None else 0], device=moments.sums.device)
        (count,) = all_reduce_sum(number)
        held = HeldOut(rows, matrix) if matrix is not None and int(count) else None
        return absorb_judged(moments, kept, held, constant=constant, total=lambda sums: all_reduce_sum(sums)[0])

    def _log(self, before: Plan, after: Plan) -> None:
        log = logger("shrink")
        for key, share in self.left.items():
            log.debug("%s[%d] takes over the entries that go, but for %.1f%% of them", *key, 100 * share)
        for key in [*self.refused, *(key for key in self._absorbers if key not in self.left)]:
            if key in after.kept and not torch.equal(after.kept[key], before.kept.get(key, after.kept[key][:0])):
                reason = self.refused.get(key, "no finite moments of its inputs were gathered, or it is sharded")
                log.info("nothing takes over in %s[%d]: %s", *key, reason)


def _moments_in(state: Mapping[str, Tensor]) -> tuple[dict[WeightDim, InputMoments], dict[str, PairMoments]]:
    """Read the moments that `Grams.state_dict` has named."""
    grams: dict[WeightDim, InputMoments] = {}
    for label in [name.removeprefix("squares ") for name in state if name.startswith("squares ")]:
        name, _, dim = label.removesuffix("]").rpartition("[")
        count, window, calls, total = state[f"counts {label}"].tolist()
        moments = Moments(state[f"squares {label}"], state[f"sums {label}"], count)
        held = state.get(f"held {label}")
        grams[name, int(dim)] = InputMoments(moments, state.get(f"positions {label}"), window, calls, total, held)
    pairs = [name.removeprefix("near ") for name in state if name.startswith("near ")]
    return grams, {
        name: PairMoments(state[f"near {name}"], state[f"far {name}"], int(state[f"calls {name}"])) for name in pairs
    }


def _key_in_region(region: Region, key: WeightDim) -> WeightDim:
    """Return a (parameter, dim) by the parameter's name inside a region."""
    return (key[0].removeprefix(f"{region.name}.") if region.name else key[0]), key[1]


def _uses(captured: RegionGraph, name: str) -> bool:
    """Return whether a graph uses a parameter."""
    return any(
        captured.same_storage.get(tensor, tensor) == name
        for node in captured.graph.nodes
        if node.op == "placeholder" and node.users and (tensor := captured.tensors.get(node.name)) is not None
    )


def _has_values(tensor: Tensor | None) -> bool:
    """Return whether all values of a tensor are in this process: it is neither sharded nor on the meta device."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor is not None and tensor.device.type != "meta"


def _assign(values: dict[int, Tensor], tensors: Mapping[str, Tensor], tensor: Tensor, value: Tensor) -> None:
    """Set the new value of a tensor, and of those that share its memory."""
    for each in tensors.values():
        if each is tensor or (storage_key(each) == storage_key(tensor) and each.shape == tensor.shape):
            values[id(each)] = value
