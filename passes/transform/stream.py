"""Stream: an axis that norms stand on, and how another orthonormal basis passes through all that reads and writes it.

    x -> Q x                 near weights write it, rows times Q
    y = e * N(x) + b         N(Q x) = Q N(x): of a root mean square for any Q, of a variance where Q keeps the mean
    W y = (W diag(e) Q') (Q N(x)) + W b
                             e moves into the far weights that read y, after which every entry of the norm's weight is 1

    Trace(...).call / .finish  -> OnGraphs: how each weight lies on the stream, the norms, and those whose e must stay
    standing(norm, ...)        -> e and b as they follow from its vectors; whether N keeps to any basis, or to some

A norm whose result is added to the stream again cannot move its weight anywhere: it is *rigid*, its e is one number, or
the basis stays. This is SliceGPT (arXiv 2401.15024) on the axes of any graph, with one basis for the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from ecospa_fx.passes.axes.algebra import Atom, Expr, atoms_of
from ecospa_fx.passes.axes.selection import Selection
from ecospa_fx.passes.graph.nodes import is_complex, op_name, place
from ecospa_fx.passes.infer.taint import given_nodes
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.relations import is_linear, moved_operand

from .consumers import Use, uses_of
from .norms import Norm, Responses, norms, steps

CLOSE = 1e-3
"""Error at most, as a share, at which two results count as equal; ops between may run in half precision."""


class KeepsBasis(Exception):
    """The axis keeps its basis, for a reason that users read."""


@dataclass(frozen=True, eq=False)
class Standing:
    """A norm on a stream: `e * N(x) + b`.

    Attributes:
        norm: the norm; its vectors are empty if it has none.
        axis_facts: axes of the graph that it lies in.
        region: name of the region.
    """

    norm: Norm
    axis_facts: AxisFacts
    region: str

    @property
    def key(self) -> tuple[str, ...]:
        """The vectors in the region, or the node where it has none."""
        return (self.region, *(self.norm.vectors or (self.norm.result.name,)))


Kind: TypeAlias = "tuple[str, ...] | None"  # the norm whose result a value is, by its key; None: the stream itself


@dataclass(eq=False)
class OnGraphs:
    """How the weights of a model lie on a stream.

    Attributes:
        near: (region, parameter, dim) of those that write it.
        far: (region, parameter, dim) of those that read it -> what they read, and the bias that is theirs alone.
        norms: the norms on it, by key.
        rigid: keys of those whose result is part of the stream.
    """

    near: dict[tuple[str, str, int], None] = field(default_factory=dict)
    far: dict[tuple[str, str, int], dict[Kind, str | None]] = field(default_factory=dict)
    norms: dict[tuple[str, ...], list[Standing]] = field(default_factory=dict)
    rigid: dict[tuple[str, ...], str] = field(default_factory=dict)


class Trace:
    """The way of a stream through one graph.

    Args:
        region: name of the region.
        axis_facts: axes of the graph.
        atoms: the atoms that are the stream.
        found: what is found is noted here.
    """

    def __init__(self, region: str, axis_facts: AxisFacts, atoms: set[Atom], found: OnGraphs) -> None:
        self.region, self.facts, self.atoms, self.found = region, axis_facts, atoms, found
        self.kinds: dict[fx.Node, Kind] = {}
        self._done: set[fx.Node] = set()
        captured = axis_facts.captured
        self._given = given_nodes(captured)
        known = [norm for norm in norms(axis_facts) if self._along(norm.expr)]
        taken = {op for norm in known for op in norm.ops}
        known += [norm for norm in steps(axis_facts, atoms) if not taken & set(norm.ops)]
        self._ending = {norm.result: norm for norm in known}
        self._inside = {op for norm in known for op in norm.ops}
        for source in axis_facts.sources:
            if any(self._along(expr) for expr in source.exprs):
                raise KeepsBasis(f"{self._at(source.user)} brings in values that keep the old basis")
        for node in captured.graph.nodes:
            if node.op == "placeholder" and node.name in captured.tensors and self._carried(node):
                self.kinds[node] = None
        self._uses = uses_of(axis_facts)
        self._by_user: dict[fx.Node, list[tuple[str, Use]]] = {}
        for name, uses in self._uses.items():
            for use in uses:
                self._by_user.setdefault(use.user, []).append((name, use))
        self._note_weights()

    def _along(self, expr: Expr) -> bool:
        return not self.atoms.isdisjoint(atoms_of(expr))

    def _carried(self, node: fx.Node) -> bool:
        return any(self._along(expr) for exprs in self.facts.values.get(node, ()) for expr in exprs)

    def _at(self, node: fx.Node) -> str:
        where = self.region if self.region != "\0between" else ""
        return f"{op_name(node)} ({place(node, where)})"

    def _note_weights(self) -> None:
        """Note the weights that write the stream; those that read it are noted with what they read."""
        vectors = {name for norm in self._ending.values() for name in norm.vectors}
        for name, exprs in self.facts.parameters.items():
            if name in self.facts.captured.same_storage or name in vectors:
                continue
            for dim, expr in enumerate(exprs):
                uses = self._uses.get(name, [])
                if self._along(expr) and not (uses and all(use.dim == dim for use in uses)):
                    self.found.near[self.region, name, dim] = None

    def enter(self, argument: str, kind: Kind) -> None:
        """Note that an argument of the region is a value of that kind."""
        captured = self.facts.captured
        for node in captured.graph.nodes:
            if node.op == "placeholder" and captured.arguments.get(node.name) == argument and self._carried(node):
                self.kinds[node] = kind

    def run(self, until: fx.Node | None = None) -> None:
        """Follow the stream, up to a node."""
        for node in self.facts.captured.graph.nodes:
            if node.op == "call_function" and node not in self._done:
                self._done.add(node)
                self._visit(node)
            if node is until:
                return

    def _visit(self, node: fx.Node) -> None:
        norm = self._ending.get(node)
        if norm is not None:
            self._stand(norm)
            return
        carrying = [o for o in self.facts.operands.get(node, ()) if any(self._along(expr) for expr in o.exprs)]
        if node in self._inside or (not carrying and not self._carried(node)):
            return
        relation = self.facts.relations.get(node)
        if any(is_complex(each) for each in (node, *(o.node for o in carrying))):
            raise KeepsBasis(f"the numbers of {self._at(node)} on the stream are complex")
        if relation is None or not is_linear(relation, [o.node for o in carrying]):
            raise KeepsBasis(f"no change of basis passes through {self._at(node)} on the stream")
        reading = [(name, use) for name, use in self._by_user.get(node, ()) if self._reads(name, use.dim)]
        for name, use in reading:
            assert use.input is not None and use.dim is not None
            entered = self.found.far.setdefault((self.region, name, use.dim), {})
            entered[self._kind(use.input, node)] = use.bias if use.plain else None
        if self._carried(node):
            moved = moved_operand(relation)  # another operand may give a dtype only
            entering = carrying if moved is None else [moved]
            self.kinds[node] = None if reading else self._merged(node, [o.node for o in entering])
        elif not reading:
            raise KeepsBasis(f"{self._at(node)} sums over the stream without a weight of its own")

    def _reads(self, name: str, dim: int | None) -> bool:
        return dim is not None and self._along(self.facts.parameters[name][dim])

    def _kind(self, node: fx.Node, user: fx.Node) -> Kind:
        if node not in self.kinds:
            raise KeepsBasis(f"{self._at(user)} takes a value on the stream that is not linear in it")
        return self.kinds[node]

    def _merged(self, node: fx.Node, entering: Sequence[fx.Node]) -> Kind:
        """Return the kind of what an op makes of some values: of several, that of the stream."""
        kinds = [self._kind(each, node) for each in entering if self._carried(each)]
        if len(kinds) == 1:
            return kinds[0]
        for kind in kinds:
            if kind is not None:
                self.found.rigid.setdefault(kind, f"{self._at(node)} adds its result to the stream")
        return None

    def _stand(self, norm: Norm) -> None:
        """Note a norm on the stream."""
        if norm.expr not in self.atoms:
            raise KeepsBasis(f"{self._at(norm.result)} normalises over more than the stream")
        kind = self._kind(norm.source, norm.result)
        if kind is not None:
            self.found.rigid.setdefault(kind, f"{self._at(norm.result)} takes its result as the stream")
        for op in norm.ops:
            free = op is norm.result or op not in self._given or op in self.kinds
            if not free and not set(op.users) <= self._inside:
                raise KeepsBasis(f"{self._at(op)} is a part of a norm, and something else takes its result")
        standing = Standing(norm, self.facts, self.region)
        known = self.found.norms.setdefault(standing.key, [])
        if all(each.norm is not norm for each in known):
            known.append(standing)
        self.kinds[norm.result] = standing.key if norm.vectors else None

    def results(self) -> Iterator[tuple[int, Kind]]:
        """Yield the kind of each result of the graph that is a value of the stream."""
        output = next(node for node in reversed(self.facts.captured.graph.nodes) if node.op == "output")
        leaving: Any = output.args[0]
        for number, node in enumerate(leaving):
            if isinstance(node, fx.Node) and self._carried(node):
                yield number, self._kind(node, node)


@dataclass(frozen=True, eq=False)
class Factors:
    """What a norm does, as it follows from its vectors: `(offset + scale) * N(x) + share * shift`.

    Attributes:
        scale: name of the vector that scales, or None.
        shift: name of the one that is added, or None.
        offset: 0; 1 where a norm adds 1 to its weight.
        share: 1 as a rule.
        centred: N keeps only to a basis in which the mean of entries is what it was.
    """

    scale: str | None
    shift: str | None
    offset: float
    share: float
    centred: bool


def factors(standing: Standing, kept: Selection, tensors: Mapping[str, Tensor], size: int) -> Factors:
    """Compute what a norm does, and whether a change of basis passes through it.

    Args:
        standing: the norm.
        kept: the entries of each atom that are left.
        tensors: the tensors of the region by name.
        size: entries of the stream now.

    Raises:
        KeepsBasis: none passes.
    """
    norm, facts = standing.norm, standing.axis_facts
    where = f"{op_name(norm.result)} ({place(norm.result, standing.region)})"
    if not norm.by_rows:
        raise KeepsBasis(f"{where} takes statistics over more than the stream")
    random = torch.Generator().manual_seed(0)
    dtype = norm.source.meta["val"].dtype
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    x = torch.randn(8, size, generator=random, dtype=torch.float64)
    x = x * torch.logspace(-1, 1, 8, dtype=torch.float64)[:, None] + 0.5
    own = {name: tensors[name].detach() for name in norm.tensors}

    def at(rows: Tensor) -> Responses:
        return Responses.of(norm, facts, kept, norm.shaped(rows.to(device, dtype)), own)

    def turned(rows: Tensor, direction: Tensor) -> Tensor:
        return rows - 2 * torch.outer(rows @ direction, direction) / direction.square().sum()

    plain = at(x)
    scale = shift = None
    normed, offset, share = plain.alone, 0.0, 1.0
    for name, each in zip(norm.vectors, plain.each, strict=True):
        if bool((each - each.mean()).abs().max() <= CLOSE * each.abs().max()):
            if shift is not None or not bool(each.abs().max() > 0):
                raise KeepsBasis(f"`{name}` in {where} shifts entries in another way than by adding to them")
            shift, share = name, float(each.mean())
        elif scale is not None:
            raise KeepsBasis(f"two vectors scale the stream in {where}")
        else:
            scale, normed = name, each
    if scale is not None:
        offset = float((plain.alone * normed).sum() / normed.square().sum())
        if bool((plain.alone - offset * normed).norm() > CLOSE * normed.norm()):
            raise KeepsBasis(f"{where} does more with the stream than scale and shift what it normalises")

    def keeps_to(direction: Tensor) -> bool:
        other = at(turned(x, direction))
        other_normed = other.alone if scale is None else other.each[norm.vectors.index(scale)]
        expected = turned(normed.cpu(), direction)
        return bool((other_normed.cpu() - expected).norm() <= CLOSE * expected.norm())

    directions = torch.randn(3, size, generator=random, dtype=torch.float64)
    if all(keeps_to(direction) for direction in directions):
        return Factors(scale, shift, offset, share, False)
    if all(keeps_to(direction - direction.mean()) for direction in directions):
        return Factors(scale, shift, offset, share, True)
    raise KeepsBasis(f"the result of {where} depends on the basis of the stream")


def basis_of(squares: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis in which the first entries carry most, and what each carries.

    Where a mean is subtracted the basis keeps it: `Q 1 = 1`. The principal components without it are then laid along
    vectors of mean zero of which each has one entry more than the one before (Helmert), so that the first entries still
    hold the first components, and the mean of those that are left is subtracted from them alone.

    Args:
        squares: `[d, d]`, second moments.
        centred: whether the mean must stay.

    Returns:
        `Q [d, d]`, float64, whose rows are the new entries; `[d]`, the roots of the squares in descending order.
    """
    squares, size = squares.double(), len(squares)
    if centred:
        flat = torch.full((size, 1), size**-0.5, dtype=squares.dtype, device=squares.device)
        squares = squares - flat @ (flat.T @ squares)
        squares = squares - (squares @ flat) @ flat.T
        squares = squares - squares.diagonal().sum().clamp(min=1e-300) * flat @ flat.T  # it comes last
    values, vectors = torch.linalg.eigh((squares + squares.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    energy = values.clamp(min=0).sqrt()
    if not centred:
        return vectors.T.contiguous(), energy
    steps_ = torch.arange(1, size, dtype=squares.dtype, device=squares.device)
    helmert = torch.tril(torch.ones(size - 1, size, dtype=squares.dtype, device=squares.device))
    helmert[torch.arange(size - 1), torch.arange(1, size)] = -steps_
    helmert = helmert / (steps_ * (steps_ + 1)).sqrt()[:, None]
    vectors[:, -1] = flat[:, 0]
    return helmert.T @ vectors[:, :-1].T + flat @ flat.T, energy


def near_old_entries(basis: Tensor, keep: int) -> Tensor:
    """Turn the first entries of a basis among themselves, and the others, so that each is near to an old one."""
    result = basis.clone()
    for rows in (slice(0, keep), slice(keep, len(basis))):
        part = basis[rows]
        weights = part.square().sum(0)
        chosen = weights.topk(len(part)).indices.sort().values
        u, _, v = torch.linalg.svd(part[:, chosen].T)
        result[rows] = (u @ v) @ part
    return result
