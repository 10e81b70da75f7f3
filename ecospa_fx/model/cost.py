"""CostModel: parameters, FLOPs or bytes of a model as an exact function of the widths of its couplings.

Every cost is a sum of terms, and every term a number times a product of axes: the entries of a weight, two FLOPs for
each product of a matrix multiplication. So the cost at other widths takes a few multiplications, and no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import sympy
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from ecospa_fx.passes.axes.algebra import Atom, Expr, Product, atoms_of
from ecospa_fx.passes.axes.selection import entries
from ecospa_fx.passes.graph.tensors import join, parameters_of
from ecospa_fx.passes.infer.sizes import size_in_call, symbols_of
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.relations import Pattern

from .compiled import CompiledModel
from .joint_offers import JointOffer, joint_offers

Cost = Literal["parameters", "flops", "bytes"]
Symbols = Mapping[sympy.Symbol, int]


@dataclass(frozen=True, eq=False)
class Term:
    """A product in the cost of one region: `factor`, times the entries along each of `exprs`."""

    region: str
    factor: float
    exprs: tuple[Expr, ...]


class CostModel:
    """The cost of a compiled model at any widths of its couplings.

    Args:
        model: the model.
        compiled: its state.
        cost: `"parameters"`, tied ones once; `"flops"` of a forward of the captured regions as they were called:
            products of matrices and convolutions; or `"bytes"` of training: weights, gradients and optimizer state.
        optimizers: for `"bytes"`; state that they have not made yet does not count.

    Attributes:
        sizes: coupling name -> entries now.
        original: the cost before any shrink.
        prunable: the sum of its terms that some coupling has a share in.
    """

    def __init__(
        self, model: nn.Module, compiled: CompiledModel, cost: Cost = "parameters", optimizers: Sequence[Optimizer] = ()
    ) -> None:
        # Equal blocks share a graph and so its atoms: an atom stands for one coupling in each region.
        self._atoms: dict[str, list[tuple[str, Atom]]] = {}
        self._now: dict[str, dict[Atom, int]] = {}
        self._symbols: dict[str, Symbols] = {}
        self._terms: list[Term] = []
        self._users: dict[tuple[str, Atom], list[int]] = {}
        weights = _weights(model, cost, optimizers)
        for region in compiled.regions.values():
            if not region.specializations:
                continue
            program = region.naming_graph.program
            self._now[region.name] = {atom: entries(choice) for atom, choice in region.kept(program).items()}
            self._symbols[region.name] = symbols_of(program.axis_facts, region.called) if cost == "flops" else {}
            for coupling in region.offers.offered():
                self._atoms[join(region.name, coupling.name)] = [(region.name, coupling.atom)]
            if cost == "flops":
                for factor, exprs in flop_terms(program.axis_facts):
                    self._add(Term(region.name, factor, exprs))
                continue
            for name, exprs in program.axis_facts.parameters.items():
                if join(region.name, name) in weights:
                    self._add(Term(region.name, weights.pop(join(region.name, name))[1], exprs))
        for offer in joint_offers(compiled.state, compiled.regions):
            if any(coupling.name == offer.joint.name for coupling in compiled.couplings()):
                self._add_joint(offer, model, weights)
        self._rest = sum(numel * each for numel, each in weights.values()) if cost != "flops" else 0
        self._values = [self._value(term, self._now[term.region]) for term in self._terms]
        self.sizes = {
            name: self._count(places[0][1], places[0][0], self._now[places[0][0]])
            for name, places in self._atoms.items()
        }
        originals = [self._value(term, {}) for term in self._terms]
        shared = {i for places in self._atoms.values() for key in places for i in self._users.get(key, ())}
        self.original = round(self._rest + sum(originals))
        self.prunable = round(sum(originals[i] for i in shared))

    def total(self, sizes: Mapping[str, int]) -> int:
        """Return the cost of the whole model with couplings at `sizes`; those not named stay as they are."""
        changed = {
            place: size for name, size in sizes.items() if size != self.sizes[name] for place in self._atoms[name]
        }
        counts = {region: dict(self._now[region]) for region, _ in changed}
        for (region, atom), size in changed.items():
            counts[region][atom] = size
        total = self._rest + sum(self._values)
        for i in {i for key in changed for i in self._users.get(key, ())}:
            total += self._value(self._terms[i], counts[self._terms[i].region]) - self._values[i]
        return round(total)

    def _add_joint(self, offer: JointOffer, model: nn.Module, weights: dict[str, tuple[int, float]]) -> None:
        """Add a coupling across regions, and the cost of its weights that lie in none."""
        name = offer.joint.name
        self._atoms[name] = [(region.name, atom) for region in offer.touched() for atom in offer.atoms(region)]
        for outside, along in offer.joint.outside:
            if outside in weights:
                shape = model.get_parameter(outside).shape
                exprs = tuple(Atom(dim, offer.joint.size if dim == along else n) for dim, n in enumerate(shape))
                self._now.setdefault(outside, {})[exprs[along]] = int(shape[along])
                self._symbols[outside] = {}
                self._atoms[name].append((outside, exprs[along]))
                self._add(Term(outside, weights.pop(outside)[1], exprs))

    def _add(self, term: Term) -> None:
        for atom in {atom for expr in term.exprs for atom in atoms_of(expr)}:
            self._users.setdefault((term.region, atom), []).append(len(self._terms))
        self._terms.append(term)

    def _value(self, term: Term, counts: Mapping[Atom, int]) -> float:
        return term.factor * prod(self._count(expr, term.region, counts) for expr in term.exprs)

    def _count(self, expr: Expr, region: str, counts: Mapping[Atom, int]) -> int:
        match expr:
            case Atom():
                size = counts.get(expr, expr.size)
                return size if type(size) is int else size_in_call(size, self._symbols[region])
            case Product():
                return prod(self._count(factor, region, counts) for factor in expr.factors)
            case _:
                return sum(self._count(part, region, counts) for part in expr.parts)


def flop_terms(axis_facts: AxisFacts) -> Iterator[tuple[float, tuple[Expr, ...]]]:
    """Yield (factor, axes) of the FLOPs of one forward of a graph: of matrix products, convolutions and attention."""
    for node, summed in _products(axis_facts).items():
        yield from _node_terms(axis_facts, node, summed)


def _products(axis_facts: AxisFacts) -> dict[fx.Node, tuple[Expr, ...]]:
    """Return the nodes that multiply, with the axes they sum over."""
    summed: dict[fx.Node, dict[Expr, None]] = {}
    for fact in axis_facts.facts:
        if fact.role == "contracted" and len(fact.operands) > 1:
            summed.setdefault(fact.node, {})[fact.expr] = None
    nodes = [n for n in axis_facts.operands if n in summed or _of_attention(axis_facts, n) or _convolves(axis_facts, n)]
    return {node: tuple(summed.get(node, ())) for node in nodes}


def _node_terms(
    axis_facts: AxisFacts, node: fx.Node, summed: tuple[Expr, ...]
) -> Iterator[tuple[float, tuple[Expr, ...]]]:
    out = axis_facts.values[node][0]
    if _of_attention(axis_facts, node):  # two products: scores, and scores with values
        q, k, v = (operand.exprs for operand in axis_facts.operands[node][:3])
        yield 2, (*q[:-1], k[-2], q[-1])
        yield 2, (*q[:-1], k[-2], v[-1])
    elif _convolves(axis_facts, node):
        yield 2, (*out, *axis_facts.operands[node][1].exprs[1:])
    else:
        yield 2, (*out, *summed)


def _of_attention(axis_facts: AxisFacts, node: fx.Node) -> bool:
    relation = axis_facts.relations.get(node)
    return isinstance(relation, Pattern) and relation.attention


def _convolves(axis_facts: AxisFacts, node: fx.Node) -> bool:
    relation = axis_facts.relations.get(node)
    return isinstance(relation, Pattern) and relation.window is not None


def _weights(model: nn.Module, cost: Cost, optimizers: Sequence[Optimizer]) -> dict[str, tuple[int, float]]:
    """Return (entries, cost of each entry) by parameter; a tied one counts once, under its first name."""
    weights = {}
    for name, parameter in parameters_of(model):
        each = 1.0
        if cost == "bytes":
            values = [value for o in optimizers for value in o.state.get(parameter, {}).values()]
            states = sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor) and v.numel() > 1)
            each = parameter.element_size() * (2 if parameter.requires_grad else 1)
            each += states / max(1, parameter.numel())
        weights[name] = (parameter.numel(), each)
    return weights
