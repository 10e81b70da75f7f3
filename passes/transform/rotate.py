"""Rotation: another basis for an axis between two linear maps, in which its entries come in order of energy.

    y = B A x,  B [out, d], A [d, in]          nothing but views and heads between the two
      = (B inv(T)) (T A) x                     for any invertible T, so the model computes what it did

    sides(axis_facts, coupling)      the positions of parameters that are A's and B's; or why the basis is not free
    balanced(near, far)              the T under which both Gram matrices are one diagonal: the SVD of B A
    change_basis(tensor, part, T)    the tensor in the new basis

A is the *near* side, whose values are carried on; B is the *far* side, which sums over them. Of queries and keys, which
sum over each other, one is near and the other far. An axis turns only if everything on the way is linear in it, as read
off the graph: a norm, a rotary table or an activation on the way is a reason not to.
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
from ecospa_fx.passes.graph.nodes import is_complex, op_name, place
from ecospa_fx.passes.infer.infer import inferred_again
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
        dim: the dim along which they lie.
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
        near: `[contexts, d, d]`, float64: the matrix that vectors of the near side are multiplied by.
        far: `[contexts, d, d]`: the matrix of the far side, the inverse of the transpose.
        energy: `[contexts, d]`, the share of each new entry in the product: its singular values, in descending order.
    """

    near: Tensor
    far: Tensor
    energy: Tensor

    def of(self, side: int) -> Tensor:
        """Return the matrix for weights along a side; gradients along the other side take it too."""
        return self.near if side == NEAR else self.far


def sides(axis_facts: AxisFacts, coupling: RegionCoupling) -> dict[WeightDim, Tensor] | str:
    """Find the side that each position of a parameter lies on, or the reason why a coupling's basis is not free.

    Returns:
        (parameter in the region, dim) -> LongTensor `[size]`: `NEAR`, `FAR` or -1, at original sizes.
    """
    reason = _obstacle(axis_facts, coupling.atom)
    if reason is not None:
        return reason
    if not coupling.linear:
        return "its entries go through nonlinear ops or products of their own, one by one"
    sums = [f for f in axis_facts.facts if f.role == "contracted" and coupling.atom in atoms_of(f.expr)]
    if not sums:
        return "no op sums over it"
    of_activations = [not any(o.parameters for o in fact.operands) and len(fact.operands) == 2 for fact in sums]
    dims = {(n, d) for n, d in coupling.axes}
    if all(of_activations):
        result = _sides_of_activations(axis_facts, [fact.node for fact in sums], dims, coupling.atom)
    elif not any(of_activations):
        result = _sides_of_weights(axis_facts, dims, coupling.atom)
    else:
        return "both weights and activations sum over it"
    if isinstance(result, str):
        return result
    for name, dim in dims:
        along = index_of(axis_facts.parameters[name][dim], coupling.atom) >= 0
        if not torch.equal(along, result[name, dim] >= 0):
            return f"`{name}` has entries along it that lie on neither side"
    both = {NEAR, FAR} <= {int(s) for side in result.values() for s in side.unique()}
    return result if both else "all of its weights lie on one side"


def _obstacle(axis_facts: AxisFacts, atom: Atom) -> str | None:
    """Return a reason why the ops on the way are not linear in the entries of an atom, alike for each, or None."""
    region = axis_facts.captured.region
    for source in axis_facts.sources:
        if any(atom in atoms_of(expr) for expr in source.exprs):
            return f"{op_name(source.user)} ({place(source.user, region)}) brings in values that keep the old basis"
    for node, operands in axis_facts.operands.items():
        carrying = [o for o in operands if any(atom in atoms_of(expr) for expr in o.exprs)]
        if not carrying and not any(atom in atoms_of(e) for exprs in axis_facts.values[node] for e in exprs):
            continue
        relation = axis_facts.relations.get(node)
        if any(is_complex(each) for each in (node, *(o.node for o in carrying))):
            return f"the numbers of {op_name(node)} ({place(node, region)}) are complex"
        if relation is None or not is_linear(relation, [o.node for o in carrying]):
            return f"no change of basis passes through {op_name(node)} ({place(node, region)}) between the weights"
    return None


def _sides_of_weights(axis_facts: AxisFacts, dims: set[WeightDim], atom: Atom) -> dict[WeightDim, Tensor] | str:
    """Take weights that sum over the axis for its far side, all others for its near side."""
    summing = consumers(axis_facts)
    result: dict[WeightDim, Tensor] = {}
    for name, dim in dims:
        consumer = summing.get((name, dim))
        if isinstance(consumer, str):
            return f"`{name}`: {consumer}"
        if isinstance(consumer, Consumer) and consumer.window > 1:
            return f"`{name}` sums over it as the kernel of a convolution"
        result[name, dim] = _side_along(axis_facts, name, dim, atom, NEAR if consumer is None else FAR)
    return result


def _sides_of_activations(
    axis_facts: AxisFacts, nodes: list[fx.Node], dims: set[WeightDim], atom: Atom
) -> dict[WeightDim, Tensor] | str:
    """Infer axes again, with the two sides left apart in these products, so that they are two atoms."""
    alone = inferred_again(axis_facts, axis_facts.captured, bool(axis_facts.experiments), frozenset(nodes))
    near: set[Atom] = set()
    far: set[Atom] = set()
    for node in nodes:
        both = [
            {a for e, was in zip(o.exprs, joint.exprs, strict=True) if atom in atoms_of(was) for a in atoms_of(e)}
            for o, joint in zip(alone.operands[node], axis_facts.operands[node], strict=True)
            if any(atom in atoms_of(was) for was in joint.exprs)
        ]
        if len(both) != 2:
            return f"{op_name(node)} sums over it in {len(both)} of its operands, not in two"
        near |= both[0] - both[1]
        far |= both[1] - both[0]
    result: dict[WeightDim, Tensor] = {}
    for name, dim in dims:
        expr, side_of = alone.parameters[name][dim], torch.full((len(_index(axis_facts, name, dim, atom)),), -1)
        for side, atoms in ((NEAR, near), (FAR, far)):
            for each in atoms & set(atoms_of(expr)):
                side_of[index_of(expr, each) >= 0] = side
        result[name, dim] = torch.where(_index(axis_facts, name, dim, atom) >= 0, side_of, -1)
    return "its two sides are the same axis" if near & far else result


def _index(axis_facts: AxisFacts, name: str, dim: int, atom: Atom) -> Tensor:
    return index_of(axis_facts.parameters[name][dim], atom)


def _side_along(axis_facts: AxisFacts, name: str, dim: int, atom: Atom, side: int) -> Tensor:
    return torch.where(_index(axis_facts, name, dim, atom) >= 0, side, -1)


def balanced(near: Tensor, far: Tensor) -> BasisChange:
    """Find the basis in which the Gram matrices of both sides are the same diagonal, largest entries first.

    With `near = A A.T` and `far = B.T B` these are the singular values of `B A`, so the product loses least if entries
    are cut off the end (Eckart and Young). With Gram matrices of activations it is their product that loses least.

    Args:
        near: `[contexts, d, d]`, the Gram matrices of the near side.
        far: `[contexts, d, d]`, those of the far side.
    """
    near, far = near.double(), far.double()
    scales = [g.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-300) for g in (near, far)]
    # Directions without energy have no basis of their own: the ridge lets only those above rounding be told apart.
    root = factor(near / scales[0], 1e-10)
    values, vectors = torch.linalg.eigh(root.mT @ (far / scales[1]) @ root)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    energy = values.sqrt()
    width = energy.clamp(min=1e-5 * energy.amax(-1, keepdim=True).clamp(min=1e-300)).sqrt()
    # The two sides take equal shares of the product's scale.
    ratio = (scales[1] / scales[0]).clamp(1e-12, 1e12) ** 0.25
    turn = ratio * (width[:, :, None] * torch.linalg.solve_triangular(root.mT, vectors, upper=True).mT)
    back = (vectors.mT @ root.mT) / width[:, :, None] / ratio
    return BasisChange(turn, back, energy * (scales[0] * scales[1])[:, :, 0].sqrt())


def near_old_basis(turn: BasisChange, keep: int, scale: Tensor) -> BasisChange:
    """Return a basis near to the old one, in which the first `keep` entries span the same space as in `turn`.

    Some of the old entries span nearly that space. Each new entry is one of these, plus the part that it takes over of
    those that will go; so the optimizer's state of an entry stays that of the same entry. They are chosen one by one,
    as in a QR decomposition with column pivoting.

    Args:
        turn: the change of basis from `balanced`.
        keep: number of entries that will stay.
        scale: `[contexts, d]`, the size of the old entries.
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
        columns = span[:, sorted(chosen)]
        near[context, :keep] = torch.linalg.solve(columns, span)
        far[context, :keep] = columns.T @ far[context, :keep]
    return BasisChange(near, far, turn.energy)


def change_basis(tensor: Tensor, part: Part, by: Tensor) -> Tensor:
    """Multiply each block of a tensor along `part` by the matrix of its context.

    Args:
        tensor: the parameter, its gradient, or optimizer state of its shape.
        part: the blocks.
        by: `[contexts, d, d]`, the matrices.
    """
    rows = tensor.detach().movedim(part.dim, 0)
    order = part.order.to(rows.device)
    blocks = rows[order].reshape(*order.shape, -1).double()  # [d, blocks, rest]
    turned = torch.einsum("bij,jbr->ibr", by.to(rows.device)[part.context.to(rows.device)], blocks)
    result = rows.clone()
    result[order] = turned.reshape(*order.shape, *rows.shape[1:]).to(result.dtype)
    return result.movedim(0, part.dim).contiguous() if tensor.is_contiguous() else result.movedim(0, part.dim)


def gram_of(tensors: Mapping[str, Tensor], parts: list[Part], contexts: int) -> Tensor:
    """Sum `rows @ rows.T` over the blocks of some parts, per context, float64 `[contexts, d, d]`; biases count."""
    size = len(parts[0].order)
    device: Any = tensors[parts[0].parameter].device
    total = torch.zeros(contexts, size, size, dtype=torch.float64, device=device)
    for part in parts:
        rows = tensors[part.parameter].detach().movedim(part.dim, 0)
        blocks = rows[part.order.to(rows.device)].reshape(*part.order.shape, -1).double()
        total.index_add_(0, part.context.to(device), torch.einsum("ibr,jbr->bij", blocks, blocks).to(device))
    return total
