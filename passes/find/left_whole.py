"""Axes left whole: refusals, where weights meet, and axes along which no two of them do; with the reasons.

uncoupled(axis_facts, axes, ...)   an axis along which no two weights meet, with what is in the way
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import eq

from ecospa_fx.passes.axes.algebra import Atom, atoms_of, size_of
from ecospa_fx.passes.graph.nodes import reason_text
from ecospa_fx.passes.graph.tensors import join
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Fact, Role

from .apart import EntriesApart


@dataclass(frozen=True)
class Refusal:
    """Weights that meet along an axis that cannot shrink, with the reasons.

    Attributes:
        members: `parameter[dim]` of each weight that has the axis.
        size: number of its entries.
        reasons: why and where all entries are needed; one sentence each.
        region: name of the region it was found in.
    """

    members: tuple[str, ...]
    size: int
    reasons: tuple[str, ...]
    region: str

    def __str__(self) -> str:
        return f"{', '.join(self.members)} ({self.size}): {'; '.join(self.reasons)}"


@dataclass(frozen=True)
class UncoupledAxis(Refusal):
    """An axis of matrices along which no two weights meet: nothing would shrink with it, or it may not shrink.

    Its members, size, reasons and region are as in a refusal.
    """


def pinned_by(facts: Sequence[Fact], region: str) -> tuple[str, ...]:
    """Return the reasons of the facts that pin an axis, each once."""
    return tuple(dict.fromkeys(reason_text(fact.reason, fact.node, region) for fact in facts))


def uncoupled(
    axis_facts: AxisFacts,
    axes: Sequence[tuple[str, int]],
    atom: Atom,
    roles: Mapping[Role, Sequence[Fact]],
    producers: Sequence[str],
    apart: EntriesApart,
) -> UncoupledAxis:
    """Describe an axis that is neither a coupling nor a refusal, with the reasons."""
    region = axis_facts.captured.region
    reasons = pinned_by(roles["pinned"], region)
    if reasons:
        reasons = (*lone_modules(apart.weights(lambda expr: atom in atoms_of(expr)), region), *reasons)
    else:
        facts = [*roles["contracted"], *roles["free"]]
        if producers:
            why = "no weight of the region sums over the entries that it produces"
        elif facts:
            why = "no weight of the region produces the entries that it sums over"
        elif {name for name, _ in axes} <= _unused(axis_facts):
            why = "the captured call does not use it"
        else:
            why = "no op multiplies it with another weight along it"
        reasons = (reason_text(why, facts[0].node, region) if facts else why,)
    return UncoupledAxis(tuple(f"{join(region, name)}[{dim}]" for name, dim in axes), atom.size, reasons, region)


def lone_modules(weights: Sequence[str], region: str) -> tuple[str, ...]:
    """Return the reason where each entry of an axis is the gate of weights of its own, and the way out."""
    if not weights:
        return ()
    return (
        f"each entry goes to weights of its own, such as `{join(region, weights[0])}`, which are no entries of one "
        "tensor; experts can go where the weights of all are in one, `[experts, ...]`, that their gates meet or places "
        "pick from",
    )


def one_by_one(axis_facts: AxisFacts, apart: EntriesApart) -> Iterator[UncoupledAxis]:
    """Yield the dims of matrices of which each entry is cut out for itself, so that there is no axis to select from."""
    captured = axis_facts.captured
    for name, exprs in axis_facts.parameters.items():
        for dim, expr in enumerate(exprs if len(exprs) > 1 and name not in captured.same_storage else ()):
            size = size_of(expr)
            if type(size) is int and size > 1 and not atoms_of(expr):
                axis = f"{join(captured.region, name)}[{dim}]"
                reasons = ("each of its entries is cut out for itself",)
                alone = apart.weights(partial(eq, expr))
                yield UncoupledAxis((axis,), size, (*lone_modules(alone, captured.region), *reasons), captured.region)


def _unused(axis_facts: AxisFacts) -> set[str]:
    captured = axis_facts.captured
    nodes = (node for node in axis_facts.values if node.op == "placeholder" and not node.users)
    return {captured.tensors[node.name] for node in nodes if node.name in captured.tensors}
