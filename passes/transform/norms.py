"""Norms: vectors that scale and shift what a reduction over their own axis has normalised, wherever a graph has them.

    y = w * N(x) + b                N takes statistics of x along the axis of w and b: a root mean square, a variance

    norms(axis_facts)               -> a Norm per place: the values x and y, the vectors, the ops between
    Responses.of(norm, ..., x, v)   -> what y is without any vector, and what each one adds to it, channel by channel
    Fit.add / .solved               -> the vectors for which y at smaller sizes is nearest to what it was

Nothing is known of the ops between but what the rules say of axes: that y is affine in each vector is computed, and so
are the statistics of what is left. A norm that adds 1 to its weight, or one that is written by hand, is like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ecospa_fx.passes.axes.algebra import Atom, Expr, atoms_of
from ecospa_fx.passes.axes.selection import Selection, touched
from ecospa_fx.passes.graph.nodes import is_tensor
from ecospa_fx.passes.infer.taint import given_nodes
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.op_site import OpSite
from ecospa_fx.passes.ir.relations import Pattern, Pointwise, Relation, SameDims
from ecospa_fx.passes.rules import op_info

MOST_OPS = 48
"""Ops between x and y at most: a norm has a dozen."""
NEAR = 1e-3
"""Error at most, as a share of y, at which y counts as affine in the vectors; ops between may run in half precision."""


@dataclass(frozen=True, eq=False)
class Norm:
    """One place where vectors scale and shift what is normalised along their axis.

    Attributes:
        source: the node of x.
        result: the node of y.
        expr: the axis.
        dim: the dim of x that it lies on.
        along: that of y.
        vectors: names in the region of the parameters that lie along it, in order of use.
        tensors: names of all parameters and buffers that the ops between take.
        ops: the ops between, in order.
        by_rows: each position of x is normalised for itself, so that some of them are enough.
    """

    source: fx.Node
    result: fx.Node
    expr: Expr
    dim: int
    along: int
    vectors: tuple[str, ...]
    tensors: tuple[str, ...]
    ops: tuple[fx.Node, ...]
    by_rows: bool

    def shaped(self, rows: Tensor) -> Tensor:
        """Give rows `[positions, entries]` the dims of x."""
        ndim = len(self.source.meta["val"].shape)
        first = 0 if self.dim else min(1, ndim - 1)
        shape = [1] * ndim
        shape[self.dim], shape[first] = rows.shape[1], rows.shape[0]
        return (rows if first < self.dim else rows.T).reshape(shape)

    def run(self, axis_facts: AxisFacts, kept: Selection, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Run the ops between alone.

        Args:
            axis_facts: axes of the graph.
            kept: the entries of each atom that x and the tensors have.
            x: the value of `source`.
            tensors: the parameters and buffers by name in the region.
        """
        captured = axis_facts.captured
        graph, new, given = fx.Graph(), dict[fx.Node, fx.Node](), list[object]()
        for node in (self.source, *dict.fromkeys(arg for op in self.ops for arg in op.all_input_nodes)):
            if node not in new and node not in self.ops:
                new[node] = graph.placeholder(f"value_{len(new)}")
                new[node].meta = node.meta
                name = captured.tensors.get(node.name)
                constant = captured.constants.get(node.name)
                given.append(x if node is self.source else constant if name is None else tensors[name])
        for op in self.ops:
            new[op] = copied = graph.node_copy(op, new.__getitem__)
            info = op_info(op.target)
            if info is not None and info.resize is not None and op in axis_facts.operands:
                axes = (*axis_facts.values[op], *(o.exprs for o in axis_facts.operands[op]))
                if any(touched(expr, kept) for exprs in axes for expr in exprs):
                    site = OpSite(copied, op, axis_facts, kept)
                    info.resize(site)
                    site.apply()
        graph.output(new[self.result])
        result: Tensor = fx.Interpreter(nn.Module(), graph=graph).run(*given)
        return result


def norms(axis_facts: AxisFacts) -> list[Norm]:
    """Find the places of a graph where vectors scale and shift what is normalised; none whose vectors do more."""
    found: dict[fx.Node, Norm] = {}
    captured = axis_facts.captured
    search = _Search(axis_facts)
    for node in captured.graph.nodes:
        norm = search.ending_in(node)
        if norm is None:
            continue
        inner = [each for each in found.values() if each.result in norm.ops]
        if all(set(each.result.users) <= set(norm.ops) for each in inner):
            for each in inner:
                del found[each.result]
            found[node] = norm
    used = {name: search.users(name) for norm in found.values() for name in norm.vectors}
    inside: dict[str, set[fx.Node]] = {}
    together: dict[str, set[tuple[str, ...]]] = {}
    for norm in found.values():
        for name in norm.vectors:
            inside.setdefault(name, set()).update(norm.ops)
            together.setdefault(name, set()).add(norm.vectors)
    fine = {name for name in used if used[name] <= inside[name] and len(together[name]) == 1}
    return [norm for norm in found.values() if fine.issuperset(norm.vectors)]


def steps(axis_facts: AxisFacts, atoms: set[Atom]) -> list[Norm]:
    """Find the places of a graph where values are normalised along some axes and no vector scales the result."""
    search, found, taken = _Search(axis_facts), list[Norm](), set[fx.Node]()
    for node in axis_facts.captured.graph.nodes:
        if node not in search.given or node in taken or not is_tensor(node):
            continue
        carried = [e for e in next(iter(axis_facts.values.get(node, ())), ()) if atoms & set(atoms_of(e))]
        operands = axis_facts.operands.get(node, ())
        without = any(o.node in search.given and not any(atoms & set(atoms_of(e)) for e in o.exprs) for o in operands)
        if len(carried) == 1 and (without or search.reduced.get(node, set()) & atoms):
            step = search.ending_in(node, carried[0])
            if step is not None and not step.vectors:
                found.append(step)
                taken.update(step.ops)
    return found


class _Search:
    """The search for norms in one graph."""

    def __init__(self, axis_facts: AxisFacts) -> None:
        self.axis_facts, captured = axis_facts, axis_facts.captured
        self.given = given_nodes(captured)
        self.order = {node: i for i, node in enumerate(captured.graph.nodes)}
        self.reduced: dict[fx.Node, set[Atom]] = {}
        self.meeting: set[fx.Node] = set()  # ops in which a matrix makes or sums an axis
        for fact in axis_facts.facts:
            if fact.role == "reduced":
                self.reduced.setdefault(fact.node, set()).update(atoms_of(fact.expr))
            elif fact.role in ("contracted", "free"):
                self.meeting.add(fact.node)

    def users(self, name: str) -> set[fx.Node]:
        """Return the ops that take a parameter, under any of its names."""
        captured = self.axis_facts.captured
        names = {n for n in captured.tensors.values() if captured.same_storage.get(n, n) == name}
        return {
            user
            for node in captured.graph.nodes
            if node.op == "placeholder" and captured.tensors.get(node.name) in names
            for user in node.users
        }

    def ending_in(self, node: fx.Node, plain: Expr | None = None) -> Norm | None:
        """Return the norm whose result a node is, if it is one; without a vector, if it is `plain` along that axis."""
        expr = self._vector_in(node) or plain
        if expr is None:
            return None
        atoms = set(atoms_of(expr))
        frontier, inner, best, done = {node}, list[fx.Node](), None, 0
        # Each value that all else passes through ends a step: the mean is subtracted in one, the variance comes later.
        while len(inner) < MOST_OPS:
            last = max(frontier, key=self.order.__getitem__)
            if last.op != "call_function" or (last in self.meeting and not self.reduced.get(last, set()) & atoms):
                break
            if best is not None and self._vector_in(last) is not None:
                break
            inner.append(last)
            frontier.discard(last)
            entering = [arg for arg in last.all_input_nodes if arg in self.given]
            if not all(is_tensor(arg) and arg in self.axis_facts.values for arg in entering):
                break
            frontier.update(entering)
            if len(frontier) == 1 and any(self.reduced.get(each, set()) & atoms for each in inner[done:]):
                best, done = self._norm(next(iter(frontier)), node, expr, inner, plain is None), len(inner)
                if plain is not None:
                    break
        return best

    def _vector_in(self, node: fx.Node) -> Expr | None:
        """Return the axis of a vector that an op brings to a value of the call; None where it brings none."""
        if node not in self.given or node not in self.axis_facts.operands or len(self.axis_facts.values[node]) != 1:
            return None
        if not is_tensor(node):
            return None
        for operand in self.axis_facts.operands[node]:
            axes = [expr for expr, n in zip(operand.exprs, operand.shape, strict=True) if n != 1]
            if len(operand.parameters) == 1 and operand.node not in self.given and len(axes) == 1:
                return axes[0]
        return None

    def _norm(
        self, source: fx.Node, result: fx.Node, expr: Expr, inner: Sequence[fx.Node], scaled: bool
    ) -> Norm | None:
        captured, values = self.axis_facts.captured, self.axis_facts.values
        ops, tensors = self._with_weights(inner)
        if any(source.user in ops and self._meets(source.exprs, expr) for source in self.axis_facts.sources):
            return None  # values that do not shrink by themselves
        dims = [[d for d, e in enumerate(values[node][0]) if e == expr] for node in (source, result)]
        if any(len(each) != 1 for each in dims):
            return None
        lying = [(name, self.axis_facts.parameters.get(name, ())) for name in tensors]
        lying = [(name, exprs) for name, exprs in lying if any(self._meets((e,), expr) for e in exprs)]
        if any(sum(e == expr for e in exprs) != 1 or _entries(exprs) != 1 for _, exprs in lying):
            return None
        vectors = tuple(dict.fromkeys(captured.same_storage.get(name, name) for name, _ in lying))
        if bool(vectors) != scaled or not all(captured.is_parameter(name) for name in vectors):
            return None
        ordered = tuple(sorted(ops, key=self.order.__getitem__))
        by_rows = all(_row_by_row(self.axis_facts.relations.get(op), dims[0][0]) for op in inner)
        return Norm(source, result, expr, dims[0][0], dims[1][0], vectors, tensors, ordered, by_rows)

    def _meets(self, exprs: Sequence[Expr], expr: Expr) -> bool:
        return any(set(atoms_of(expr)) & set(atoms_of(each)) for each in exprs)

    def _with_weights(self, inner: Sequence[fx.Node]) -> tuple[set[fx.Node], tuple[str, ...]]:
        """Return the ops with those that make their weights, and the tensors that these take."""
        captured = self.axis_facts.captured
        ops, tensors, waiting = set(inner), dict[str, None](), list(inner)
        while waiting:
            for arg in waiting.pop().all_input_nodes:
                if arg.name in captured.tensors:
                    tensors[captured.tensors[arg.name]] = None
                elif arg.op == "call_function" and arg not in self.given and arg not in ops:
                    ops.add(arg)
                    waiting.append(arg)
        return ops, tuple(tensors)


def _entries(exprs: Sequence[Expr]) -> int:
    return sum(bool(atoms_of(expr)) for expr in exprs)


def _row_by_row(relation: Relation | None, dim: int) -> bool:
    """Return whether an op reads entries of one position only, along a dim."""
    match relation:
        case Pointwise():
            return True
        case SameDims(absent=absent, dropped=dropped, pinned=pinned):
            return {*absent, *dropped, *pinned} <= {dim}
        case Pattern(spec=spec):
            return spec.startswith("... ") and len({name.strip("+,") for name in spec.split() if "~" in name}) == 1
        case _:
            return False


@dataclass(frozen=True, eq=False)
class Responses:
    """The result of a norm, as it follows from its vectors: `alone + sum(each[k] * v[k])` per channel.

    Attributes:
        alone: `[positions, channels]`, float64, where all vectors are zero.
        each: `[vectors, positions, channels]`, what is added where one of them is 1.
    """

    alone: Tensor
    each: Tensor

    def at(self, vectors: Tensor) -> Tensor:
        """Return the result for vectors `[vectors, channels]`."""
        return self.alone + (self.each * vectors[:, None]).sum(0)

    @classmethod
    def of(
        cls, norm: Norm, axis_facts: AxisFacts, kept: Selection, x: Tensor, tensors: Mapping[str, Tensor]
    ) -> Responses:
        """Compute them for a value of x; arguments as those of `Norm.run`."""
        values = {name: tensors[name].detach() for name in norm.tensors}
        same = axis_facts.captured.same_storage

        def run(ones: str | None) -> Tensor:
            given = {
                name: value if same.get(name, name) not in norm.vectors
                else torch.ones_like(value) if same.get(name, name) == ones else torch.zeros_like(value)
                for name, value in values.items()
            }  # fmt: skip
            y = norm.run(axis_facts, kept, x, given).detach()
            return y.movedim(norm.along, -1).reshape(-1, y.shape[norm.along]).double()

        alone = run(None)
        each = [run(name) - alone for name in norm.vectors]
        return cls(alone, torch.stack(each) if each else alone.new_zeros(0, *alone.shape))


def is_affine(norm: Norm, axis_facts: AxisFacts, kept: Selection, x: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    """Decide whether the result of a norm is affine in its vectors, entry by entry, by computing it."""
    responses = Responses.of(norm, axis_facts, kept, x, tensors)
    vectors = torch.stack([tensors[name].detach().flatten().to(responses.alone) for name in norm.vectors])
    given = {name: tensors[name].detach() for name in norm.tensors}
    y = norm.run(axis_facts, kept, x, given).movedim(norm.along, -1).reshape(-1, vectors.shape[1])
    return bool((responses.at(vectors) - y).norm() <= NEAR * y.double().norm())


@dataclass(eq=False)
class Fit:
    """Least squares for the vectors of a norm, channel by channel, as sums over positions.

    Attributes:
        squares: `[channels, vectors, vectors]`, float64.
        sums: `[channels, vectors, targets]`, products with what the result was, for each of several models.
        count: number of positions.
    """

    squares: Tensor
    sums: Tensor
    count: float = 0.0

    @classmethod
    def empty(cls, channels: int, vectors: int, targets: int, device: torch.device) -> Fit:
        """Make one without positions."""
        new = torch.zeros(channels, vectors, vectors, dtype=torch.float64, device=device)
        return cls(new, new.new_zeros(channels, vectors, targets))

    def add(self, now: Responses, before: Sequence[Tensor]) -> None:
        """Add positions.

        Args:
            now: the responses at the sizes left.
            before: `[positions, channels]`, what each model's result was there.
        """
        each = now.each.permute(2, 1, 0)  # [channels, positions, vectors]
        targets = torch.stack([target - now.alone for target in before], -1).transpose(0, 1)
        self.squares += each.mT @ each
        self.sums += each.mT @ targets
        self.count += each.shape[1]

    def solved(self, old: Tensor, ridge: float) -> Tensor:
        """Return the vectors for which the results are nearest to what they were.

        Args:
            old: `[targets, vectors, channels]`, those of each model now.
            ridge: pulls the result to these, as a share of the squares of each vector.

        Returns:
            Of the shape of `old`.
        """
        start = old.permute(2, 1, 0)  # [channels, vectors, targets]
        scale = self.squares.diagonal(dim1=-2, dim2=-1)
        raised = self.squares.clone()
        raised.diagonal(dim1=-2, dim2=-1).add_(scale * ridge + torch.where(scale > 0, 0.0, 1.0))
        change = torch.linalg.solve(raised, self.sums - self.squares @ start)
        solved: Tensor = start + change
        return solved.permute(2, 1, 0)


def grouped(found: Sequence[Norm]) -> Iterator[list[Norm]]:
    """Yield the norms that have the same vectors together."""
    groups: dict[tuple[str, ...], list[Norm]] = {}
    for norm in found:
        groups.setdefault(norm.vectors, []).append(norm)
    yield from groups.values()
