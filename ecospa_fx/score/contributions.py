"""ContributionReader: what each expert adds to the output of its mixture, token by token, gathered while it runs.

    contributions, owner of each row -> norm of each, added up by expert, with the number of tokens that it was sent
    "reap"        the mean over the tokens that an expert is sent of gate times norm of its output (Lasby et al. 2025,
                  arXiv 2510.13999): the norm of what it adds
    "frequency"   the share of all choices that fall on it

Where every expert sees every token, those count that it adds something to.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.model.lookup import compiled_state
from ecospa_fx.model.observers import check_observable
from ecospa_fx.model.region import Region
from ecospa_fx.passes.axes.algebra import atoms_of
from ecospa_fx.passes.graph.tensors import squared
from ecospa_fx.passes.ir.patterns import DimKey
from ecospa_fx.passes.ir.relations import Pattern
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.rewrite.rewrite import Tap
from ecospa_fx.passes.transform.owned import keys_of
from ecospa_fx.ranks.members import ranks_of, sharing_ranks

from .owners import SumSite, sums_of
from .reader import Averaged, GradientStep, ReaderOptions
from .slices import SliceKey
from .tapping import Tapping

NO_CONTRIBUTION = (
    "no expert has been seen to add anything: the scores of experts are read in calls with gradients on, outside of "
    "torch.compile; call the model so before a decision is due"
)


class ContributionReader(Tapping, Averaged[str]):
    """Norms and counts of what experts add to the output of their mixture.

    Args:
        options: of all readers.

    Attributes:
        sums: (coupling name and number of the sum, 0) -> `[2, contexts * size]`, norms and counts.
    """

    learns = False
    unjudged = 1.0
    kinds: tuple[str, ...] | None = ("experts",)

    def __init__(self, options: ReaderOptions) -> None:
        check_observable(options.model)
        self.model, self.counts = options.model, options.score.name == "frequency"
        self.sums: dict[SliceKey, Tensor] = {}

    @property
    def empty(self) -> bool:
        """True if nothing has been seen since the last reset."""
        return not self.sums

    def lacking(self) -> str | None:
        """Return the message where nothing has been seen."""
        return NO_CONTRIBUTION if self.empty else None

    def add(self, step: GradientStep) -> None:
        """Watch the regions, if they were not known before; gradients are not read."""
        self.observe()

    def taps_of(self, region: Region, program: Program, module: nn.Module) -> list[Tap]:
        """Return the taps at each place of the program's graph where experts are added up."""
        sites = sums_of(compiled_state(self.model), region, program, module)
        return [tap for site in sites for tap in self._taps(site)]

    def _taps(self, site: SumSite) -> Iterator[Tap]:
        def take(value: Tensor, owner: Tensor) -> Tensor:
            with torch.no_grad():
                self._add(site, value.detach(), owner)
            return value

        return site.owners.taps(take)

    def _add(self, site: SumSite, value: Tensor, owner: Tensor) -> None:
        """Add the norms of what one call adds up."""
        key = f"{site.coupling.name} {site.number}", 0
        total = self.sums.get(key)
        if total is None or total.shape[1] != site.units:
            total = self.sums[key] = torch.zeros(2, site.units, dtype=torch.float64, device=value.device)
        for norms, owners in _norms(site, value, owner):
            given = owners >= 0 if site.owners.picked else (owners >= 0) & (norms > 0)
            rows, place = norms[given].to(total), owners[given].to(total.device)
            total[0].index_add_(0, place, rows)
            total[1].index_add_(0, place, torch.ones_like(rows))

    def importance(self, coupling: Coupling) -> float | None:
        """Return the mean over the coupling's entries; None where none was seen."""
        entries = self.entries(coupling, by_context=False)
        return None if entries is None else float(entries.mean())

    def entries(self, coupling: Coupling, *, by_context: bool) -> Tensor | None:
        """Score each expert; None if no sum of the coupling was seen.

        Where ranks train the model together, each of them must call it: they add up what they saw.
        """
        seen = [each for name, each in self.means_now().items() if name.rpartition(" ")[0] == coupling.name]
        seen = [each for each in seen if each.shape[1] == coupling.contexts * coupling.size]
        if not seen:
            return None
        scores = [(each[1] / each[1].sum() if self.counts else each[0] / each[1]).nan_to_num(0.0) for each in seen]
        total = torch.stack(scores).mean(0) if self.counts else torch.stack(scores).sum(0)
        total = total.view(coupling.contexts, -1)
        return total if by_context else total.sum(0)

    def means(self) -> dict[str, Tensor]:
        """Return the sums of all ranks, by coupling name and number of the sum."""
        named = {name: total for (name, _), total in self.sums.items()}
        return {name: each.cpu() for name, each in ranks_of(self.model).totals(named, "the scores of experts").items()}

    def reset(self) -> None:
        """Drop the sums."""
        self.sums.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name; of a sharded model over all ranks."""
        named = {name: total for (name, _), total in self.sums.items()}
        return sharing_ranks(self.model).totals(named, "the state of the scores of experts")

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Go on with what `tensors` returned."""
        self.observe()
        mine = named if sharing_ranks(self.model).is_first else {}  # or they would count once per rank
        self.sums = {(name, 0): total.clone() for name, total in mine.items()}


def _norms(site: SumSite, value: Tensor, owner: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield norms of contributions over their features, and whose each is, both flat."""
    if not site.sum.factors:
        squares = squared(value)
        norms = squares.sum(site.features, keepdim=True).sqrt() if site.features else squares.sqrt()
        yield norms.flatten(), owner.expand(norms.shape).flatten()
        return
    factors = site.owners.factors()
    if factors is not None:
        yield from _norms_of_product(site, value, factors, owner)


def _norms_of_product(
    site: SumSite, value: Tensor, factors: Sequence[Tensor], owner: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield those of the products that an op sums up: of one entry after another, or of one row of each token."""
    added, facts = site.sum, site.owners.facts
    relation = facts.relations[added.users[0]]
    assert isinstance(relation, Pattern)
    keys, result = keys_of(relation)
    by_node = {o.node: own for o, own in zip(relation.operands, keys, strict=True)}
    own, others = by_node[added.owned.node], [by_node[factor.node] for factor in added.factors]
    summed = [d for d in sorted(added.owned.dims) if own[d] not in result]
    exprs = facts.values[added.users[0]][0]
    features = [d for d, expr in enumerate(exprs) if added.features & set(atoms_of(expr)) and result[d] not in
                {own[each] for each in added.owned.dims}]  # fmt: skip
    letters = _letters([own, *others, result])
    equation = f"{','.join(letters(each) for each in (own, *others))}->{letters(result)}"
    tensors = [(_precise(value), own), *((_precise(each), names) for each, names in zip(factors, others, strict=True))]
    alone = summed == sorted(added.owned.dims) and len(summed) == 1
    places = owner.flatten() if alone else torch.arange(_count(value, summed), device=value.device)
    for place in places.unique().tolist():
        if place < 0:
            continue
        if alone:
            chosen, whose = {own[summed[0]]: (places == place).nonzero().flatten()}, None
        else:
            index = torch.unravel_index(torch.tensor(place), [value.shape[d] for d in summed])
            chosen = {own[d]: at[None].to(value.device) for d, at in zip(summed, index, strict=True)}
            whose = owner
            for d, at in zip(summed, index, strict=True):
                whose = whose.narrow(d, int(at), 1)
        parts = [_narrowed(tensor, names, chosen) for tensor, names in tensors]
        out = squared(torch.einsum(equation, *parts))
        norms = out.sum(features, keepdim=True).sqrt() if features else out.sqrt()
        if whose is None:
            yield norms.flatten(), torch.full_like(norms, place, dtype=torch.long).flatten()
            continue
        left = [d for d in sorted(added.owned.dims) if d not in summed]
        sizes = {result.index(own[d]): whose.shape[d] for d in left}
        order = sorted(left, key=lambda d: result.index(own[d]))
        flat = whose.permute(*order, *(d for d in range(whose.ndim) if d not in order))
        shaped = flat.reshape([sizes.get(d, 1) for d in range(len(result))])
        yield norms.flatten(), shaped.expand(norms.shape).flatten()


def _count(value: Tensor, dims: Sequence[int]) -> int:
    count = 1
    for d in dims:
        count *= value.shape[d]
    return count


def _narrowed(tensor: Tensor, names: Sequence[DimKey], chosen: Mapping[DimKey, Tensor]) -> Tensor:
    for dim, name in enumerate(names):
        if name in chosen and tensor.shape[dim] > 1:
            tensor = tensor.index_select(dim, chosen[name])
    return tensor


class _letters:
    """A letter for each key of some dims."""

    def __init__(self, terms: Sequence[Sequence[DimKey]]) -> None:
        self._of = dict(zip(dict.fromkeys(key for term in terms for key in term), string.ascii_letters, strict=False))

    def __call__(self, term: Sequence[DimKey]) -> str:
        return "".join(self._of[key] for key in term)


def _precise(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 or value.is_complex() else value.float()
