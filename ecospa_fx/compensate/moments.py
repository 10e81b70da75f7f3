"""Moments: second moments of the inputs of a weight, and of the two sides of a product of activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ecospa_fx.model.region import Region
from ecospa_fx.passes.graph.tensors import join
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.transform.absorb import Moments
from ecospa_fx.passes.transform.consumers import Input, WeightDim, spaced
from ecospa_fx.passes.transform.rotate import BasisChange, Part, change_basis
from ecospa_fx.ranks.agreement import Ranks
from ecospa_fx.score.products import ProductSite, product_sites

EVERY = 4
"""One call in so many is held out."""

HELD = 512
"""Positions that are held out at most, evenly of all the calls held out; the others of these calls are fitted."""


@dataclass(frozen=True, eq=False)
class GramInput:
    """The inputs whose moments a call adds to one Gram matrix.

    Attributes:
        gram: the (parameter, dim) under which the matrix is kept.
        inputs: the inputs of that weight, in the graph that runs.
        window: columns per entry, see `Consumer`.
        positions: the original positions along the weight's dim that are left; None: all.
    """

    gram: WeightDim
    inputs: tuple[Input, ...]
    window: int
    positions: Tensor | None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes whose values must be read."""
        return tuple(each.node for each in self.inputs)


@dataclass(frozen=True, eq=False)
class MaskInput:
    """The argument of a region that tells positions from padding."""

    node: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The node whose value must be read."""
        return (self.node,)


def mask_inputs(program: Program, name: str) -> Iterator[MaskInput]:
    """Find the argument of a name, if a program takes it as a tensor over batch and positions."""
    captured = program.captured
    for node in captured.graph.nodes:
        if node.op == "placeholder" and captured.arguments.get(node.name) == name:
            yield MaskInput(node)


@dataclass(frozen=True, eq=False)
class RowChoice:
    """The choice of the positions that are read of a weight's inputs.

    Attributes:
        limit: positions to read of one call at most.
        mask: BoolTensor of the positions to read, see `Input.rows`; None: all.
        judged: hold every fourth call out, to judge by.
    """

    limit: int
    mask: Tensor | None = None
    judged: bool = False

    def holds_out(self, calls: int) -> bool:
        """Return whether the call after so many is held out."""
        return self.judged and calls % EVERY == EVERY - 1


@dataclass
class InputMoments:
    """Moments of the inputs of some weights.

    Attributes:
        moments: the sums.
        positions: the original positions along the weight's dim that they are of; None: all.
        window: columns per entry, see `Consumer`.
        calls: calls that were added up.
        total: positions (tokens, pixels) of these calls, those that were not read included.
        held: `[positions, columns]`, positions of calls that were held out; None before the first such call.
    """

    moments: Moments
    positions: Tensor | None
    window: int
    calls: int = 0
    total: int = 0
    held: Tensor | None = None

    @classmethod
    def of_call(cls, gram_input: GramInput, values: Sequence[Tensor], reading: RowChoice, calls: int) -> InputMoments:
        """Compute the moments of one call, or hold it out.

        Args:
            gram_input: the inputs.
            values: their values, one per input.
            reading: how they are read.
            calls: calls before this one; from call to call other positions are read.
        """
        share, pairs = -(-reading.limit // len(values)), list(zip(gram_input.inputs, values, strict=True))
        rows = _precise(torch.cat([each.rows(value, share, calls, reading.mask) for each, value in pairs]))
        total = max(each.positions(value, reading.mask) for each, value in pairs)
        held = None
        if reading.holds_out(calls):
            rows, held = rows[:0], spaced(rows, HELD, calls).clone()
        moments = Moments(rows.T @ rows, rows.sum(0), len(rows))
        return cls(moments, gram_input.positions, gram_input.window, 1, total, held)

    def add(self, other: InputMoments) -> None:
        """Add those of another call."""
        self._add_sums(other.moments)
        if other.held is not None:
            rows = other.held if self.held is None else torch.cat([self.held, other.held])
            stays = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
            stays[spaced(torch.arange(len(rows), device=rows.device), HELD, 0)] = True
            self.held, rest = rows[stays], rows[~stays]
            self._add_sums(Moments(rest.T @ rest, rest.sum(0), len(rest)))
        self.calls += other.calls
        self.total += other.total

    def _add_sums(self, theirs: Moments) -> None:
        mine = self.moments
        mine.squares.add_(theirs.squares)
        mine.sums.add_(theirs.sums)
        self.moments = Moments(mine.squares, mine.sums, mine.count + theirs.count)

    def narrow_to(self, positions: Tensor | None) -> bool:
        """Drop the entries that have gone since; return False if one of `positions` is missing."""
        if positions is None or (self.positions is not None and torch.equal(positions, self.positions)):
            return positions is self.positions or positions is not None
        then = torch.arange(len(self.moments.sums) // self.window) if self.positions is None else self.positions
        remaining = torch.isin(then, positions)
        if int(remaining.sum()) != len(positions):
            return False
        left = columns(remaining.nonzero().flatten(), self.window)
        held = None if self.held is None else self.held[:, left.to(self.held.device)]
        # At once: an interrupt must not come between.
        self.moments, self.held, self.positions = self.moments.at(left), held, positions
        return True

    def follow(self, part: Part, change: BasisChange) -> None:
        """Follow a change of basis of the weight's inputs."""
        squares, sums = self.moments.squares, self.moments.sums
        for dim in (0, 1):
            squares = change_basis(squares, replace(part, dim=dim), change.near)
        held = None if self.held is None else change_basis(self.held, replace(part, dim=1), change.near)
        sums = change_basis(sums, replace(part, dim=0), change.near)
        self.moments, self.held = Moments(squares, sums, self.moments.count), held

    def follow_affine(self, part: Part, matrix: Tensor, constant: Tensor) -> None:
        """Follow a change of the weight's inputs, `matrix @ x + constant`."""
        moments, count = self.moments, self.moments.count
        order = part.order[:, 0].to(moments.sums.device)
        by, added = matrix.to(moments.sums.device), constant.to(moments.sums.device)
        squares, sums = moments.squares.double()[order][:, order], by @ moments.sums.double()[order]
        squares = by @ squares @ by.T + torch.outer(sums, added) + torch.outer(added, sums)
        squares = squares + count * torch.outer(added, added)
        sums = sums + count * added
        back = order.argsort()
        held = None
        if self.held is not None:
            held = (self.held.double()[:, order] @ by.T + added)[:, back].to(self.held)
        moved = Moments(squares[back][:, back].to(moments.squares), sums[back].to(moments.sums), count)
        self.moments, self.held = moved, held


@dataclass
class PairMoments:
    """Moments of two activations whose product is summed along a coupling, such as queries and keys.

    Attributes:
        near: `[contexts, d, d]`, sums over calls of the mean outer products of the first.
        far: likewise of the second.
        calls: calls that were added up.
    """

    near: Tensor
    far: Tensor
    calls: int = 0

    @classmethod
    def of_call(cls, site: ProductSite, values: Sequence[Tensor], limit: int, calls: int) -> PairMoments:
        """Compute the moments of one call; arguments as those of `InputMoments.of_call`."""
        both = []
        for side, value in zip(site.sides, values, strict=True):
            rows = _precise(value).movedim(side.dim, -1)
            rows = rows[None] if side.along is None else rows.movedim(side.along - (side.along > side.dim), 0)
            rows = spaced(rows.flatten(1, -2).transpose(0, 1), limit, calls)
            squares = torch.einsum("tci,tcj->cij", rows, rows) / len(rows)
            beside = torch.zeros(len(squares), dtype=torch.long) if side.beside is None else side.beside
            total = squares.new_zeros(site.contexts, *squares.shape[1:])
            both.append(total.index_add_(0, beside.to(squares.device), squares))
        near, far = both
        return cls(near, far, 1)

    def add(self, other: PairMoments) -> None:
        """Add those of another call."""
        self.near.add_(other.near)
        self.far.add_(other.far)
        self.calls += other.calls

    def follow(self, change: BasisChange) -> None:
        """Follow a change of basis."""
        self.near = (change.near @ self.near.double() @ change.near.mT).to(self.near)
        self.far = (change.far @ self.far.double() @ change.far.mT).to(self.far)


def pair_sites(region: Region, program: Program) -> Iterator[ProductSite]:
    """Find the products of two activations that are summed along a coupling which has a dim of its own there."""
    names = {found.key: found.name for found in region.naming_graph.discovery.couplings}
    offered = {coupling.name: coupling for coupling in region.offers.couplings()}
    kept = region.kept(program)
    weights = {o.node for each in program.axis_facts.operands.values() for o in each if o.parameters}
    for found in region.discovery_of(program).couplings:
        coupling = offered.get(join(region.name, names.get(found.key, "")))
        if coupling is None or not coupling.linear:
            continue
        for site in product_sites(program.axis_facts, found, coupling, kept, kept):
            activations = all(side.node not in weights for side in site.sides)
            told_apart = coupling.contexts == 1 or all(side.along is not None for side in site.sides)
            if activations and told_apart and len(site.entry) == coupling.size and site.context is None:
                yield site


def columns(entries: Tensor, window: int) -> Tensor:
    """Return the columns of some entries, `window` per entry."""
    return (entries[:, None] * window + torch.arange(window)).flatten()


def add_blocks(moments: Moments, part: Part, centred: bool, into: Tensor) -> None:
    """Add the mean squares within each context to `into`, `[contexts, d, d]`; of what varies, if `centred`."""
    squares = moments.squares.double() / moments.count
    if centred:
        squares = squares - torch.outer(moments.sums, moments.sums).double() / moments.count**2
    order = part.order.to(squares.device)
    blocks = squares[order[:, None, :], order[None, :, :]].permute(2, 0, 1)
    into.index_add_(0, part.context.to(into.device), blocks.to(into))


@dataclass(frozen=True, eq=False)
class Gathered:
    """The sums of moments, added up over ranks.

    Attributes:
        inputs: (parameter, dim) -> moments of the inputs.
        pairs: coupling name -> moments of the two sides of a product, `[contexts, d, d]` each.
    """

    inputs: Mapping[WeightDim, Moments]
    pairs: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def over(cls, ranks: Ranks, inputs: Mapping[WeightDim, InputMoments], pairs: Mapping[str, PairMoments]) -> Gathered:
        """Add up the moments of all ranks; a rank without some of them adds nothing."""
        if not ranks:
            return cls({key: each.moments for key, each in inputs.items()}, _sides(pairs))
        named: dict[str, Tensor] = {}
        for (name, dim), each in inputs.items():
            sums, count = each.moments.sums, torch.tensor([each.moments.count], dtype=torch.float64)
            named |= {f"squares {name} {dim}": each.moments.squares, f"sums {name} {dim}": sums}
            named[f"count {name} {dim}"] = count.to(sums.device)
        for name, (near, far) in _sides(pairs).items():
            named |= {f"near {name}": near, f"far {name}": far}
        totals = ranks.totals(named, "the moments of activations")
        keys = [label.removeprefix("count ").rpartition(" ") for label in totals if label.startswith("count ")]
        whole = {
            (name, int(dim)): Moments(
                totals[f"squares {name} {dim}"], totals[f"sums {name} {dim}"], int(totals[f"count {name} {dim}"])
            )
            for name, _, dim in keys
            if f"squares {name} {dim}" in totals and f"sums {name} {dim}" in totals
        }
        names = [label.removeprefix("near ") for label in totals if label.startswith("near ")]
        return cls(whole, {n: (totals[f"near {n}"], totals[f"far {n}"]) for n in names if f"far {n}" in totals})


def _sides(pairs: Mapping[str, PairMoments]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (pair.near, pair.far) for name, pair in pairs.items()}


def _precise(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def without_sums(name: str, tensor: Any) -> Any:
    """Return a tensor of a state as if nothing had been added up; of counts, the window and the calls stay."""
    if not isinstance(tensor, Tensor) or name.startswith(("positions ", "rows ", "calls of ", "left of ")):
        return tensor
    if name.startswith("counts "):
        return tensor * torch.tensor([0, 1, 1, 0])
    return torch.zeros_like(tensor)


def moments_in(state: Mapping[str, Tensor]) -> tuple[dict[WeightDim, InputMoments], dict[str, PairMoments]]:
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
