"""Rotate: another basis for an axis between two linear maps, in which its entries come in order of what they carry.

    y = B A x,  B [out, d], A [d, in]          nothing but views and heads between the two
      = (B inv(T)) (T A) x                     for any invertible T, so the model computes what it did

    sides(inference, found)   which positions of which parameters are A's, which are B's; or why no basis is free
    balanced(a, b)            the T under which both Gram matrices are one diagonal: the SVD of B A
    turned(tensor, part, T)   the tensor in the new basis

What is called A is the *near* side, whose values are carried on; B is the *far* side, that sums over them. Of queries
and keys, which sum over each other, one is near and the other far. Only what is read off the graph as linear in the
axis turns: a norm, a rotary table or an activation on the way is a reason not to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ecospa_fx.passes.axes.algebra import Atom, atoms_of
from ecospa_fx.passes.axes.selection import index_of
from ecospa_fx.passes.find.discover import RegionCoupling
from ecospa_fx.passes.graph.nodes import op_name, place
from ecospa_fx.passes.infer.infer import infer_axes
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.relations import is_linear

from .cholesky import factor
from .consumers import Consumer, WeightDim, consumers

aten = torch.ops.aten

NEAR, FAR = 0, 1


@dataclass(frozen=True, eq=False)
class Part:
    """Rows or columns of a parameter that lie on one side of a coupling.

    Attributes:
        parameter: name in the model.
        dim: which of its dims.
        side: `NEAR` or `FAR`.
        order: LongTensor `[entries, blocks]`, the position of each entry in each block (a head of a projection, say).
        context: LongTensor `[blocks]`, the context of each block; zeros where they share one basis.
    """

    parameter: str
    dim: int
    side: int
    order: Tensor
    context: Tensor


@dataclass(frozen=True, eq=False)
class BasisChange:
    """A change of basis, per context.

    Attributes:
        near: `[contexts, d, d]`, float64: what a vector of the near side is multiplied by.
        far: `[contexts, d, d]`: that of the far side, the inverse of the transpose.
        energy: `[contexts, d]`, what each new entry carries, in descending order: singular values of the product.
    """

    near: Tensor
    far: Tensor
    energy: Tensor

    def of(self, side: int) -> Tensor:
        """What weights along a side are multiplied by; gradients along the other side are too."""
        return self.near if side == NEAR else self.far


def sides(axis_facts: AxisFacts, found: RegionCoupling) -> dict[WeightDim, Tensor] | str:
    """Which side each position of a parameter lies on, or why a coupling's basis is not free.

    Returns:
        (parameter in the region, dim) -> LongTensor `[size]`: `NEAR`, `FAR` or -1, at original sizes.
    """
    reason = _bent(axis_facts, found.atom)
    if reason is not None:
        return reason
    if not found.linear:
        return "its entries go through products one by one"
    sums = [f for f in axis_facts.facts if f.role == "contracted" and found.atom in atoms_of(f.expr)]
    if not sums:
        return "nothing sums over it"
    met = [all(o.parameter is None for o in fact.operands) and len(fact.operands) == 2 for fact in sums]
    known = {(n, d) for n, d in found.axes}
    if all(met):
        made = _of_two_activations(axis_facts, [fact.node for fact in sums], known, found.atom)
    elif not any(met):
        made = _of_weights(axis_facts, known, found.atom)
    else:
        return "it is summed over by weights and by activations both"
    if isinstance(made, str):
        return made
    for name, dim in known:
        owned = index_of(axis_facts.parameters[name][dim], found.atom) >= 0
        if not torch.equal(owned, made[name, dim] >= 0):
            return f"`{name}` has entries of it on neither side"
    return made if {NEAR, FAR} <= {int(s) for side in made.values() for s in side.unique()} else "it has one side only"


def _bent(axis_facts: AxisFacts, atom: Atom) -> str | None:
    """Whatever on the way is not linear in the entries of an atom, or not the same in each."""
    region = axis_facts.captured.region
    for source in axis_facts.sources:
        if any(atom in atoms_of(expr) for expr in source.exprs):
            return f"{op_name(source.user)} ({place(source.user, region)}) brings in values that cannot turn with it"
    for node, operands in axis_facts.operands.items():
        carrying = [o for o in operands if any(atom in atoms_of(expr) for expr in o.exprs)]
        if not carrying and not any(atom in atoms_of(e) for exprs in axis_facts.values[node] for e in exprs):
            continue
        relation = axis_facts.relations.get(node)
        if relation is None or not is_linear(relation, [o.node for o in carrying]):
            return f"{op_name(node)} ({place(node, region)}) stands between the weights"
    return None


def _of_weights(axis_facts: AxisFacts, axes: set[WeightDim], atom: Atom) -> dict[WeightDim, Tensor] | str:
    """Weights that sum over the axis are its far side, all others make it."""
    summing = consumers(axis_facts)
    made: dict[WeightDim, Tensor] = {}
    for name, dim in axes:
        consumer = summing.get((name, dim))
        if isinstance(consumer, str):
            return f"`{name}`: {consumer}"
        if isinstance(consumer, Consumer) and consumer.window > 1:
            return f"`{name}` sums over it with a kernel"
        made[name, dim] = _where(axis_facts, name, dim, atom, NEAR if consumer is None else FAR)
    return made


def _of_two_activations(
    axis_facts: AxisFacts, nodes: list[fx.Node], axes: set[WeightDim], atom: Atom
) -> dict[WeightDim, Tensor] | str:
    """Infer once more, without the fact that the two sides meet in these products: they are two atoms then."""
    refuted = axis_facts.missing.keys() - axis_facts.experiments.keys()
    alone = infer_axes(axis_facts.captured, bool(axis_facts.experiments), refuted, apart=frozenset(nodes))
    near: set[Atom] = set()
    far: set[Atom] = set()
    for node in nodes:
        then, now = alone.operands[node], axis_facts.operands[node]
        both = [
            {a for expr, one in zip(o.exprs, was.exprs, strict=True) if atom in atoms_of(one) for a in atoms_of(expr)}
            for o, was in zip(then, now, strict=True)
            if any(atom in atoms_of(one) for one in was.exprs)
        ]
        if len(both) != 2:
            return "more than two values meet along it in one product"
        near |= both[0] - both[1]
        far |= both[1] - both[0]
    made: dict[WeightDim, Tensor] = {}
    for name, dim in axes:
        expr, place_of = alone.parameters[name][dim], torch.full((len(_index(axis_facts, name, dim, atom)),), -1)
        for side, atoms in ((NEAR, near), (FAR, far)):
            for each in atoms & set(atoms_of(expr)):
                place_of[index_of(expr, each) >= 0] = side
        made[name, dim] = torch.where(_index(axis_facts, name, dim, atom) >= 0, place_of, -1)
    return "its two sides are one and the same" if near & far else made


def _index(axis_facts: AxisFacts, name: str, dim: int, atom: Atom) -> Tensor:
    return index_of(axis_facts.parameters[name][dim], atom)


def _where(axis_facts: AxisFacts, name: str, dim: int, atom: Atom, side: int) -> Tensor:
    return torch.where(_index(axis_facts, name, dim, atom) >= 0, side, -1)


def balanced(near: Tensor, far: Tensor) -> BasisChange:
    """The basis in which the Gram matrices of both sides are the same diagonal, largest entries first.

    With `near = A A.T` and `far = B.T B` these are the singular values of `B A`, so what is cut off the end is what the
    product loses least by (Eckart and Young). With those of activations it is their product that loses least.

    Args:
        near: `[contexts, d, d]`, sums of squares along the near side.
        far: `[contexts, d, d]`, likewise.
    """
    near, far = near.double(), far.double()
    scales = [g.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-300) for g in (near, far)]
    # Directions that carry nothing have no basis of their own: they are told apart only beyond rounding.
    root = factor(near / scales[0], 1e-10)
    values, vectors = torch.linalg.eigh(root.mT @ (far / scales[1]) @ root)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    energy = values.sqrt()
    width = energy.clamp(min=1e-5 * energy.amax(-1, keepdim=True).clamp(min=1e-300)).sqrt()
    # The two sides share the scale of the product alike.
    ratio = (scales[1] / scales[0]).clamp(1e-12, 1e12) ** 0.25
    turn = ratio * (width[:, :, None] * torch.linalg.solve_triangular(root.mT, vectors, upper=True).mT)
    back = (vectors.mT @ root.mT) / width[:, :, None] / ratio
    return BasisChange(turn, back, energy * (scales[0] * scales[1])[:, :, 0].sqrt())


def near_old_basis(turn: BasisChange, keep: int, scale: Tensor) -> BasisChange:
    """The same first `keep` entries' span, in coordinates near to those there were.

    Of the old entries some span nearly the same. Each new entry is one of these, plus what it takes over of those that
    will go; then what an optimizer knows of an entry goes on to be about that entry. These ones are found one by one,
    as in a QR decomposition with column pivoting.

    Args:
        turn: from `balanced`.
        keep: entries that will stay.
        scale: `[contexts, d]`, how large the old entries are.
    """
    near, far = turn.near.clone(), turn.far.clone()
    for context in range(len(near)):
        span = near[context, :keep]
        rest = span * scale[context].to(span)
        chosen: list[int] = []
        for _ in range(keep):
            column = int(rest.norm(dim=0).argmax())
            chosen.append(column)
            direction = rest[:, column] / rest[:, column].norm().clamp(min=1e-300)
            rest = rest - torch.outer(direction, direction @ rest)
            rest[:, chosen] = 0
        picked = span[:, sorted(chosen)]
        near[context, :keep] = torch.linalg.solve(picked, span)
        far[context, :keep] = picked.T @ far[context, :keep]
    return BasisChange(near, far, turn.energy)


def change_basis(tensor: Tensor, part: Part, by: Tensor) -> Tensor:
    """A tensor of a parameter's shape, each block along `part` multiplied by the matrix of its context.

    Args:
        tensor: the parameter, its gradient, or what an optimizer holds for it.
        part: where its blocks lie.
        by: `[contexts, d, d]`.
    """
    rows = tensor.detach().movedim(part.dim, 0)
    order = part.order.to(rows.device)
    blocks = rows[order].reshape(*order.shape, -1).double()  # [d, blocks, rest]
    found = torch.einsum("bij,jbr->ibr", by.to(rows.device)[part.context.to(rows.device)], blocks)
    made = rows.clone()
    made[order] = found.reshape(*order.shape, *rows.shape[1:]).to(made.dtype)
    return made.movedim(0, part.dim).contiguous() if tensor.is_contiguous() else made.movedim(0, part.dim)


def gram_of(tensors: Mapping[str, Tensor], parts: list[Part], contexts: int) -> Tensor:
    """Sum over the blocks of some parts of `rows @ rows.T`, per context, float64 `[contexts, d, d]`; biases count."""
    size = len(parts[0].order)
    device: Any = tensors[parts[0].parameter].device
    total = torch.zeros(contexts, size, size, dtype=torch.float64, device=device)
    for part in parts:
        rows = tensors[part.parameter].detach().movedim(part.dim, 0)
        blocks = rows[part.order.to(rows.device)].reshape(*part.order.shape, -1).double()
        total.index_add_(0, part.context.to(device), torch.einsum("ibr,jbr->bij", blocks, blocks).to(device))
    return total
