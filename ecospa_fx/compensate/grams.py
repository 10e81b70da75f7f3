"""Grams: what weights meet, as second moments gathered while the model runs, so that a shrink can be absorbed.

    Grams(model) -> an observer per region -> X.T @ X per weight that sums over a coupling -> shrink(..., absorb=grams)

`X` is what the weight is multiplied with, one row per position. Its Gram matrix has a fixed size whatever is trained
on, and is a sum, so that ranks add theirs up. No activation is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ecospa_fx.collectives import all_reduce_sum
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import TargetError
from ecospa_fx.logs import logger
from ecospa_fx.model.lookup import plan, regions_of
from ecospa_fx.model.observers import ignore, observe
from ecospa_fx.model.region import Region
from ecospa_fx.model.slicing import kept_positions
from ecospa_fx.passes.graph.tensors import named_tensors, storage_key
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.captured import RegionGraph
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.transform.absorb import Absorption, Moments, absorb
from ecospa_fx.passes.transform.consumers import Consumer, WeightDim, consumers
from ecospa_fx.passes.transform.eliminate import Summing
from ecospa_fx.passes.transform.rotate import FAR, BasisChange, Part
from ecospa_fx.plan import Plan
from ecospa_fx.score.products import ProductSite

from .moments import GramInput, InputMoments, PairMoments, columns, meetings_in, reduced

ROWS = 512
"""Positions read of one call at most, or a quarter of the columns where that is more: 16 calls are 4 rows a column."""

RIDGE = 1e-3
"""Share of the mean second moment; see docs/absorption.md for what others do."""


@dataclass(frozen=True, eq=False)
class _Known:
    """A weight that may absorb: how it is used, and under whose name lies the Gram matrix of what it meets."""

    consumer: Consumer
    gram: WeightDim


class Grams:
    """Gathers what a shrink needs to be absorbed: `X.T @ X` for each weight that sums over what a coupling selects.

    >>> with ecospa_fx.Grams(model) as grams, torch.no_grad():
    ...     for batch in some_batches:
    ...         model(batch)
    >>> ecospa_fx.shrink(model, {coupling: keep}, absorb=grams)

    `EcoSpaTrainer(..., absorb=True)` does this by itself, with its training batches.

    Args:
        model: a compiled model that has been called.
        rows: positions (tokens, pixels) that are read of one call at most, evenly spaced; by default 512, or a quarter
            of what the weight sums over where that is more.
        ridge: how much the regression distrusts what it has seen: what is added to the diagonal of `X.T @ X`, as a
            share of its mean.
        training: look at forwards in training mode with gradients on only, not at every one.

    Attributes:
        refused: (parameter, dim) of weights that sum over a coupling in a way that nothing takes over -> why.
        left: (parameter, dim) -> share of the squares of what went at the last shrink that nothing took over.

    Raises:
        TargetError: `rows` or `ridge` is out of range.
    """

    def __init__(
        self, model: nn.Module, *, rows: int | None = None, ridge: float = RIDGE, training: bool = False
    ) -> None:
        if rows is not None and (not isinstance(rows, int) or rows < 1):
            raise TargetError(f"rows={rows!r} is out of range; it is a whole number of positions, at least 1")
        if not isinstance(ridge, (int, float)) or not ridge >= 0:
            raise TargetError(f"ridge={ridge!r} is out of range; it is a share of the mean second moment, at least 0")
        self.model, self.rows, self.ridge, self.training = model, rows, ridge, training
        self.active = True
        self.refused: dict[WeightDim, str] = {}
        self.left: dict[WeightDim, float] = {}
        self._grams: dict[WeightDim, InputMoments] = {}
        self._meetings: dict[str, PairMoments] = {}
        self._graphs: dict[int, tuple[AxisFacts, Mapping[WeightDim, Consumer | str]]] = {}
        self._known: dict[WeightDim, _Known] = {}
        self._regions = list(regions_of(model).values())
        for region in self._regions:
            observe(region, self)

    def __enter__(self) -> Grams:
        """Gather until the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop gathering; what was gathered stays."""
        self.detach()

    def detach(self) -> None:
        """Stop gathering; what was gathered stays."""
        for region in self._regions:
            ignore(region, self)

    def reset(self) -> None:
        """Forget what was gathered."""
        self._grams.clear()
        self._meetings.clear()

    @property
    def absorbing(self) -> tuple[WeightDim, ...]:
        """(parameter, dim) of the weights that can take over."""
        self._read_all()
        return tuple(self._known)

    @property
    def empty(self) -> bool:
        """Nothing has been gathered."""
        return not self._grams

    @property
    def positions(self) -> int:
        """Positions (tokens, pixels) of the calls that were seen, where they are most."""
        return max((gram.total for gram in self._grams.values()), default=0)

    def state_dict(self) -> dict[str, Tensor]:
        """What was gathered, by name."""
        found: dict[str, Tensor] = {}
        for (name, dim), gram in self._grams.items():
            label = f"{name}[{dim}]"
            found |= {f"squares {label}": gram.moments.squares, f"sums {label}": gram.moments.sums}
            found[f"counts {label}"] = torch.tensor([gram.moments.count, gram.window, gram.calls, gram.total])
            if gram.positions is not None:
                found[f"positions {label}"] = gram.positions
        for name, met in self._meetings.items():
            found |= {f"near {name}": met.near, f"far {name}": met.far, f"calls {name}": torch.tensor(met.calls)}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        self._grams = {}
        for label in [name.removeprefix("squares ") for name in state if name.startswith("squares ")]:
            name, _, dim = label.removesuffix("]").rpartition("[")
            count, window, calls, total = state[f"counts {label}"].tolist()
            moments = Moments(state[f"squares {label}"], state[f"sums {label}"], count)
            self._grams[name, int(dim)] = InputMoments(moments, state.get(f"positions {label}"), window, calls, total)
        met = [name.removeprefix("near ") for name in state if name.startswith("near ")]
        self._meetings = {
            name: PairMoments(state[f"near {name}"], state[f"far {name}"], int(state[f"calls {name}"])) for name in met
        }

    # What an observer of regions does, see `ecospa_fx.model.observers`.

    def looks(self, module: nn.Module) -> bool:
        """At every forward, or those that train."""
        return self.active and (not self.training or (torch.is_grad_enabled() and module.training))

    def places(self, region: Region, program: Program) -> tuple[list[fx.Node], list[GramInput | ProductSite]]:
        """What the weights of a region meet."""
        self._read(region)
        here = self._consumers(program.axis_facts)
        found: list[GramInput | ProductSite] = list(meetings_in(region, program))
        for key in dict.fromkeys(self._known[key].gram for key in self._offered(region) if key in self._known):
            consumer = here.get(_inside(region, key))
            if isinstance(consumer, Consumer):
                found.append(GramInput(key, consumer.inputs, consumer.window, region.compiled.plan.kept.get(key)))
        return [node for place in found for node in place.nodes], found

    def see(self, known: list[GramInput | ProductSite], values: Sequence[Tensor]) -> None:
        """Add up what one call shows."""
        given = iter(values)
        if not known:
            return
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(values[0].device.type, enabled=False):
            for place in known:
                mine = [next(given) for _ in place.nodes]
                if isinstance(place, GramInput):
                    gram = self._grams.get(place.gram)
                    most = self.rows or max(ROWS, mine[0].shape[place.inputs[0].dim] * place.window // 4)
                    here = InputMoments.seen(place, mine, most, 0 if gram is None else gram.calls)
                    if gram is not None and gram.follow(place.positions):
                        gram.add(here)
                    else:
                        self._grams[place.gram] = here
                else:
                    held = self._meetings.get(place.coupling)
                    there = PairMoments.seen(place, mine, self.rows or ROWS, 0 if held is None else held.calls)
                    if held is not None and held.near.shape == there.near.shape:
                        held.add(there)
                    else:
                        self._meetings[place.coupling] = there

    def of_sides(self, coupling: Coupling, parts: Sequence[Part], near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        """The Gram matrices of the two sides of a coupling, of what flows where that was seen, else of its weights.

        Args:
            coupling: one whose basis is free.
            parts: where its sides lie.
            near: those of the weights, `[contexts, d, d]`.
            far: likewise.
        """
        self._read_all()
        held = self._meetings.get(coupling.name)
        if held is not None and held.near.shape == near.shape:
            near, far = all_reduce_sum(held.near.to(near), held.far.to(far))
            return near, far
        seen = torch.zeros_like(near)
        for part, known, gram in self._summing(parts):
            if known is None or gram is None:
                return near, far
            gram.blocks(part, known.consumer.bias is not None, seen)  # what is constant a bias can hold
        return (seen, far) if bool(seen.any()) else (near, far)

    def summing(self, coupling: Coupling) -> list[Summing] | None:
        """The weights that sum over a coupling, with the moments of what they meet; None unless all may take over."""
        self._read_all()
        tensors, found = named_tensors(self.model), []
        for member in coupling.members:
            key = member.parameter, member.dim
            known = self._known.get(key)
            if known is None:
                if key in self.refused:
                    return None
                continue
            gram, weight = self._grams.get(known.gram), tensors[member.parameter]
            if gram is None or not gram.follow(plan(self.model).kept.get(key)) or not _plain(weight):
                return None
            unit = member.index if member.context is None else member.context * coupling.size + member.index
            unit = torch.where(member.index >= 0, unit, -1).repeat_interleave(gram.window)
            matrix = known.consumer.columns(weight.detach())
            found.append(Summing(matrix, reduced(gram.moments), unit, known.consumer.bias is not None))
        return found or None

    def turn(self, coupling: Coupling, parts: Sequence[Part], turn: BasisChange) -> None:
        """Follow a change of basis."""
        if coupling.name in self._meetings:
            self._meetings[coupling.name].turn(turn)
        done: set[int] = set()
        for part, _, gram in self._summing(parts):
            if gram is not None and id(gram) not in done:
                done.add(id(gram))
                gram.turn(part, turn)

    def _summing(self, parts: Sequence[Part]) -> Iterator[tuple[Part, _Known | None, InputMoments | None]]:
        """The weights that sum over a coupling, with the moments of what they meet at the sizes there are now."""
        for part in parts:
            if part.side == FAR:
                known = self._known.get((part.parameter, part.dim))
                gram = None if known is None else self._grams.get(known.gram)
                positions = plan(self.model).kept.get((part.parameter, part.dim))
                yield part, known, gram if gram is not None and gram.follow(positions) else None

    def _consumers(self, axis_facts: AxisFacts) -> Mapping[WeightDim, Consumer | str]:
        known = self._graphs.get(id(axis_facts))
        if known is None or known[0] is not axis_facts:
            self._graphs[id(axis_facts)] = known = (axis_facts, consumers(axis_facts))
        return known[1]

    def _offered(self, region: Region) -> list[WeightDim]:
        """The dims of matrices that couplings of a region lie on."""
        return sorted({(m.parameter, m.dim) for c in region.couplings() for m in c.members if m.matrix})

    def _read_all(self) -> None:
        for region in self._regions:
            if region.programs:
                self._read(region)

    def _read(self, region: Region) -> None:
        """Find out which weights of a region may absorb: every graph of it must sum over the dim in the same way."""
        groups: dict[Any, WeightDim] = {}
        for key in self._offered(region):
            self._known.pop(key, None)
            self.refused.pop(key, None)
            inside = _inside(region, key)
            graphs = [p.axis_facts for p in region.programs if _uses(p.captured, inside[0])]
            found = [self._consumers(axis_facts).get(inside) for axis_facts in graphs]
            if not any(found):
                continue  # it makes what others sum over
            reasons = [each for each in found if isinstance(each, str)]
            same = [each for each in found if isinstance(each, Consumer)]
            if reasons or len(same) < len(found) or len({each.window for each in same}) > 1:
                self.refused[key] = reasons[0] if reasons else "not every call of its region sums over it"
                continue
            bias = same[0].bias if len({each.bias for each in same}) == 1 else None
            meets = tuple(tuple((i.node, i.dim, i.window) for i in each.inputs) for each in same)
            self._known[key] = _Known(replace(same[0], bias=bias), groups.setdefault(meets, key))

    def absorbed(self, before: Plan, after: Plan, held: Sequence[Mapping[str, Tensor]]) -> dict[int, Tensor]:
        """What the weights that take over become, at their sizes before the shrink.

        Where the model runs in several processes, each of them must call it: what they saw is added up.

        Args:
            before: the plan now.
            after: the plan that the shrink leads to.
            held: tensors by name in the model: its own, those of copies, and averages of weights in optimizers. Each
                of these maps is linear in the weights, so that all of them take over alike.

        Returns:
            `id` of a tensor in `held` -> its new value, for those that change.
        """
        self._read_all()
        made: dict[int, Tensor] = {}
        solved: dict[tuple[WeightDim, bool], Absorption | None] = {}
        self.left = {}
        for (name, dim), known in sorted(self._known.items()):
            steps = kept_positions(name, before, after).get(dim) if (name, dim) in after.kept else None
            if steps is None:
                continue
            consumer, constant = known.consumer, known.consumer.bias is not None
            if (known.gram, constant) not in solved:
                solved[known.gram, constant] = self._solved(known, before.kept.get((name, dim)), steps)
            absorption = solved[known.gram, constant]
            if absorption is None or not _plain(held[0].get(name)):
                continue
            self.left[name, dim] = absorption.left
            bias = None if consumer.bias is None else name.removesuffix(consumer.parameter) + consumer.bias
            for tensors in held:
                weight = tensors.get(name)
                if weight is None or not _plain(weight):
                    continue
                matrix = consumer.columns(weight.detach())
                _set(made, tensors, weight, consumer.as_weight(absorption.columns(matrix), weight))
                if bias is not None and _plain(tensors.get(bias)):
                    _set(made, tensors, tensors[bias], absorption.bias(tensors[bias].detach(), matrix))
        self._tell(before, after)
        return made

    def _solved(self, known: _Known, positions: Tensor | None, steps: Tensor) -> Absorption | None:
        gram = self._grams.get(known.gram)
        if gram is None or not gram.follow(positions):
            return None
        return absorb(
            reduced(gram.moments), columns(steps, gram.window),
            constant=known.consumer.bias is not None, ridge=self.ridge,
        )  # fmt: skip

    def _tell(self, before: Plan, after: Plan) -> None:
        log = logger("shrink")
        for key, share in self.left.items():
            log.debug("%s[%d] takes over what goes, but %.1f%% of it", *key, 100 * share)
        for key in [*self.refused, *(key for key in self._known if key not in self.left)]:
            if key in after.kept and not torch.equal(after.kept[key], before.kept.get(key, after.kept[key][:0])):
                reason = self.refused.get(key, "nothing was gathered of what it meets, or no numbers, or it is sharded")
                log.info("nothing takes over in %s[%d]: %s", *key, reason)


def _inside(region: Region, key: WeightDim) -> WeightDim:
    return (key[0].removeprefix(f"{region.name}.") if region.name else key[0]), key[1]


def _uses(captured: RegionGraph, name: str) -> bool:
    """Whether a graph does anything with a parameter."""
    return any(
        captured.same_storage.get(held, held) == name
        for node in captured.graph.nodes
        if node.op == "placeholder" and node.users and (held := captured.tensors.get(node.name)) is not None
    )


def _plain(tensor: Tensor | None) -> bool:
    """Whether the values of a tensor are here, and all of them."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor is not None and tensor.device.type != "meta"


def _set(made: dict[int, Tensor], tensors: Mapping[str, Tensor], tensor: Tensor, value: Tensor) -> None:
    """A new value of a tensor, and of those that share its memory."""
    for each in tensors.values():
        if each is tensor or (storage_key(each) == storage_key(tensor) and each.shape == tensor.shape):
            made[id(each)] = value
