"""Expected couplings of attention and feed-forward networks, derived from the graph alone.

Attention is a score (a product of two activations), a softmax, and a product with values; one expects its contracted
axis (Q/K), the axis that values carry through (V/O) and its heads. A feed-forward network is a nonlinearity between
weights; one expects the axis that it acts on. Each is *found* (a coupling), *refused* (pinned, for reasons
that are given), *missing* (pinned because an op has no rule), or *unmet* (the weights lie elsewhere: an input, say).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ecospa_fx.passes.axes.algebra import Atom, Expr, atoms_of
from ecospa_fx.passes.find.analyse import Analysis
from ecospa_fx.passes.graph.nodes import reason_text
from ecospa_fx.passes.ir.axis_facts import AxisFacts

aten = torch.ops.aten

PARTS = ("qk", "vo", "heads", "ffn")
SOFTMAX = (aten.softmax.int, aten._softmax.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
ACTIVATIONS = (
    "gelu", "silu", "relu", "relu6", "hardswish", "leaky_relu", "mish", "elu", "hardtanh", "softplus", "selu", "celu",
    "tanh", "sigmoid", "glu", "square",
)  # fmt: skip


@dataclass
class Tally:
    """Counts of expected axes of each part by result (found, refused, missing, unmet), and reasons of refusals."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: {part: Counter() for part in PARTS})
    reasons: dict[str, Counter[str]] = field(default_factory=lambda: {part: Counter() for part in PARTS})
    attentions: int = 0
    explained: int = 0

    def share_of_attentions(self) -> float | None:
        """Share of attention blocks in which every expected axis was found or refused with a reason."""
        return self.explained / self.attentions if self.attentions else None

    def share_of_ffns(self) -> float | None:
        """The same of feed-forward networks."""
        counts = self.counts["ffn"]
        judged = sum(counts[status] for status in ("found", "refused", "missing"))
        return 1 - counts["missing"] / judged if judged else None


def tally(analyses: Iterable[Analysis]) -> Tally:
    """Judge every attention and feed-forward network of the captured regions of a model."""
    result = Tally()
    for analysis in analyses:
        judge = _Judge(analysis)
        for score, values in attentions(analysis.axis_facts):
            axes = judge.axes_of(score, values)
            statuses = [judge.add(result, part, axes[part]) for part in ("qk", "vo", "heads")]
            if not set(statuses) <= {"unmet", "none"}:
                result.attentions += 1
                result.explained += "missing" not in statuses
        for node in analysis.axis_facts.operands:
            if getattr(node.target, "_opname", "").rstrip("_") in ACTIVATIONS:
                judge.add(result, "ffn", judge.axis_facts.values[node][0])
    return result


def attentions(axis_facts: AxisFacts) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The node that makes the score and the node that applies it to values; one and the same where they are fused."""
    for node in axis_facts.operands:
        if node.target is aten.scaled_dot_product_attention.default:
            yield node, node
        elif node.target in SOFTMAX:
            score = _nearest(node, lambda n: [a for a in n.all_input_nodes if a in axis_facts.values], axis_facts)
            values = _nearest(node, lambda n: [u for u in n.users if u in axis_facts.values], axis_facts)
            if score is not None and values is not None:
                yield score, values


def _nearest(node: fx.Node, step: Any, axis_facts: AxisFacts) -> fx.Node | None:
    """The nearest product of two activations, a dozen steps away at most."""
    frontier, seen = [node], {node}
    for _ in range(12):
        frontier = [n for f in frontier for n in step(f) if n not in seen and not seen.add(n)]  # type: ignore[func-returns-value]
        for n in frontier:
            operands = axis_facts.operands.get(n, ())
            if n.target in PRODUCTS and sum(o.weighted and not o.parameters for o in operands) > 1:
                return n
    return None


class _Judge:
    def __init__(self, analysis: Analysis) -> None:
        self.axis_facts, region = analysis.axis_facts, analysis.name
        self.found = {coupling.atom for coupling in analysis.discovery.couplings}
        self.pins: dict[Atom, list[str]] = defaultdict(list)
        for fact in self.axis_facts.facts:
            if fact.role == "pinned":
                for atom in set(atoms_of(fact.expr)):
                    self.pins[atom].append(reason_text(fact.reason, fact.node, region))

    def axes_of(self, score: fx.Node, values: fx.Node) -> dict[str, tuple[Expr, ...]]:
        facts = self.axis_facts.facts
        if score is values:
            q, _, v = self.axis_facts.operands[score][:3]
            return {"qk": q.exprs[-1:], "vo": v.exprs[-1:], "heads": q.exprs[1:-2]}
        made = self.axis_facts.values[score][0]
        operand = self.axis_facts.operands[values][-1]
        free = tuple(f.expr for f in facts if f.node is values and f.role == "free" and f.operands[-1:] == (operand,))
        return {
            "qk": tuple(f.expr for f in facts if f.node is score and f.role == "contracted"),
            "vo": free or operand.exprs[-1:],
            "heads": made[:-2],
        }

    def add(self, result: Tally, part: str, exprs: tuple[Expr, ...]) -> str:
        # Also atoms that lie on no weight, where an op that pins them stands between. Heads may be folded into the
        # batch, so what is dynamic is left out atom by atom.
        atoms = {a for expr in exprs for a in atoms_of(expr) if type(a.size) is int}
        if not atoms:
            return "none"  # one head, a gate of one entry, a sum over positions: there is nothing to select from
        reasons = [reason for atom in atoms for reason in self.pins[atom]]
        unknown = [reason for reason in reasons if "no axis rule" in reason]
        status = (
            "found" if atoms & self.found else "missing" if unknown else "refused" if reasons else "unmet"
        )  # fmt: skip
        result.counts[part][status] += 1
        if status in ("missing", "refused"):
            result.reasons[part].update({min(unknown or reasons, key=len)})
        return status
