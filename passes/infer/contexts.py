"""Contexts: atoms that may keep different entries in each entry of another atom (different dims in each head).

    contexts(axis_facts) -> {atom: context}

Head `h` may keep other dims than head `g` if no op brings a dim of `h` together with the same dim of `g`:

- every parameter axis that carries the dims carries the heads too, row by row, `(h d)`;
- so does every tensor on the way, in one of its dims, for all of its entries;
- no op that sees the dims mixes heads (a softmax over heads, a roll along them), other than in a reduction over heads
  and dims together, or brings every head together with every other, so that its result has heads along two dims;
- a source without heads (rotary tables) meets the dims in a pointwise op only, where it can be gathered per head.

Of several possible contexts the one with the most entries is taken, because it leaves the most freedom; but none that
differs by a context itself (the two of a pair that a rotation turns, in each pair, in each head).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import fx

from ecospa_fx.passes.axes.algebra import UNIT, Atom, Expr, Product, Segments, atoms_of, size_of
from ecospa_fx.passes.axes.selection import on_diagonal
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Exprs, Source


def contexts(axis_facts: AxisFacts) -> dict[Atom, Atom]:
    """Return the context of every atom that may differ by one."""
    carried: dict[Atom, dict[tuple[int, ...], Exprs]] = defaultdict(dict)
    nodes: dict[Atom, set[fx.Node]] = defaultdict(set)
    for node, exprs in _tensors(axis_facts):
        same = tuple(map(id, exprs))  # many tensors have the same axes; one of them is enough
        for atom in {atom for expr in exprs for atom in atoms_of(expr)}:
            carried[atom][same] = exprs
            nodes[atom].add(node)
    sources: dict[Atom, list[Source]] = defaultdict(list)
    for source in axis_facts.sources:
        for atom in {atom for expr in source.exprs for atom in atoms_of(expr)}:
            sources[atom].append(source)
            nodes[atom].add(source.user)
    mixed: dict[fx.Node, set[Atom]] = defaultdict(set)
    reduced: dict[fx.Node, set[Atom]] = defaultdict(set)
    for fact in axis_facts.facts:
        if fact.role in ("pinned", "reduced"):
            (mixed if fact.role == "pinned" else reduced)[fact.node].update(atoms_of(fact.expr))
    crossed: dict[tuple[int, ...], set[Atom]] = {}
    for node, outputs in axis_facts.values.items():
        for exprs in outputs:
            same = tuple(map(id, exprs))
            if same not in crossed:
                crossed[same] = _along_two(exprs)
            if crossed[same]:
                mixed[node] |= crossed[same]
    possible = {
        atom: [
            context
            for context in sorted(beside, key=lambda other: (-other.size, other.serial))
            if all(_varies(exprs, atom, context) for exprs in carried[atom].values())
            and all(_selectable(source, atom, context, axis_facts) for source in sources[atom])
            and not any(context in mixed[node] for node in nodes[atom])
            and not any(context in reduced[node] and atom not in reduced[node] for node in nodes[atom])
        ]
        for atom, beside in _beside(axis_facts).items()
    }
    unvaried = {atom: [c for c in found if not possible.get(c)] for atom, found in possible.items()}
    return {atom: found[0] for atom, found in unvaried.items() if found}


def _selectable(source: Source, atom: Atom, context: Atom, axis_facts: AxisFacts) -> bool:
    """Return whether a use of a source can be selected per entry of `context`, repeated along it if it lacks that dim.

    Index tensors are made at rewriting, so the dim of the contexts must have a known size. Where the source lacks it,
    only a pointwise op says where it would be.
    """
    if source.places is not None and atom in atoms_of(source.places):
        return False
    along = [expr for expr in source.exprs if context in atoms_of(expr)]
    if along:
        return _varies(source.exprs, atom, context) and type(size_of(along[0])) is int
    if not source.aligned:
        return False
    (result, *_) = axis_facts.values[source.user]
    places = [dim - len(result) for dim, expr in enumerate(result) if covers(expr, context)]
    if len(places) != 1 or type(size_of(result[places[0]])) is not int:
        return False
    return -places[0] > len(source.exprs) or source.exprs[places[0]] == UNIT


def _along_two(exprs: Exprs) -> set[Atom]:
    """Return the atoms that run along two dims of a tensor, or twice along one."""
    seen: set[Atom] = set()
    twice: set[Atom] = set()
    for expr in exprs:
        here = set(atoms_of(expr))
        twice |= (seen & here) | on_diagonal(expr)
        seen |= here
    return twice


def covers(expr: Expr, context: Atom) -> bool:
    """Return whether every entry of `expr` belongs to an entry of `context`."""
    match expr:
        case Atom():
            return expr is context
        case Product():
            return any(covers(factor, context) for factor in expr.factors)
        case Segments():
            return bool(expr.parts) and all(covers(part, context) for part in expr.parts)


def _tensors(axis_facts: AxisFacts) -> Iterable[tuple[fx.Node, Exprs]]:
    """Yield the axes of every tensor that depends on a parameter, at the op that makes it and at those that use it."""
    for node, outputs in axis_facts.values.items():
        for exprs in outputs:
            yield node, exprs
    for node, operands in axis_facts.operands.items():
        for operand in operands:
            if operand.weighted:
                yield node, operand.exprs


def _beside(axis_facts: AxisFacts) -> dict[Atom, set[Atom]]:
    """Map each atom on parameter axes to the atoms that are factors of one product with it on all of these axes."""
    beside: dict[Atom, set[Atom]] = {}
    for exprs in axis_facts.parameters.values():
        for expr in exprs:
            for atom in set(atoms_of(expr)):
                here = {other for other in atoms_of(expr) if type(other.size) is int and _paired(expr, atom, other)}
                beside[atom] = beside[atom] & here if atom in beside else here
    return {atom: others for atom, others in beside.items() if type(atom.size) is int and others}


def _paired(expr: Expr, atom: Atom, context: Atom) -> bool:
    """Return whether every entry of `expr` that belongs to `atom` belongs to `context`, too, context by context.

    The context must run slower: the remaining entries of `(h d)` lie head by head, as in the tensors inside. Those of
    `(d h)` would lie in the order of the dims, which differ by head.
    """
    if atom is context:
        return False
    match expr:
        case Atom():
            return expr is not atom
        case Segments():
            return all(_paired(part, atom, context) for part in expr.parts)
        case Product():
            carrying = [factor for factor in expr.factors if atom in atoms_of(factor)]
            if not carrying:
                return True
            slower = expr.factors[: expr.factors.index(carrying[0])]
            return len(carrying) == 1 and (
                any(covers(factor, context) for factor in slower) or _paired(carrying[0], atom, context)
            )


def _varies(exprs: Exprs, atom: Atom, context: Atom) -> bool:
    """Return whether every entry of `atom` in a tensor has an entry of `context` beside it, in exactly one dim."""
    with_context = [dim for dim, expr in enumerate(exprs) if context in atoms_of(expr)]
    if len(with_context) != 1:
        return False
    (at,) = with_context
    for dim, expr in enumerate(exprs):
        if atom in atoms_of(expr) and not (_paired(expr, atom, context) if dim == at else covers(exprs[at], context)):
            return False
    return True
