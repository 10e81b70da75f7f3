"""Constants: the results of a captured graph that no input decides where couplings have lost all of their entries.

    find_constants(axis_facts, kept)
      -> Empty        a result without entries
      -> Constant     a sum over no entries is zero, or its bias; so is what follows from zeros and weights alone

A zero times an activation is none of these: if that overflows, the product is not zero.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from ecospa_fx.passes.axes.algebra import as_size
from ecospa_fx.passes.axes.selection import Selection, count, entries, in_first_contexts
from ecospa_fx.passes.graph.boundary_op import edge
from ecospa_fx.passes.graph.nodes import by_name, is_tensor, may_draw, tensor_meta, written_arguments
from ecospa_fx.passes.ir import relations as r
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.patterns import bind

aten = torch.ops.aten
_ZERO_OF_ZEROS = {aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default}


@dataclass(frozen=True, eq=False)
class Empty:
    """A result without any entry."""


@dataclass(frozen=True, eq=False)
class Constant:
    """A result that is the same in each call.

    Attributes:
        value: the number that each entry is, if there is no bias.
        bias: the node that it repeats.
        dims: for each dim of the bias, the dim of the result that it runs along, counted from the right.
    """

    value: float = 0.0
    bias: fx.Node | None = None
    dims: tuple[int, ...] = ()

    @property
    def zero(self) -> bool:
        """True if all entries are zero."""
        return self.bias is None and self.value == 0


Known: TypeAlias = "Empty | Constant"


def find_constants(axis_facts: AxisFacts, kept: Selection) -> dict[fx.Node, Known]:
    """Return the nodes of a captured graph whose results have no entry under a selection, or are constants then."""
    if all(entries(choice) for choice in kept.values()):
        return {}
    uniform = in_first_contexts(kept)
    sums = {fact.node for fact in axis_facts.facts if fact.role == "contracted" and count(fact.expr, uniform) == 0}
    known: dict[fx.Node, Known] = {}
    for node in axis_facts.captured.graph.nodes:
        if node.op != "call_function" or node not in axis_facts.values:
            continue
        outputs = axis_facts.values[node]
        if all(any(count(expr, uniform) == 0 for expr in exprs) for exprs in outputs):
            known[node] = Empty()
            continue
        found = _constant(node, axis_facts, known, summed=node in sums)
        if found is not None:
            known[node] = found
    return known


def _constant(node: fx.Node, axis_facts: AxisFacts, known: Mapping[fx.Node, Known], *, summed: bool) -> Constant | None:
    """Return the constant that an op makes, where it does, of constants and weights."""
    if node.target is operator.getitem:
        whole = known.get(node.args[0])  # type: ignore[arg-type]
        return whole if isinstance(whole, Constant) else None
    relation, operands = axis_facts.relations.get(node), axis_facts.operands.get(node, ())
    given = {x.node: c for x in operands if isinstance(c := known.get(x.node), Constant)}
    if relation is None or node.target is edge or not (summed or given) or next(written_arguments(node), None):
        return None
    copied = r.copied_operand(relation)
    if may_draw(node.target) and copied is None:
        return None
    match relation:
        case r.Pattern(apart=apart, attention=False) if not apart or (summed and relation.window is not None):
            factors = _factors(relation)
            zero = any(x.node in given and given[x.node].zero for x in factors) and _finite_but(factors, given)
            return _bias_of(node, relation) if summed or zero else None
        case r.Pattern() if _normalises(node) and given.keys() == {relation.operands[0].node}:
            return _bias_of(node, relation) if given[relation.operands[0].node].zero else None
        case r.SameDims(x, dropped=dropped) if dropped and node.target in _ZERO_OF_ZEROS:
            return Constant() if summed or (x.node in given and given[x.node].zero) else None
        case r.Pointwise(xs, "product") if any(x.node in given and given[x.node].zero for x in xs):
            return Constant() if _finite_but(xs, given) and len(tensor_meta(node)) == 1 else None
        case r.Pointwise(xs) if all(x.node in given and given[x.node].bias is None for x in xs):
            return _computed(node, given)
        case r.Regrouped(x) | r.Permuted(x) | r.Sliced(x) | r.Parted(x) | r.Picked(x) | r.Expanded(x) | r.Repeated(x):
            constant = given.get(x.node)
            if constant is None or constant.bias is None:
                return constant
            return constant if isinstance(relation, r.Regrouped) and _ends_alike(x, node, constant) else None
    if copied is not None and copied.node in given and node.meta["val"].dtype == copied.node.meta["val"].dtype:
        return given[copied.node]
    return None


def _factors(relation: r.Pattern) -> tuple[r.Operand, ...]:
    pattern = bind(relation.spec, len(relation.operands), tuple(relation.sizes))
    return tuple(o for t, o in zip(pattern.operands, relation.operands, strict=True) if not t.added)


def _finite_but(operands: Sequence[r.Operand], given: Mapping[fx.Node, Constant]) -> bool:
    """Return whether all operands are constants or weights: a zero times an activation that overflowed is not zero."""
    return all(x.node in given or x.parameters for x in operands)


def _normalises(node: fx.Node) -> bool:
    """Return whether an op divides by a root that `eps` keeps from zero, and adds a bias at most."""
    if node.target not in (aten.layer_norm.default, aten.rms_norm.default):
        return False
    eps = by_name(node.target, node.args, node.kwargs, defaults=True).get("eps")
    return eps is None or (isinstance(eps, float) and eps > 0)


def _bias_of(node: fx.Node, relation: r.Pattern) -> Constant | None:
    """Return the result of an op whose product is zero: what it adds; None where that is not plainly repeated."""
    pattern = bind(relation.spec, len(relation.operands), tuple(relation.sizes))
    added = [(t, o) for t, o in zip(pattern.operands, relation.operands, strict=True) if t.added]
    if _normalises(node):  # its weight stands there as well
        arguments = by_name(node.target, node.args, node.kwargs)
        added = [(t, o) for t, o in added if o.node is arguments.get("bias")]
    if not added or len(tensor_meta(node)) != 1 or len(pattern.outputs) != 1:
        return Constant() if not added and len(tensor_meta(node)) == 1 else None
    (term, operand), *others = added
    arguments = by_name(node.target, node.args, node.kwargs, defaults=True)
    name = next((name for name, value in arguments.items() if value is operand.node), None)
    plain = name == "bias" or (name == "self" and arguments.get("beta", None) == 1)
    val = node.meta["val"]
    if others or not plain or operand.node.meta["val"].dtype != val.dtype:
        return None
    keys = list(pattern.outputs[0].keys_of(val.shape))
    own = list(term.keys_of(operand.shape))
    if not all(keys.count(key) == 1 for key in own):
        return None
    dims = tuple(keys.index(key) - len(keys) for key in own)
    return Constant(bias=operand.node, dims=dims) if list(dims) == sorted(dims) else None


def _computed(node: fx.Node, given: Mapping[fx.Node, Constant]) -> Constant | None:
    """Run a pointwise op on one entry of each of its operands."""
    if any(not is_tensor(arg) for arg in node.all_input_nodes) or len(tensor_meta(node)) != 1:
        return None
    if not isinstance(node.meta.get("val"), Tensor):
        return None

    def entry(arg: fx.Node) -> Tensor:
        val = arg.meta["val"]
        return torch.full((1,) * val.ndim, given[arg].value, dtype=val.dtype, device="cpu")

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), entry)
    target: Any = node.target
    if any(isinstance(value, torch.device) for value in (*args, *kwargs.values())):
        return None
    with torch.no_grad():
        result = target(*args, **kwargs)
    value = result.flatten()
    return Constant(value.item()) if len(value) == 1 and result.dtype == node.meta["val"].dtype else None


def _ends_alike(x: r.Operand, node: fx.Node, constant: Constant) -> bool:
    """Return whether the dims of a bias run along the same dims, from the right, before and after a view."""
    reach = -min(constant.dims, default=0)
    before, after = x.shape, tuple(map(as_size, node.meta["val"].shape))
    return len(after) >= reach and (reach == 0 or tuple(before[-reach:]) == after[-reach:])
