"""Norms: vectors of norms take over the factor by which a shrink changes statistics that are taken along their axis.

    Norms(model) -> NormInput per place, read as other inputs of weights are -> rows of what is normalised
                 -> at a shrink: the norm's ops alone, at the sizes before and after, and least squares between the two

Where nothing was read, entries that go count as if they carried nothing: the factor is then `sqrt(n / n_left)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn

from ecospa_fx.logs import logger
from ecospa_fx.model.lookup import plan, regions_of
from ecospa_fx.model.region import Region
from ecospa_fx.model.slicing import kept_positions
from ecospa_fx.passes.axes.algebra import Expr, atoms_of, size_of
from ecospa_fx.passes.axes.selection import PerContext, Selection, mask_of, touched
from ecospa_fx.passes.graph.tensors import join, named_tensors
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.rewrite.replay import replay
from ecospa_fx.passes.transform.consumers import Input, spaced
from ecospa_fx.passes.transform.norms import Fit, Norm, Responses, grouped, is_affine, norms
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.members import ranks_of
from ecospa_fx.ranks.shards import gathered

from .taking_over import assign, has_values, placed

ROWS = 512
"""Positions that are kept of the input of one norm; a norm has two unknowns per channel."""
WHOLE = 1 << 20
"""Entries of a value that is kept whole, because its positions are not normalised one by one."""

Place: TypeAlias = tuple[str, int]  # the first vector of a norm, by its name in the model, and the number of the place


@dataclass(frozen=True, eq=False)
class NormInput:
    """The input of a norm, in the graph that runs.

    Attributes:
        place: the norm.
        norm: as that graph has it.
        positions: the original positions along the norm's axis that are left; None: all.
    """

    place: Place
    norm: Norm
    positions: Tensor | None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The node whose value must be read."""
        return (self.norm.source,)


@dataclass
class NormRows:
    """Values of the input of a norm.

    Attributes:
        rows: `[positions, entries]`; or a value as it is, where positions are not normalised one by one.
        positions: the original positions along its axis that it has; None: all.
        calls: calls that were read.
    """

    rows: Tensor
    positions: Tensor | None
    calls: int = 0

    def narrow_to(self, positions: Tensor | None, dim: int) -> bool:
        """Drop the entries that have gone since; return False if one of `positions` is missing."""
        if positions is None or (self.positions is not None and torch.equal(positions, self.positions)):
            return positions is self.positions or positions is not None
        then = torch.arange(self.rows.shape[dim]) if self.positions is None else self.positions
        remaining = torch.isin(then, positions)
        if int(remaining.sum()) != len(positions):
            return False
        left = remaining.nonzero().flatten().to(self.rows.device)
        self.rows, self.positions = self.rows.index_select(dim, left), positions
        return True


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors of norms that are the same in several places of a region.

    Attributes:
        region: the region.
        axis_facts: axes of the graph that they were found in.
        norms: the places.
        names: the vectors by their names in the model.
        dims: the dim of each that lies along the axis.
    """

    region: Region
    axis_facts: AxisFacts
    norms: tuple[Norm, ...]
    names: tuple[str, ...]
    dims: tuple[int, ...]


class Norms:
    """The norms of a model, and what was read of their inputs.

    Args:
        model: a compiled model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.read: dict[Place, NormRows] = {}
        self._found: dict[int, tuple[AxisFacts, list[Norm]]] = {}

    def inputs(self, region: Region, program: Program) -> Iterator[NormInput]:
        """Yield the inputs of norms in a program of a region whose axis some coupling may shrink."""
        for group in grouped(self._norms(program.axis_facts)):
            name = join(region.name, group[0].vectors[0])
            lying = [d for d, e in enumerate(program.axis_facts.parameters[group[0].vectors[0]]) if e == group[0].expr]
            for number, norm in enumerate(group):
                yield NormInput((name, number), norm, region.state.plan.kept.get((name, lying[0])))

    def add(self, place: NormInput, value: Tensor, mask: Tensor | None) -> None:
        """Keep what one call shows."""
        before, norm = self.read.get(place.place), place.norm
        calls = 0 if before is None else before.calls
        fits = before is not None and before.narrow_to(place.positions, 1 if norm.by_rows else norm.dim)
        if not norm.by_rows:
            if value.numel() <= WHOLE:
                self.read[place.place] = NormRows(value.clone(), place.positions, calls + 1)
            return
        rows = Input(norm.source, norm.dim - value.ndim).rows(value, ROWS, calls, mask)
        if before is not None and fits:
            rows = spaced(torch.cat([before.rows, rows]), ROWS, calls)
        self.read[place.place] = NormRows(rows.clone(), place.positions, calls + 1)

    def vectors(self) -> Iterator[Vectors]:
        """Yield the vectors of norms, as the first graph of each region that uses them has them."""
        for region in regions_of(self.model).values():
            seen: set[str] = set()
            for program in region.specializations:
                facts = program.axis_facts
                for group in grouped(self._norms(facts)):
                    names = tuple(join(region.name, name) for name in group[0].vectors)
                    if seen.isdisjoint(names):
                        exprs = [facts.parameters[name] for name in group[0].vectors]
                        dims = tuple(next(d for d, e in enumerate(each) if e == group[0].expr) for each in exprs)
                        yield Vectors(region, facts, tuple(group), names, dims)
                    seen.update(names)

    def _norms(self, axis_facts: AxisFacts) -> list[Norm]:
        cached = self._found.get(id(axis_facts))
        if cached is None or cached[0] is not axis_facts:
            self._found[id(axis_facts)] = cached = (axis_facts, norms(axis_facts))
        return cached[1]

    def absorbed(self, before: Plan, after: Plan, held: Sequence[Mapping[str, Tensor]]) -> dict[int, Tensor]:
        """Compute the vectors that take over, at their sizes before the shrink; see `Grams.absorbed`."""
        values: dict[int, Tensor] = {}
        going = [
            (vectors, steps)
            for vectors in self.vectors()
            if (vectors.names[0], vectors.dims[0]) in after.kept
            and (steps := kept_positions(vectors.names[0], before, after).get(vectors.dims[0])) is not None
        ]
        log = logger("shrink")
        for vectors, steps in sorted(going, key=lambda each: each[0].names):
            taken = self._solved(vectors, steps, before, after, held)
            if isinstance(taken, str):
                log.info("`%s` takes over no factor: %s", vectors.names[0], taken)
                continue
            for tensors, new in zip(held, taken, strict=True):
                for name, dim, value in zip(vectors.names, vectors.dims, new, strict=True):
                    tensor = tensors.get(name)
                    if tensor is not None and has_values(tensor):
                        whole = gathered(tensor).detach().clone()
                        whole.index_copy_(dim, steps.to(whole.device), _along(value, dim, whole.ndim).to(whole))
                        assign(values, tensors, tensor, placed(whole, tensor, by_rows=False))
        return values

    def _solved(
        self, vectors: Vectors, steps: Tensor, before: Plan, after: Plan, held: Sequence[Mapping[str, Tensor]]
    ) -> list[Tensor] | str:
        """Return for each model the values of the vectors at the sizes left, `[vectors, channels]`; or a reason."""
        facts, ranks, tensors = vectors.axis_facts, ranks_of(self.model), named_tensors(self.model)
        plans = replay(facts, before), replay(facts, after)
        axes = {expr for norm in vectors.norms for exprs in facts.values[norm.source] for expr in exprs}
        if any(_by_context(expr, kept) for kept in plans for expr in axes):
            return "heads keep entries of their own"
        full = {name: join(vectors.region.name, name) for norm in vectors.norms for name in norm.tensors}
        models = [{name: gathered(each.get(of, tensors[of])).detach() for name, of in full.items()} for each in held]
        if any(tensor.is_meta for each in models for tensor in each.values()):
            return "it has no values"
        after_all = {name: _narrowed(models[0][name], kept_positions(of, before, after)) for name, of in full.items()}
        old = torch.stack([_flat(each, vectors)[:, steps.to(_flat(each, vectors).device)] for each in models])
        fit = Fit.empty(len(steps), len(vectors.names), len(models), old.device)
        affine = True
        for read in (True, False):  # what was seen; where no rank has seen anything, what may be
            for number, norm in enumerate(vectors.norms):
                place = vectors.names[0], number
                positions = before.kept.get((vectors.names[0], vectors.dims[0]))
                x = self._seen(norm, place, positions) if read else _imagined(norm, facts, plans, old)
                if x is None:
                    continue
                affine = affine and is_affine(norm, facts, plans[0], x, models[0])
                small = _left(x, norm, facts.values[norm.source][0], norm.dim, plans)
                now = Responses.of(norm, facts, plans[1], small, after_all)
                results = [norm.run(facts, plans[0], x, each).detach() for each in models]
                left = [_left(y, norm, facts.values[norm.result][0], norm.along, plans) for y in results]
                fit.add(now, [y.movedim(norm.along, -1).reshape(-1, len(steps)).double() for y in left])
            sums = {"squares": fit.squares, "sums": fit.sums, "count": fit.squares.new_tensor([fit.count, not affine])}
            total = ranks.totals(sums, "the inputs of norms") if ranks else sums
            if float(total["count"][1]):
                return "what it scales is not linear in it"
            if float(total["count"][0]):
                break
        else:
            return "no values of its input were read"
        fit = Fit(total["squares"], total["sums"], float(total["count"][0]))
        solved = fit.solved(old, 0.02 / fit.count if read else 0.0)
        return list(solved) if bool(solved.isfinite().all()) else "no finite values of its input were read"

    def _seen(self, norm: Norm, place: Place, positions: Tensor | None) -> Tensor | None:
        """Return what was read of the input of a norm, at the sizes of now."""
        read = self.read.get(place)
        if read is None or not read.narrow_to(positions, 1 if norm.by_rows else norm.dim):
            return None
        return norm.shaped(read.rows) if norm.by_rows else read.rows

    def rows(self, vector: str, number: int) -> Tensor | None:
        """Return what was read of the input of a norm, `[positions, entries]` at the sizes of now, or None."""
        read = self.read.get((vector, number))
        if read is None or read.rows.ndim != 2:
            return None
        kept = plan(self.model).kept
        dim = next((d for (name, d) in kept if name == vector), None)
        return read.rows if read.narrow_to(None if dim is None else kept[vector, dim], 1) else None

    def reset(self) -> None:
        """Forget what was read."""
        self.read.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what was read, by name."""
        tensors: dict[str, Tensor] = {}
        for (name, number), read in self.read.items():
            label = f"{name}#{number}"
            tensors |= {f"rows {label}": read.rows, f"calls of {label}": torch.tensor(read.calls)}
            if read.positions is not None:
                tensors[f"left of {label}"] = read.positions
        return tensors

    @staticmethod
    def read_in(state: Mapping[str, Tensor]) -> dict[Place, NormRows]:
        """Read what `state_dict` has named."""
        read: dict[Place, NormRows] = {}
        for label in [name.removeprefix("rows ") for name in state if name.startswith("rows ")]:
            name, _, number = label.rpartition("#")
            calls = int(state[f"calls of {label}"])
            read[name, int(number)] = NormRows(state[f"rows {label}"], state.get(f"left of {label}"), calls)
        return read


def _by_context(expr: Expr, kept: Selection) -> bool:
    return any(isinstance(kept.get(atom), PerContext) for atom in atoms_of(expr))


def _flat(tensors: Mapping[str, Tensor], vectors: Vectors) -> Tensor:
    """Return the vectors `[vectors, channels]`, float64."""
    names = vectors.norms[0].vectors
    return torch.stack([tensors[name].flatten().double() for name in names])


def _narrowed(tensor: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    for dim, index in keep.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def _left(
    value: Tensor, norm: Norm, exprs: Sequence[Expr], along: int, plans: tuple[Selection, Selection]
) -> Tensor:  # fmt: skip
    """Return the part of a value that a shrink leaves; of rows, along the axis of the norm alone."""
    before, after = plans
    dims = [along] if norm.by_rows else range(len(exprs))
    keep = {d: mask_of(exprs[d], after)[mask_of(exprs[d], before)] for d in dims if touched(exprs[d], after)}
    return _narrowed(value, {dim: mask.nonzero().flatten() for dim, mask in keep.items()})


def _imagined(norm: Norm, facts: AxisFacts, plans: tuple[Selection, Selection], like: Tensor) -> Tensor:
    """Make a value of the input of a norm in which the entries that go carry nothing."""
    before, after = plans
    exprs, random = facts.values[norm.source][0], torch.Generator().manual_seed(0)
    sizes = [int(mask_of(e, before).sum()) if type(size_of(e)) is int else 4 for e in exprs]
    if norm.by_rows:
        value = norm.shaped(torch.randn(ROWS, sizes[norm.dim], generator=random))
    else:
        value = torch.randn(sizes, generator=random)
    stays = mask_of(norm.expr, after)[mask_of(norm.expr, before)]
    left = value.index_select(norm.dim, stays.nonzero().flatten())
    left = left - left.mean(norm.dim, keepdim=True)  # nothing is the mean, where one is subtracted
    value = torch.zeros_like(value).index_copy_(norm.dim, stays.nonzero().flatten(), left)
    return value.to(like.device, norm.source.meta["val"].dtype)


def _along(value: Tensor, dim: int, ndim: int) -> Tensor:
    """Lay a vector along a dim."""
    return value.reshape([-1 if d == dim else 1 for d in range(ndim)])
