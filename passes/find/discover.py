"""Discovery: the axes of a region that can shrink, with their kinds, and the reasons why others cannot.

    discover(axis_facts) -> couplings, refusals

An atom along which weights meet at least twice and that is *produced* by one of them (free in its contraction, so that
weights really meet) is a coupling, unless something pins it; then it is a refusal with the reasons. Kinds follow from
the facts about the atom, never from names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import takewhile
from math import prod
from typing import Literal

from torch import fx

from ecospa_fx.passes.axes.algebra import Atom, Product, atoms_of, size_of
from ecospa_fx.passes.axes.selection import placed
from ecospa_fx.passes.graph.nodes import op_name, reason_text
from ecospa_fx.passes.graph.tensors import join
from ecospa_fx.passes.ir import relations as r
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Fact, Role

from .apart import EntriesApart
from .left_whole import Refusal, UncoupledAxis, one_by_one, pinned_by, uncoupled

Kind = Literal["qk", "vo", "ffn", "glu", "heads", "groups", "experts", "conv", "recurrent", "residual"]

_INSIDE: tuple[Kind, ...] = ("experts", "qk", "groups", "heads", "vo")  # what is found in one region, in this order

ParameterDim = tuple[str, int]  # (parameter name in the region, dim)


@dataclass(frozen=True, eq=False)
class RegionCoupling:
    """A coupling of one captured graph, at original sizes.

    Attributes:
        key: its size and its positions on parameter axes, the same in every graph of the region.
        axes: the parameter axes that it lies on, of a tied parameter under its first name only.
        name: unique in the region.
        atom: the axis whose entries are selected.
        kind: see `ecospa_fx.Coupling`.
        linear: nothing between the weights is nonlinear or scales entries apart.
        producers: parameters in whose contraction the atom is free.
        context: an atom in each of whose entries other entries may be kept, if there is one.
        context_key: positions of the context on the same parameter axes.
        attention: name of the op that makes the scores of the attention that a `qk` or `vo` coupling is part of.
        least: number of entries that its ops need at least, as a top-k does.
        last_stays: the reason why one entry must stay; None where all may go, so that what sums over them is zero.
    """

    key: tuple[object, ...]
    axes: tuple[ParameterDim, ...]
    name: str
    atom: Atom
    kind: Kind
    linear: bool
    producers: tuple[str, ...]
    context: Atom | None = None
    context_key: tuple[object, ...] = ()
    attention: str | None = None
    least: int = 1
    last_stays: str | None = None


@dataclass(frozen=True, eq=False)
class Discovery:
    """The couplings and the refusals of one captured graph, and the axes of matrices that are neither."""

    couplings: tuple[RegionCoupling, ...]
    refusals: tuple[Refusal, ...]
    uncoupled: tuple[UncoupledAxis, ...] = ()

    def same(self, coupling: RegionCoupling) -> RegionCoupling | None:
        """Return what this graph has of a coupling of another one of the region; more weights may lie on it here."""
        size, *places = coupling.key
        for exact in (True, False):
            for mine in self.couplings:
                if mine.key == coupling.key if exact else mine.key[0] == size and {*places} < {*mine.key[1:]}:
                    return mine
        return None

    def __deepcopy__(self, memo: dict[int, object]) -> Discovery:
        return self  # its atoms are compared by identity


@dataclass(frozen=True, eq=False)
class Weighed:
    """All that decides whether an atom of one graph is a coupling.

    Attributes:
        axes: the parameter axes that it lies on.
        roles: the facts about it.
        matrices: names of the matrices among its axes.
        producers: those in whose contraction it is free.
        occurrences: how often it lies on matrices.
        contractions: how many contractions a matrix brings it into.
    """

    axis_facts: AxisFacts
    atom: Atom
    axes: tuple[ParameterDim, ...]
    roles: dict[Role, list[Fact]]
    matrices: frozenset[str]
    producers: tuple[str, ...]
    occurrences: int
    contractions: int


def weighed(axis_facts: AxisFacts, also: Iterable[Atom] = ()) -> Iterator[Weighed]:
    """Yield what decides about each atom on a parameter, and about those in `also`."""
    axes: dict[Atom, list[ParameterDim]] = defaultdict(list)
    for name, exprs in axis_facts.parameters.items():
        if name in axis_facts.captured.same_storage:
            continue
        for dim, expr in enumerate(exprs):
            for atom in dict.fromkeys(atoms_of(expr)):
                axes[atom].append((name, dim))
    for atom in also:
        axes.setdefault(atom, [])
    facts: dict[Atom, list[Fact]] = defaultdict(list)
    for fact in axis_facts.facts:
        for atom in dict.fromkeys(atoms_of(fact.expr)):
            facts[atom].append(fact)
    for atom, key in axes.items():
        roles = _by_role(facts[atom], axis_facts.derivations)
        matrices = {name for name, _ in key if len(axis_facts.parameters[name]) > 1}
        occurrences = _occurrences(atom, matrices, roles, axis_facts)
        contractions = _contractions(roles, matrices, axis_facts)
        yield Weighed(axis_facts, atom, tuple(key), roles, frozenset(matrices), _producers(roles, matrices),
                      occurrences, contractions)  # fmt: skip


def meet(parts: Sequence[Weighed]) -> bool:
    """Decide whether weights meet along an axis, which is an atom in each of several graphs.

    A fused projection has several matrices in one parameter, end to end; a tied parameter is several matrices.
    """
    meetings = max(sum(part.occurrences for part in parts), sum(part.contractions for part in parts))
    static = all(type(size_of(part.atom)) is int for part in parts)
    return static and meetings >= 2 and any(part.producers for part in parts)


def kind_of(parts: Sequence[Weighed]) -> Kind:
    """Return the kind of a coupling that is an atom in each of several graphs."""
    products = {node for part in parts for node in _products(part.roles, part.matrices)}
    convolutions = {node for node in products if op_name(node).startswith("aten.conv")}
    occurrences = (_occurrences(p.atom, set(p.producers), p.roles, p.axis_facts) for p in parts)
    several = sum(occurrences) > 1
    if several and convolutions != products and any(_comes_back(part.roles, part.matrices) for part in parts):
        return "residual"
    if any(_steps(part.roles, part.matrices) - part.axis_facts.derivations for part in parts):
        return "recurrent"
    found = {_kind_inside(part) for part in parts}
    for kind in _INSIDE:
        if kind in found:
            return kind
    if convolutions:
        return "conv"
    if several and any(part.roles["gate"] for part in parts):
        return "glu"
    if several and any(part.roles["merge"] for part in parts):
        return "residual"
    return "ffn"


def is_linear(parts: Sequence[Weighed], kind: Kind) -> bool:
    """Return whether nothing along a coupling is nonlinear or scales entries apart."""
    return not any(p.roles["nonlinear"] or p.roles["gate"] for p in parts) and kind not in (
        "heads",
        "groups",
        "experts",
    )


def discover(axis_facts: AxisFacts) -> Discovery:
    """Find the couplings of a captured graph, and the axes that would be couplings if nothing pinned them.

    An axis that crosses the edge of its region is none of these: `passes.find.joints` decides about it.
    """
    region = axis_facts.captured.region
    crossing = {atom for expr in axis_facts.crossing.values() for atom in atoms_of(expr)}
    scores = {fact.node for fact in axis_facts.facts if fact.role == "contracted" and _meets_another(fact)}
    couplings, refusals, others = [], [], []
    taken: set[str] = set()
    least = least_entries(axis_facts)
    apart = EntriesApart(axis_facts)
    for each in weighed(axis_facts):
        atom, key, roles, producers = each.atom, each.axes, each.roles, each.producers
        if atom in crossing:
            continue
        if not meet([each]):
            if each.matrices:
                others.append(uncoupled(axis_facts, key, atom, roles, producers, apart))
            continue
        needed, by = least.get(atom, (1, None))
        reasons = pinned_by(roles["pinned"], region)
        if by is not None and needed >= atom.size:
            reasons += (
                reason_text(f"{op_name(by)} takes so many entries that none of {atom.size} can go", by, region),
            )
        if reasons:
            members = tuple(f"{join(region, name)}[{dim}]" for name, dim in key)
            refusals.append(Refusal(members, atom.size, reasons, region))
            continue
        kind = kind_of([each])
        name = named(kind, sorted(each.matrices), taken)
        linear = is_linear([each], kind)
        context = axis_facts.contexts.get(atom)
        couplings.append(
            RegionCoupling(
                (atom.size, *_where(atom, key, axis_facts)), key, name, atom, kind, linear, producers, context,
                _where(context, key, axis_facts) if context is not None else (),
                _attention(roles, axis_facts, scores) if kind in ("qk", "vo") else None, needed,
                _last_stays(roles, kind, by, region),
            )
        )  # fmt: skip
    return Discovery(tuple(couplings), tuple(refusals), (*others, *one_by_one(axis_facts, apart)))


def least_entries(axis_facts: AxisFacts) -> dict[Atom, tuple[int, fx.Node]]:
    """Return the number of entries that each atom keeps so that ops have enough, whatever others keep, and one such op.

    Where an op takes entries of a product (of experts in groups), outer factors keep more of theirs, so that inner ones
    are free to lose some.
    """
    least: dict[Atom, tuple[int, fx.Node]] = {}

    def needs(atom: Atom) -> int:
        return least[atom][0] if atom in least else 1

    for expr, number, node in sorted(axis_facts.least, key=lambda each: len(atoms_of(each[0]))):
        atoms = atoms_of(expr)
        if not all(type(atom.size) is int for atom in atoms):
            continue  # of tokens, say
        even = isinstance(expr, Atom) or (isinstance(expr, Product) and atoms == expr.factors)
        for atom in atoms:
            others = prod(needs(other) for other in atoms if other is not atom)
            wanted = min(atom.size, -(-number // others)) if even else atom.size
            if wanted > needs(atom):
                least[atom] = wanted, node
    return least


_NEVER_EMPTY: dict[Kind, str] = {
    "qk": "without any of it all scores are equal, so that its sublayer is no constant",
    "residual": "it is what layers add to, not what one of them holds",
    "recurrent": "it is the state of a cell, which needs one",
}


def _last_stays(roles: dict[Role, list[Fact]], kind: Kind, top_k: fx.Node | None, region: str) -> str | None:
    """Return the reason why a coupling keeps an entry, None where every op along it but sums is entry by entry."""
    if kind in _NEVER_EMPTY:
        return _NEVER_EMPTY[kind]
    for role, what in (("reduced", "takes what is left of it, and needs one entry"),
                       ("chosen", "picks among its entries")):  # fmt: skip
        for fact in roles[role]:  # type: ignore[index]
            return reason_text(f"{op_name(fact.node)} {what}", fact.node, region)
    if top_k is not None:
        return reason_text(f"{op_name(top_k)} takes some of its entries", top_k, region)
    return None if roles["contracted"] else "nothing sums over it"


def _by_role(facts: list[Fact], derivations: Collection[fx.Node]) -> dict[Role, list[Fact]]:
    """Sort facts by role. A product inside a weight brings nothing into another one, unless nothing else does."""
    roles: dict[Role, list[Fact]] = defaultdict(list)
    for fact in facts:
        roles[fact.role].append(fact)
    roles["contracted"] = [fact for fact in roles["contracted"] if fact.node not in derivations]
    roles["free"] = [fact for fact in roles["free"] if fact.node not in derivations] or roles["free"]
    return roles


def _producers(roles: dict[Role, list[Fact]], matrices: set[str]) -> tuple[str, ...]:
    """Return the matrices that have the atom as a free axis of a contraction."""
    names = (name for fact in roles["free"] for operand in fact.operands for name in operand.parameters)
    return tuple(dict.fromkeys(name for name in names if name in matrices))


def _occurrences(atom: Atom, names: set[str], roles: dict[Role, list[Fact]], axis_facts: AxisFacts) -> int:
    """Count the occurrences of an atom on the named parameters; those that one weight is made of count once."""
    weights = [{name} for name in names]
    for operand in (operand for role in ("free", "contracted") for fact in roles[role] for operand in fact.operands):
        together = set(operand.parameters) & set(names)
        if len(together) > 1:
            meeting = [weight for weight in weights if weight & together]
            weights = [weight for weight in weights if not weight & together] + [set().union(*meeting)]
    counts = {name: sum(atoms_of(e).count(atom) for e in axis_facts.parameters[name]) for name in names}
    apart = sum(max(counts[name] for name in weight) for weight in weights)
    # Weights end to end are several, also where all of them are made of one more parameter.
    facts = (*roles["free"], *roles["contracted"])
    joined = (f for f in facts if any(names & set(o.parameters) for o in f.operands))
    return max(apart, *(atoms_of(fact.expr).count(atom) for fact in joined), 0)


def _products(roles: dict[Role, list[Fact]], matrices: Set[str], *among: Role) -> set[fx.Node]:
    """Return the ops that matrices bring the atom into."""
    facts = (fact for role in among or ("free", "contracted", "batch") for fact in roles[role])
    return {fact.node for fact in facts if any(matrices & set(o.parameters) for o in fact.operands)}


def _contractions(roles: dict[Role, list[Fact]], matrices: set[str], axis_facts: AxisFacts) -> int:
    """Count the contractions that a matrix brings the atom into."""
    return len(_products(roles, matrices, "free", "contracted") - axis_facts.derivations)


def _kind_inside(part: Weighed) -> Kind | None:
    """Return the kind of a coupling that is a part of an attention; None for another."""
    roles, axis_facts = part.roles, part.axis_facts
    activations = {role: [fact for fact in roles[role] if _of_activations(fact)] for role in ("batch", "free")}
    shared = any(len(fact.operands) > 1 for fact in activations["batch"])
    if _is_stack(part) and (roles["chosen"] or (not shared and _is_routed(part))):
        return "experts"
    if any(_meets_another(fact) for fact in roles["contracted"]):
        return "qk"
    if shared:
        return "groups" if roles["expanded"] else "heads"
    # Free in a product of two activations: attention weights times values, or query heads over one key head.
    if any(len(axis_facts.operands.get(fact.node, ())) > 1 and _between_activations(fact, axis_facts)
           for fact in activations["free"]):  # fmt: skip
        return "groups" if _grouped(activations["free"], axis_facts) else "vo"
    return None


def _is_stack(part: Weighed) -> bool:
    """Return whether entries are matrices of a stack, which give vectors; not kernels, which give numbers."""
    axis_facts = part.axis_facts
    convolved = any(op_name(node).startswith("aten.conv") for node in _products(part.roles, part.matrices))
    stacks = {name for name, _ in part.axes if len(axis_facts.parameters[name]) > 2}
    # A value that is summed over entries and over another dim of the weight at once holds numbers of each, no gate.
    summed = {
        name for fact in part.roles["contracted"] for o in fact.operands for name in o.parameters
        if any(_summed_together(fact, other) for other in axis_facts.facts)
    }  # fmt: skip
    # Where an entry gives a number, all other dims of the weight are summed over.
    several = {
        (fact.node, name)
        for fact in axis_facts.facts
        if fact.role == "free" and part.atom not in atoms_of(fact.expr)
        for operand in fact.operands
        for name in operand.parameters
    }
    kernels = {
        name for fact in part.roles["free"] for o in fact.operands for name in o.parameters
        if (fact.node, name) not in several
    }  # fmt: skip
    return not convolved and bool(stacks - summed - kernels)


def _summed_together(fact: Fact, other: Fact) -> bool:
    """Return whether an op sums one value over two axes."""
    if other is fact or other.role != "contracted" or other.node is not fact.node:
        return False
    return bool({o.node for o in fact.operands if not o.parameters} & {o.node for o in other.operands})


def _is_routed(part: Weighed) -> bool:
    """Return whether each entry is one row of a matrix, a router, and one matrix of a stack: an expert."""
    parameters = part.axis_facts.parameters
    alone = [name for name, dim in part.axes if parameters[name][dim] is part.atom]
    stacked = any(len(parameters[name]) > 2 for name in alone)
    return stacked and any(len(parameters[name]) == 2 for name in part.producers if name in alone)


def _steps(roles: dict[Role, list[Fact]], matrices: Set[str]) -> set[fx.Node]:
    """Return the ops inside of which matrices both produce the axis and take all that is left of it."""
    return _products(roles, matrices, "free") & _products(roles, matrices, "reduced")


def _comes_back(roles: dict[Role, list[Fact]], matrices: Set[str]) -> bool:
    """Return whether what a matrix makes of the axis is added to it again: layers read and write it."""
    waiting, merges = _products(roles, matrices, "contracted"), {fact.node for fact in roles["merge"]}
    seen: set[fx.Node] = set()
    last = max(merges, default=None)
    while waiting and last is not None:
        node = waiting.pop()
        if node in merges:
            return True
        if node not in seen and node < last:
            seen.add(node)
            waiting.update(node.users)
    return False


def _of_activations(fact: Fact) -> bool:
    return all(o.weighted and not o.parameters for o in fact.operands)


def _meets_another(fact: Fact) -> bool:
    """Return whether the axis belongs to two activations, as in a score."""
    return len(fact.operands) > 1 and _of_activations(fact)


def _attention(roles: dict[Role, list[Fact]], axis_facts: AxisFacts, scores: set[fx.Node]) -> str | None:
    """Name the op that makes the scores: it contracts `qk`, and its result leads to the op that carries `vo`."""
    queue = [fact.node for fact in roles["contracted"] if _meets_another(fact)]
    for fact in roles["free"]:
        if _of_activations(fact) and _between_activations(fact, axis_facts):
            # Back from the attention weights, not from the values.
            weights = [o.node for o in axis_facts.operands[fact.node] if o.weighted and fact.expr not in o.exprs]
            queue += [fact.node] if fact.node in scores and len(axis_facts.operands[fact.node]) > 2 else weights
    seen: set[fx.Node] = set()
    while queue:
        node = queue.pop(0)
        if node in scores:
            return node.name
        seen.add(node)
        queue += [arg for arg in node.all_input_nodes if arg in axis_facts.values and arg not in seen]
    return None


def _where(atom: Atom, axes: Iterable[ParameterDim], axis_facts: AxisFacts) -> tuple[tuple[object, ...], ...]:
    return tuple((name, dim, placed(axis_facts.parameters[name][dim], atom)) for name, dim in axes)


def _between_activations(fact: Fact, axis_facts: AxisFacts) -> bool:
    """Return whether the axis is free in a product that sums over an axis of two activations."""

    def activations(operands: Iterable[r.Operand]) -> int:
        return sum(o.weighted and not o.parameters for o in operands)

    return activations(axis_facts.operands[fact.node]) > 1 and any(
        other.node is fact.node and other.role == "contracted" and activations(other.operands) > 1
        for other in axis_facts.facts
    )


def _grouped(facts: list[Fact], axis_facts: AxisFacts) -> bool:
    """Return whether the axis is free in the scores already, which values do not enter: an axis of queries only."""
    for fact in facts:
        operands = axis_facts.operands[fact.node]
        if len(operands) > 2 and operands[0].node in [operand.node for operand in fact.operands]:
            return True
    return False


def named(kind: Kind, matrices: list[str], taken: set[str]) -> str:
    """Name a coupling by the module that all its matrices share, its kind, and a number where that is not unique."""
    modules = [name.split(".")[:-1] for name in matrices]
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*modules, strict=False))]
    if len(matrices) == 1 and matrices[0].endswith(".weight"):
        shared = shared[:-1]  # of a fused projection, name the module around the layer
    name = base = ".".join([*shared, kind])
    number = 2
    while name in taken:
        name, number = f"{base}{number}", number + 1
    taken.add(name)
    return name
