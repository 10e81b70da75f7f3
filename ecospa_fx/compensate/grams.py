"""Grams: second moments of the inputs of weights, gathered while the model runs, so that a shrink can be absorbed.

    Grams(model) -> an observer per region -> X.T @ X per weight that sums over a coupling -> shrink(..., absorb=grams)

`X` is the input of the weight, one row per position. The size of its Gram matrix does not depend on the batches, and
it is a sum, so that ranks add theirs up. No activation is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn

from ecospa_fx.arguments import FLAG, MODULE, NAMED, NAMES, SEVERAL, instance, optional, takes
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import NoCouplingError, TargetError
from ecospa_fx.logs import logger
from ecospa_fx.model.journal import Journal, take_state
from ecospa_fx.model.lookup import compiled_state, plan, regions_of
from ecospa_fx.model.observers import check_observable, ignore, observe
from ecospa_fx.model.region import Region
from ecospa_fx.model.slicing import kept_positions
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.transform.consumers import Consumer, WeightDim
from ecospa_fx.passes.transform.eliminate import Summing
from ecospa_fx.passes.transform.rotate import FAR, BasisChange, Part
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.members import ranks_of, sharing_ranks
from ecospa_fx.ranks.shards import gathered, is_sharded
from ecospa_fx.ranks.tensor_parallel import parallel_count
from ecospa_fx.ranks.wrappers import unwrapped
from ecospa_fx.score.products import ProductSite

from .absorbers import Absorbers, key_in_region
from .moments import (
    Gathered,
    GramInput,
    InputMoments,
    MaskInput,
    PairMoments,
    RowChoice,
    add_blocks,
    mask_inputs,
    moments_in,
    pair_sites,
    without_sums,
)  # fmt: skip
from .norms import NormInput, NormRows, Norms, Place
from .taking_over import TakingOver, has_values

ROWS = 512
"""Positions read of one call at most, or a quarter of the columns if that is more: 16 calls are 4 rows a column."""


_SHARED_OUT = (
    "absorb=True and rotate=True read all inputs of a weight, and by tensor parallelism each rank has a part of them; "
    "use absorb=False and rotate=False"
)

Read: TypeAlias = GramInput | MaskInput | NormInput | ProductSite


@dataclass(frozen=True)
class _Only:
    """The couplings whose entries will go.

    Attributes:
        names: their names.
        dims: the (parameter, dim)s that they lie on.
    """

    names: frozenset[str]
    dims: frozenset[WeightDim]

    @classmethod
    def of(cls, model: nn.Module, names: Collection[str]) -> _Only:
        there = {coupling.name: coupling for coupling in compiled_state(model).couplings()}
        for name in names:
            if name not in there:
                raise NoCouplingError(f"the model has no coupling `{name}`; it has {', '.join(there) or 'none'}")
        members = [member for name in names for member in there[name].members]
        return cls(frozenset(names), frozenset((member.parameter, member.dim) for member in members))

    @property
    def parameters(self) -> set[str]:
        return {parameter for parameter, _ in self.dims}

    def lies_in(self, region: Region) -> bool:
        return not region.name or any(parameter.startswith(f"{region.name}.") for parameter in self.parameters)


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
        couplings: names of the couplings whose entries will go: only inputs of weights that sum over these are read.
            None: all.
        mask: the positions to read: the name of an argument of the region that tells positions from padding, as a
            tensor of integers or booleans over the first dims (batch, positions); or such a tensor itself, which may be
            assigned anew before each call. None: all.

    Attributes:
        left: (parameter, dim) -> share of the squares of the removed part at the last shrink that nothing took over;
            at the positions held out, if there are any.

    Raises:
        TargetError: `rows`, `ridge` or `mask` is out of range.
        NoCouplingError: one of `couplings` does not exist.
    """

    @takes(model=MODULE, training=FLAG, couplings=optional(NAMES))
    def __init__(
        self,
        model: nn.Module,
        *,
        rows: int | None = None,
        ridge: float | None = None,
        training: bool = False,
        couplings: Collection[str] | None = None,
        mask: str | Tensor | None = "attention_mask",
    ) -> None:
        model = unwrapped(model)
        if parallel_count(model) > 1:
            raise TargetError(_SHARED_OUT)
        if rows is not None and (not isinstance(rows, int) or rows < 1):
            raise TargetError(f"rows={rows!r} is out of range; it is a whole number of positions, at least 1")
        if ridge is not None and (not isinstance(ridge, (int, float)) or not ridge >= 0):
            raise TargetError(
                f"ridge={ridge!r} is out of range; it is a share of each entry's second moment, at least 0, or None"
            )
        self.model, self.rows, self.ridge, self.training = model, rows, ridge, training
        self.mask = mask
        self.active = True
        self.left: dict[WeightDim, float] = {}
        self._grams: dict[WeightDim, InputMoments] = {}
        self._pairs: dict[str, PairMoments] = {}
        self._whole: Gathered | None = None  # of all ranks, while they are read several times
        self._only = None if couplings is None else _Only.of(model, couplings)
        self.regions = [
            region for region in regions_of(model).values() if self._only is None or self._only.lies_in(region)
        ]
        self._absorbers, self._norms = Absorbers(model, self.regions), Norms(model)
        if self.regions:
            check_observable(model)
        for region in self.regions:
            observe(region, self)

    def __enter__(self) -> Grams:
        """Return itself, to gather until the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop gathering; the moments stay."""
        self.detach()

    def detach(self) -> None:
        """Stop gathering; the moments stay."""
        for region in self.regions:
            ignore(region, self)

    def reset(self) -> None:
        """Forget the moments."""
        self._grams.clear()
        self._pairs.clear()
        self._norms.reset()

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
    def refused(self) -> dict[WeightDim, str]:
        """(parameter, dim) of a weight that sums over a coupling and cannot take over -> the reason."""
        return self._absorbers.refused

    @property
    def absorbing(self) -> tuple[WeightDim, ...]:
        """(parameter, dim) of the weights that can take over."""
        self._absorbers.read_all()
        return tuple(self._absorbers.found)

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
        """Return the moments by name; of a sharded model over all ranks, which must all call it."""
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
        ranks, own = sharing_ranks(self.model), self._norms.state_dict()
        if not ranks:
            return tensors | own
        own |= {name: each for name, each in tensors.items() if name.startswith(("positions ", "held "))}
        whole = ranks.totals({n: each for n, each in tensors.items() if n not in own}, "the state of input moments")
        for name in [name for name in whole if name.startswith("counts ") and name in tensors]:
            whole[name][1:3] = tensors[name][1:3]  # the window and the calls of a rank
        return whole | own

    @takes(state=NAMED)
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ArgumentError: the state is none that `state_dict` returned.
        """
        if not sharing_ranks(self.model).is_first:  # or they would count once per rank
            state = {name: without_sums(name, each) for name, each in state.items()}
        take_state("Grams", [self, self._norms], lambda: self._take(*moments_in(state), Norms.read_in(state)))

    def _take(
        self, grams: dict[WeightDim, InputMoments], pairs: dict[str, PairMoments], rows: dict[Place, NormRows]
    ) -> None:
        self._grams, self._pairs, self._norms.read = grams, pairs, rows

    # The methods of an observer of regions, see `ecospa_fx.model.observers`.

    def wants(self, module: nn.Module) -> bool:
        """Return True at every forward, or at those that train."""
        return self.active and (not self.training or (torch.is_grad_enabled() and module.training))

    def nodes_of(self, region: Region, program: Program, module: nn.Module) -> tuple[list[fx.Node], list[Read]]:
        """Return the nodes whose values the weights of a region meet, and which input each is."""
        if region.shared_out is not None:
            raise TargetError(_SHARED_OUT)
        self._absorbers.read(region)
        here = self._absorbers.consumers(program.axis_facts)
        found: list[Read] = [] if not isinstance(self.mask, str) else list(mask_inputs(program, self.mask))
        only = self._only
        found += [site for site in pair_sites(region, program) if only is None or site.coupling in only.names]
        for key in self._absorbers.grams_in(region, None if only is None else only.dims):
            consumer, left = here.get(key_in_region(region, key)), region.state.plan.kept.get(key)
            if isinstance(consumer, Consumer) and (left is None or len(left)):
                found.append(GramInput(key, consumer.inputs, consumer.window, left))
        norms = self._norms.inputs(region, program)
        found += [norm for norm in norms if only is None or norm.place[0] in only.parameters]
        return [node for place in found for node in place.nodes], found

    def receive(self, known: list[Read], values: Sequence[Tensor]) -> None:
        """Add up what one call shows."""
        given = iter(values)
        if not known or values[0].is_meta:  # a tensor of the meta device has no entries to add up
            return
        mask = self.mask.bool() if isinstance(self.mask, Tensor) else None
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(values[0].device.type, enabled=False):
            for place in known:
                own = [next(given) for _ in place.nodes]
                if isinstance(place, MaskInput):
                    mask = None if own[0].is_floating_point() else own[0].bool()
                elif isinstance(place, GramInput):
                    self._add_input(place, own, mask)
                elif isinstance(place, NormInput):
                    self._norms.add(place, own[0], mask)
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
        self._absorbers.read_all()
        over = [(part, self._absorbers.found.get((part.parameter, part.dim))) for part in parts if part.side == FAR]
        whole = self._gathered([absorber.gram for _, absorber in over if absorber is not None], [coupling.name])
        pair = whole.pairs.get(coupling.name)
        if pair is not None and pair[0].shape == near.shape:
            return pair[0].to(near), pair[1].to(far)
        inputs = torch.zeros_like(near)
        for part, absorber in over:
            moments = None if absorber is None else whole.inputs.get(absorber.gram)
            if absorber is None or moments is None:
                return near, far
            add_blocks(moments, part, absorber.consumer.bias is not None, inputs)  # a bias can hold the constant part
        return (inputs, far) if bool(inputs.any()) else (near, far)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Read moments several times, while ranks add them up once."""
        self._absorbers.read_all()
        before, self._whole = self._whole, self._gathered(self._grams, self._pairs)
        try:
            yield
        finally:
            self._whole = before

    def _gathered(self, keys: Iterable[WeightDim], pairs: Iterable[str] = ()) -> Gathered:
        """Return moments over all ranks, at the sizes of the model now."""
        if self._whole is not None:
            return self._whole
        kept = plan(self.model).kept
        grams = {key: gram for key in keys if (gram := self._grams.get(key)) and gram.narrow_to(kept.get(key))}
        sides = {name: self._pairs[name] for name in pairs if name in self._pairs}
        return Gathered.over(ranks_of(self.model), grams, sides)

    def summing(self, coupling: Coupling) -> list[Summing] | None:
        """Return the weights that sum over a coupling, and their inputs' moments; None if one cannot take over."""
        self._absorbers.read_all()
        tensors, summing = named_tensors(self.model), []
        keys = [(member.parameter, member.dim) for member in coupling.members]
        whole = self._gathered(self._absorbers.found[key].gram for key in keys if key in self._absorbers.found)
        for member in coupling.members:
            key = member.parameter, member.dim
            absorber = self._absorbers.found.get(key)
            if absorber is None:
                if key in self._absorbers.refused:
                    return None
                continue
            moments, weight = whole.inputs.get(absorber.gram), tensors[member.parameter]
            if moments is None or not has_values(weight):
                return None
            unit = member.index if member.context is None else member.context * coupling.size + member.index
            unit = torch.where(member.index >= 0, unit, -1).repeat_interleave(absorber.consumer.window)
            if is_sharded(weight):
                ranks_of(self.model).meet("weights that take over")
            matrix = absorber.consumer.columns(gathered(weight).detach())
            summing.append(Summing(matrix, moments, unit, absorber.consumer.bias is not None))
        return summing or None

    def follow(self, coupling: Coupling, parts: Sequence[Part], change: BasisChange, journal: Journal) -> None:
        """Follow a change of basis."""
        for moments in (*self._grams.values(), *self._pairs.values()):
            journal.note_object(moments)
        if coupling.name in self._pairs:
            self._pairs[coupling.name].follow(change)
        done: set[int] = set()
        for part in parts:
            absorber = self._absorbers.found.get((part.parameter, part.dim)) if part.side == FAR else None
            gram = None if absorber is None else self._grams.get(absorber.gram)
            positions = plan(self.model).kept.get((part.parameter, part.dim))
            if gram is not None and gram.narrow_to(positions) and id(gram) not in done:
                done.add(id(gram))
                gram.follow(part, change)

    def norm_rows(self, vector: str, number: int) -> Tensor | None:
        """Return what was read of the input of a norm, `[positions, entries]` at the sizes of now, or None."""
        return self._norms.rows(vector, number)

    def follow_rows(self, vector: str, number: int, basis: Tensor, journal: Journal) -> None:
        """Follow a change of basis of the input of a norm."""
        read = self._norms.read.get((vector, number))
        rows = self.norm_rows(vector, number)
        if read is not None and rows is not None:
            journal.note_object(read)
            read.rows = (rows.double() @ basis.to(rows.device).T).to(rows)

    def follow_affine(
        self, part: Part, matrix: Tensor | None, constant: Tensor, done: set[int], journal: Journal
    ) -> None:
        """Follow a change of the input of a weight, `matrix @ x + constant`; None: forget what was read of it.

        Args:
            part: the weight.
            matrix: `[d, d]`.
            constant: `[d]`.
            done: `id` of the moments that have followed, which several weights may share.
            journal: that of the change.
        """
        absorber = self._absorbers.found.get((part.parameter, part.dim))
        gram = None if absorber is None else self._grams.get(absorber.gram)
        if gram is None or absorber is None or id(gram) in done:
            return
        done.add(id(gram))
        positions = plan(self.model).kept.get((part.parameter, part.dim))
        if matrix is None or gram.window > 1 or not gram.narrow_to(positions):
            journal.note_object(self)
            self._grams = {key: each for key, each in self._grams.items() if each is not gram}
            return
        journal.note_object(gram)
        gram.follow_affine(part, matrix, constant)

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
        self._absorbers.read_all()
        going: dict[WeightDim, Tensor] = {}
        for name, dim in self._absorbers.found:
            steps = kept_positions(name, before, after).get(dim) if (name, dim) in after.kept else None
            if steps is not None:
                going[name, dim] = steps
        found = self._absorbers.found
        whole = self._gathered(found[key].gram for key in sorted(going))
        rows = {key: gram.held for key, gram in self._grams.items() if gram.held is not None}
        taking = TakingOver(found, whole.inputs, rows, self.ridge, ranks_of(self.model))
        values = taking.values(going, held)
        self.left = taking.left
        self._log(before, after)
        return values | self._norms.absorbed(before, after, held)

    def _log(self, before: Plan, after: Plan) -> None:
        log = logger("shrink")
        for key, share in self.left.items():
            log.debug("%s[%d] takes over the entries that go, but for %.1f%% of them", *key, 100 * share)
        refused = self._absorbers.refused
        for key in [*refused, *(key for key in self._absorbers.found if key not in self.left)]:
            if key in after.kept and not torch.equal(after.kept[key], before.kept.get(key, after.kept[key][:0])):
                reason = refused.get(key, "no finite moments of its inputs were gathered")
                log.info("nothing takes over in %s[%d]: %s", *key, reason)
