"""ActivationScores: scores of the activations along couplings, gathered while the model runs.

    ActivationScores(model) -> an observer per region -> sums per coupling and entry -> entries(coupling)

Where a product is contracted along a coupling, each entry adds an outer product to the result. The norm of that outer
product is the product of the norms of its two sides: for a weight that is |w| times |x|, as in Wanda (Sun et al. 2023,
arXiv 2306.11695), summed over the weights of a row or column, and for the logits of an attention the norm of a query
dim times that of its key dim. A coupling without such a contraction has no scores; `entries` returns None for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.couple.coupling_index import CouplingIndex
from ecospa_fx.model.joint_offers import parts_across
from ecospa_fx.model.lookup import compiled_state, regions_of
from ecospa_fx.model.observers import check_observable, ignore, observe
from ecospa_fx.model.region import Region
from ecospa_fx.passes.axes.algebra import Atom, atoms_of
from ecospa_fx.passes.axes.selection import Selected, index_of, mask_of, touched
from ecospa_fx.passes.find.discover import RegionCoupling
from ecospa_fx.passes.graph.tensors import join, squared
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.relations import Pattern, SameDims
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.ranks.members import ranks_of, sharing_ranks
from ecospa_fx.ranks.shards import is_sharded, mean_squares_along

from .products import ProductSite, Side, parts, product_sites
from .reader import Averaged


@dataclass
class _Sum:
    """Sums of one coupling, `[contexts, size]`, over so many calls."""

    total: Tensor
    count: int = 0


class ActivationScores(Averaged[str]):
    """Scores each entry of each coupling in forwards in training mode with gradients on.

    Args:
        model: a compiled model that has been called.
        attention: score heads by their attention rather than entries by their activations: 1 minus the entropy of a
            head's attention, as a share of the largest possible, so that a head with uniform attention scores 0.
    """

    def __init__(self, model: nn.Module, *, attention: bool = False) -> None:
        self.model, self.attention = model, attention
        self.sums: dict[str, _Sum] = {}
        check_observable(model)
        self.regions = list(regions_of(model).values())
        for region in self.regions:
            observe(region, self)

    def detach(self) -> None:
        """Stop observing the regions."""
        for region in self.regions:
            ignore(region, self)

    def reset(self) -> None:
        """Forget the sums."""
        self.sums.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums of each coupling, and over how many calls they are; of a sharded model over all ranks."""
        tensors: dict[str, Tensor] = {}
        for name, each in self.sums.items():
            tensors |= {f"flow {name}": each.total, f"flow count {name}": torch.tensor(each.count)}
        return sharing_ranks(self.model).totals(tensors, "the state of activation scores")

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        counts = {
            name.removeprefix("flow count "): int(n) for name, n in state.items() if name.startswith("flow count ")
        }
        counts = counts if sharing_ranks(self.model).is_first else {}  # or they would count once per rank
        self.sums = {name: _Sum(state[f"flow {name}"], count) for name, count in counts.items()}

    def entries(self, coupling: Coupling, *, by_context: bool = False) -> Tensor | None:
        """Score each entry, float64 `[size]` or `[contexts, size]`; None if no contraction of the coupling was seen.

        Where ranks train the model together, each of them must call it: their scores are averaged.
        """
        mean = self.means_now().get(coupling.name)
        if mean is None or mean.shape[1] != coupling.size:
            return None
        if by_context:
            return mean if len(mean) == coupling.contexts else mean.expand(coupling.contexts, -1)
        return mean.sum(0)

    def means(self) -> dict[str, Tensor]:
        """Return by coupling name the mean score of each entry over the calls of all ranks, `[contexts, size]`."""
        named = {f"total {name}": each.total for name, each in self.sums.items()}
        named |= {f"count {n}": each.total.new_tensor([each.count]) for n, each in self.sums.items()}
        sums = ranks_of(self.model).totals(named, "the scores of activations")
        totals = {label.removeprefix("total "): each for label, each in sums.items() if label.startswith("total ")}
        return {name: total.cpu() / float(sums[f"count {name}"]) for name, total in totals.items()}

    def wants(self, module: nn.Module) -> bool:
        """Return whether the forward is one that trains."""
        return torch.is_grad_enabled() and module.training

    @torch.no_grad()
    def receive(self, known: list[ProductSite], values: Sequence[Tensor]) -> None:
        """Add the scores of one call."""
        given = iter(values)
        for site in known:
            self._add(site, [next(given) for _ in site.nodes])

    def _add(self, site: ProductSite, values: list[Tensor]) -> None:
        score = _focus(site, values) if self.attention else _outer_norms(site, values)
        total = score.new_zeros(site.contexts * site.size)
        owned = site.entry >= 0
        places = site.entry
        if site.context is not None:
            places = site.context * site.size + site.entry
        # [contexts beside, positions] -> [contexts, entries]
        places = places[owned].to(score.device)
        if len(score) > 1:
            total = total.view(site.contexts, -1).index_add_(1, places, score[:, owned.to(score.device)])
        else:
            total = total.index_add_(0, places, score[0, owned.to(score.device)]).view(site.contexts, -1)
        if self.attention:  # several positions of an entry are several heads: their mean
            total /= max(1, int(owned.sum()) * site.parts // (site.contexts * site.size))
        total *= site.parts  # the mean over ranks counts each entry once per rank
        before = self.sums.get(site.coupling)
        if before is None or before.total.shape != total.shape:
            self.sums[site.coupling] = _Sum(total, 1)
        else:
            before.total += total
            before.count += 1

    def nodes_of(self, region: Region, program: Program, module: nn.Module) -> tuple[list[fx.Node], list[ProductSite]]:
        """Return the nodes of all sites of a program, one after another, and the sites."""
        kept = region.kept(program), region.kept_here(program, module)
        names = {found.key: found.name for found in region.naming_graph.discovery.couplings}
        offered = {coupling.name: coupling for coupling in compiled_state(self.model).couplings()}
        sites: list[ProductSite] = []
        here = [(join(region.name, names.get(f.key, "")), f) for f in region.discovery_of(program).couplings]
        for name, found in (*here, *parts_across(region.state, program.axis_facts)):
            if name in offered:
                sites_of = _attention_sites if self.attention else product_sites
                sites += sites_of(program.axis_facts, found, offered[name], *kept)
        return [node for site in sites for node in site.nodes], sites


def _outer_norms(site: ProductSite, values: list[Tensor]) -> Tensor:
    """Compute the norm of each position's outer product in a contraction, `[contexts beside or 1, positions]`."""
    result: Tensor | None = None
    for side, value in zip(site.sides, values, strict=True):
        if is_sharded(value):  # a weight
            rows = mean_squares_along(value, side.dim)[None]
            result = rows if result is None else result * rows
            continue
        squares = squared(value)
        rows = squares.movedim(side.dim, -1)
        if side.beside is None or side.along is None:
            rows = rows.reshape(1, -1, rows.shape[-1]).mean(1)
        else:
            along = side.along - (side.along > side.dim)
            rows = rows.movedim(along, 0).flatten(1, -2).mean(1)
            beside = side.beside.to(rows.device)
            rows = rows.new_zeros(site.contexts, rows.shape[1]).index_add_(0, beside, rows)
        result = rows if result is None else result * rows
    assert result is not None
    return result.sqrt().double()


def _attention_sites(
    axis_facts: AxisFacts,
    found: RegionCoupling,
    coupling: Coupling,
    kept: dict[Atom, Selected],
    here: dict[Atom, Selected],
) -> Iterator[ProductSite]:
    """Find the attention of the heads of `found`: attention as one op, or softmax on its own."""
    if found.kind not in ("heads", "groups"):
        return
    context = found.context if coupling.context is not None else None
    numbers = CouplingIndex(found.atom, context, kept)
    for node, operands in axis_facts.operands.items():
        relation = axis_facts.relations.get(node)
        fused = isinstance(relation, Pattern) and relation.attention
        if not fused and not (isinstance(relation, SameDims) and relation.shares):
            continue
        exprs = operands[0].exprs if fused else axis_facts.values[node][0]
        dims = [dim for dim, expr in enumerate(exprs[:-2]) if found.atom in atoms_of(expr)]
        if len(dims) != 1 or (not fused and node.args[1] not in (-1, len(exprs) - 1)):
            continue
        (dim,) = dims
        remaining = mask_of(exprs[dim], here)
        entry, on = numbers.read(exprs[dim], index_of(exprs[dim], found.atom), remaining)
        if context is not None and context not in atoms_of(exprs[dim]):
            continue
        common: dict[str, Any] = {"entry": entry, "size": coupling.size, "contexts": coupling.contexts, "context": on}
        common["parts"] = parts(mask_of(exprs[dim], kept), remaining)
        if not fused:
            yield ProductSite(coupling.name, node, (Side(node, dim),), **common)
            continue
        sides = tuple(Side(operand.node, dim) for operand in operands[:2])
        given: dict[str, Any] = dict(zip(("mask", "dropout", "causal"), node.args[3:6], strict=False)) | node.kwargs
        mask = given.get("attn_mask", given.get("mask"))
        rows = tuple(mask_of(expr, here).nonzero().flatten() if touched(expr, here) else None for expr in exprs[:-2])
        yield ProductSite(
            coupling.name, node, sides, **common, mask=mask if isinstance(mask, fx.Node) else None, mask_rows=rows,
            scale=given.get("scale"), causal=bool(given.get("is_causal", given.get("causal", False))),
        )  # fmt: skip


def _focus(site: ProductSite, values: list[Tensor]) -> Tensor:
    """Compute 1 minus the entropy of each head's attention as a share of the largest possible, `[1, positions]`."""
    attention = values[0] if len(site.sides) == 1 else _attention(site, values)
    attention = attention.double()
    keys = (attention > 0).sum(-1)
    entropy = -torch.xlogy(attention, attention).sum(-1)
    focus = 1.0 - entropy / keys.clamp(min=2).double().log()
    counts = (keys > 1).double()  # a query that sees one key only has no choice
    rows = (focus * counts).movedim(site.sides[0].dim, 0).flatten(1)
    weights = counts.movedim(site.sides[0].dim, 0).flatten(1).sum(1).clamp(min=1)
    return (rows.sum(1) / weights)[None]


def _attention(site: ProductSite, values: list[Tensor]) -> Tensor:
    """Compute the attention weights that a fused op does not return."""
    q, k = values[0].float(), values[1].float()
    if k.ndim > 2 and k.shape[-3] != q.shape[-3]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)  # grouped queries
    logits = q @ k.mT * (site.scale if site.scale is not None else 1 / math.sqrt(q.shape[-1]))
    if site.causal:
        ahead = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(ahead, -math.inf)
    if len(values) > 2:
        mask = values[2]
        for dim, rows in enumerate(reversed(site.mask_rows), start=3):
            if rows is not None and mask.ndim >= dim and mask.shape[-dim] not in (1, logits.shape[-dim]):
                mask = mask.index_select(mask.ndim - dim, rows.to(mask.device))
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1).nan_to_num(0.0)
