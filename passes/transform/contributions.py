"""Contributions: where a graph adds up what the entries of an axis make, each entry with weights of its own.

    contributions(axis_facts, atom, context) -> Sums, each with the values to see on the way to it

Experts of a mixture: matrices `[experts, ...]`, of which every token meets some. A value is *owned* if along some of
its dims each position belongs to one entry: those along the axis itself, rows whose matrices were picked by places
along it, and rows that lie in groups. Ownership passes through all ops that keep these positions apart. The op that
does not is a sum, and its owned operand the contributions: an expert's output, times its gate.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import fx

from ecospa_fx.passes.axes.algebra import UNIT, Atom, Expr, Product, atoms_of
from ecospa_fx.passes.ir import relations as r
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Exprs
from ecospa_fx.passes.ir.patterns import bind

from .owned import Along, ChosenBy, Contributions, Grouped, Owned, Passed, Sum, keys_of


def contributions(axis_facts: AxisFacts, atom: Atom, context: Atom | None) -> Contributions:
    """Find where what the entries of `atom` make is added up.

    Args:
        axis_facts: axes of a graph.
        atom: the axis.
        context: the atom by which its entries may differ.
    """
    return _Flow(axis_facts, atom, context).run()


class _Flow:
    def __init__(self, axis_facts: AxisFacts, atom: Atom, context: Atom | None) -> None:
        self.facts, self.atom = axis_facts, atom
        beside = [set(atoms_of(e)) for exprs in axis_facts.parameters.values() for e in exprs if atom in atoms_of(e)]
        self.own = set.intersection(*beside) if beside else {atom}  # groups of entries too
        self.owned: dict[fx.Node, Owned] = {}
        self.sums: list[Sum] = []
        self._parents: dict[fx.Node, list[fx.Node]] = {}
        self._bringing: set[fx.Node] = set()  # ops that bring weights of entries in

    def run(self) -> Contributions:
        """Visit all ops in order."""
        for node in self.facts.captured.graph.nodes:
            if node.op == "placeholder":
                self._begin(node)
            elif node.op == "call_function":
                self._visit(node)
        return Contributions(self._settled(), self.owned)

    def _settled(self) -> tuple[Sum, ...]:
        """Leave out what comes after contributions have ended, and end those that are never added up.

        One entry to a token, and its rows stay apart to the end of the graph. Then they are contributions as long as
        they are linear in the entries' last weights, and meet no others.
        """
        children: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.owned}
        for node, parents in self._parents.items():
            for parent in parents:
                children[parent].append(node)
        summed = {each.owned.node for each in self.sums if self._adds_up(each)}
        more, real = set[fx.Node](), set[fx.Node]()  # with weights of entries to come; with a sum to come
        for node in reversed(self.owned):
            if any(child in self._bringing or child in more for child in children[node]):
                more.add(node)
            if node in summed or any(child in real for child in children[node]):
                real.add(node)
        alive: set[fx.Node] = set()
        ends: dict[fx.Node, list[fx.Node]] = {}
        for node, owned in self.owned.items():
            parents = [parent for parent in self._parents.get(node, ()) if parent in alive]
            if not parents and self._parents.get(node):
                continue
            over = [p for p in parents if self.owned[p].made and p not in more and p not in real]
            if over and not self._keeps_linear(node):
                for parent in over:
                    ends.setdefault(parent, []).append(node)
                continue
            alive.add(node)
            out = [user for user in node.users if user.op == "output"]
            if owned.made and out and node not in more and node not in real:
                ends.setdefault(node, []).extend(out)
        sums = [each for each in self.sums if each.owned.node in alive and each.factors]
        for each in self.sums:
            if each.owned.node in alive and not each.factors:
                ends.setdefault(each.owned.node, []).extend(each.users)
        features = {each.owned.node: each.features for each in self.sums}
        for node, users in ends.items():
            owned = self.owned[node]
            sums.append(Sum(owned, tuple(users), (), owned.weights, features.get(node, owned.features)))
        return tuple(sums)

    def _adds_up(self, each: Sum) -> bool:
        """Return whether a sum is one, and not an average over tokens, say, or an op that mixes rows."""
        match self.facts.relations.get(each.users[0]):
            case r.SameDims(dropped=dropped, absent=absent, pinned=pinned):
                return bool(dropped) and not each.owned.dims & {*absent, *pinned}
            case r.Pattern():
                return True
        return False

    def _keeps_linear(self, node: fx.Node) -> bool:
        """Return whether an op moves, gates or joins contributions, and does no more."""
        match relation := self.facts.relations.get(node):
            case None:
                return True
            case r.Pointwise(how=how):
                return how in ("copy", "linear", "product", "quotient")
            case r.Pattern(rescaled=x):
                return x is not None
            case _:
                return r.moved_operand(relation) is not None

    def _features(self, exprs: Exprs) -> frozenset[Atom]:
        return frozenset(atom for expr in exprs for atom in atoms_of(expr)) - self.own

    def _begin(self, node: fx.Node) -> None:
        """Note a parameter that has a matrix for each entry; a router has a row."""
        exprs = self.facts.values.get(node, ((),))[0]
        carrying = [dim for dim, expr in enumerate(exprs) if self.atom in atoms_of(expr)]
        name = self.facts.captured.tensors.get(node.name)
        if name is None or len(carrying) != 1 or len(self._features(exprs)) < 2:
            return
        self.owned[node] = Owned(
            node, frozenset(carrying), Along(exprs[carrying[0]], carrying[0]), self._features(exprs),
            frozenset([name]), made=False,
        )  # fmt: skip

    def _visit(self, node: fx.Node) -> None:
        relation = self.facts.relations.get(node)
        if relation is None:
            if node.target is operator.getitem and (source := self.owned.get(node.args[0])):  # type: ignore[arg-type]
                self._pass(node, source, source.dims, None)
                self._parents[node] = [source.node]
            return
        if isinstance(relation, r.Created) or (isinstance(relation, r.SameDims) and relation.empty):
            return
        operands = self.facts.operands.get(node, ())
        started = self._start(node, relation, operands)
        if started is not None:
            self.owned[node] = started
            return
        mine = [(x, self.owned[x.node]) for x in operands if x.node in self.owned]
        if not mine or node not in self.facts.values:
            for _, owned in mine:
                self._end(owned, node)
            return
        self._follow(node, relation, operands, mine)

    def _start(self, node: fx.Node, relation: r.Relation, operands: Sequence[r.Operand]) -> Owned | None:
        """Return the value if the op picks weights of entries, or lays rows into groups that meet their weights."""
        resolved = {x.node: x for x in operands}  # those of a relation are as they were when it was visited
        match relation:
            case r.Indexed(taken, dim, index) if self._picks(x := resolved[taken.node], dim, index):
                at = tuple(range(dim, dim + index.ndim))
                return self._picked(node, x, ChosenBy(x.exprs[dim], index.node, at))
            case r.Pattern(chosen=chosen) if len(chosen) == 1:
                ((name, by),) = chosen.items()
                keys, out = keys_of(relation)
                for taken, own in zip(relation.operands, keys, strict=True):
                    if name not in own or taken is by or not taken.parameters:
                        continue
                    x, dim, of_index = resolved[taken.node], own.index(name), keys[relation.operands.index(by)]
                    if self._picks(x, dim, by) and all(key in out for key in of_index):
                        return self._picked(node, x, ChosenBy(x.exprs[dim], by.node, tuple(map(out.index, of_index))))
                    if (
                        by.places is None
                        and resolved[by.node].exprs == (x.exprs[dim],)
                        and self.atom in atoms_of(x.exprs[dim])
                    ):
                        rows = [key for key in out if key not in own]
                        if len(rows) == 1:
                            return self._grouped(node, x, Grouped(x.exprs[dim], by.node, out.index(rows[0])), operands)
        return None

    def _picks(self, x: r.Operand, dim: int, index: r.Operand) -> bool:
        along = self.facts.places.get(index.node)
        return bool(x.parameters) and along == x.exprs[dim] and self.atom in atoms_of(x.exprs[dim]) and x.ndim > 1

    def _picked(self, node: fx.Node, x: r.Operand, origin: ChosenBy) -> Owned:
        same = _repeated(self.facts.relations.get(origin.index))
        dims = frozenset(dim for number, dim in enumerate(origin.at) if number not in same)
        return Owned(node, dims, origin, self._features(x.exprs), frozenset(x.parameters), made=False)

    def _grouped(self, node: fx.Node, x: r.Operand, origin: Grouped, operands: Sequence[r.Operand]) -> Owned:
        before = [self.owned[each.node].features for each in operands if each.node in self.owned]
        features = self._features(x.exprs).union(*before)
        self._parents[node] = [each.node for each in operands if each.node in self.owned and not each.parameters]
        self._bringing.add(node)
        return Owned(node, frozenset([origin.dim]), origin, features, frozenset(x.parameters), made=True)

    def _follow(
        self, node: fx.Node, relation: r.Relation, operands: Sequence[r.Operand],
        mine: list[tuple[r.Operand, Owned]],
    ) -> None:  # fmt: skip
        """Pass ownership on to the result of an op, or note that it ends there."""
        passed = [(owned, self._through(node, relation, x, owned)) for x, owned in mine]
        others = [x for x in operands if x.node not in self.owned and x.weighted and not x.parameters]
        widest = max((dims for _, dims in passed if dims is not None), key=len, default=None)
        adds = isinstance(relation, r.Pointwise) and relation.how in ("linear", "affine")
        if (
            widest is None
            or any(dims is None or not dims <= widest for _, dims in passed)
            or (adds and any(self._has_features(x, mine) for x in others))
        ):
            for _, owned in mine:
                self._end(owned, node, operands, mine)
            return
        source = next(owned for owned, dims in passed if dims == widest)
        self._parents[node] = [owned.node for _, owned in mine]
        if any(not owned.made for _, owned in mine):
            self._bringing.add(node)
        features = self._all_features(operands)
        made = any(owned.made for _, owned in mine) or any(not x.parameters and x.node not in self.owned
                                                           for x in operands)  # fmt: skip
        self._pass(node, source, widest, relation, features, _linear_in(relation, mine), made)

    def _pass(
        self, node: fx.Node, source: Owned, dims: frozenset[int], relation: r.Relation | None,
        features: frozenset[Atom] | None = None, weights: frozenset[str] | None = None, made: bool | None = None,
    ) -> None:  # fmt: skip
        self.owned[node] = replace(
            source, node=node, dims=dims, origin=Passed(source.node, relation),
            features=source.features if features is None else features,
            weights=source.weights if weights is None else weights, made=source.made if made is None else made,
        )  # fmt: skip

    def _has_features(self, x: r.Operand, mine: list[tuple[r.Operand, Owned]]) -> bool:
        """Return whether an operand that belongs to no entry has features of its own, as a residual stream has."""
        features = frozenset[Atom]().union(*(owned.features for _, owned in mine))
        return any(features & set(atoms_of(expr)) for expr in x.exprs)

    def _all_features(self, operands: Sequence[r.Operand]) -> frozenset[Atom]:
        """Return the atoms that are axes of weights; of owned operands those noted, as their rows are none."""
        found = [self.owned[x.node].features if x.node in self.owned else self._features(x.exprs)
                 for x in operands if x.node in self.owned or x.parameters]  # fmt: skip
        return frozenset[Atom]().union(*found)

    def _end(
        self, owned: Owned, user: fx.Node, operands: Sequence[r.Operand] = (),
        mine: Sequence[tuple[r.Operand, Owned]] = (),
    ) -> None:  # fmt: skip
        """Note that positions of an operand do not stay apart in an op."""
        factors = _factors_beside(self.facts.relations.get(user), owned.node)
        others = [self.owned[o.node] for o in factors if o.node in self.owned]
        if not owned.made:
            if any(each.made for _, each in mine) or not self._is_chosen(owned):
                return  # it is a factor of these, or weights of all entries that an activation is summed up with
            if not factors and not isinstance(self.facts.relations.get(user), r.SameDims):
                return
        pure = [each.weights for each in others if not each.made]
        weights = (pure[0] if len(pure) == 1 else frozenset()) if others and owned.made else owned.weights
        self.sums.append(Sum(owned, (user,), factors, weights, owned.features | self._all_features(operands)))

    def _is_chosen(self, owned: Owned) -> bool:
        while isinstance(owned.origin, Passed):
            owned = self.owned[owned.origin.source]
        return isinstance(owned.origin, ChosenBy)

    def _through(self, node: fx.Node, relation: r.Relation, x: r.Operand, owned: Owned) -> frozenset[int] | None:
        """Return the dims of the result along which the entry differs; None where positions do not stay apart."""
        out, dims = self.facts.values[node][0], owned.dims
        match relation:
            case r.Pointwise() | r.Expanded():
                return frozenset(dim + len(out) - x.ndim for dim in dims)
            case r.Permuted(order=order):
                return frozenset(order.index(dim) for dim in dims)
            case r.Regrouped():
                return _regrouped(x.exprs, out, dims)
            case r.Repeated(times=times):
                ahead = len(times) - x.ndim
                return frozenset(d + ahead for d in dims) if all(times[d + ahead] == 1 for d in dims) else None
            case r.Sliced(dim=dim) | r.Parted(dim=dim) | r.Halved(dim=dim) if dim not in dims:
                return dims
            case r.Picked(dim=dim) if dim not in dims:
                return frozenset(d - (d > dim) for d in dims)
            case r.Indexed(x=taken, dim=dim, index=index) if taken.node is x.node:
                more = index.ndim - 1
                moved = [range(d, d + more + 1) if d == dim else (d + more * (d > dim),) for d in dims]
                return frozenset(d for each in moved for d in each)
            case r.SameDims(pinned=pinned, absent=absent, dropped=dropped, keepdim=keepdim):
                if dims & {*pinned, *absent, *dropped}:
                    return None
                return dims if keepdim else frozenset(d - sum(gone < d for gone in dropped) for d in dims)
            case r.Pattern(operands=operands, chosen=chosen):
                keys, result = keys_of(relation)
                own = keys[[o.node for o in operands].index(x.node)]
                if any(own[d] not in result for d in dims) or any(name in own for name in chosen):
                    return None
                return frozenset(result.index(own[d]) for d in dims)
        return None


def _factors(exprs: Exprs) -> Iterator[tuple[int, Expr]]:
    for dim, expr in enumerate(exprs):
        for factor in expr.factors if isinstance(expr, Product) else (expr,):
            if factor != UNIT:
                yield dim, factor


def _regrouped(before: Exprs, after: Exprs, dims: frozenset[int]) -> frozenset[int] | None:
    """Return the dims that the entries of `dims` are in after a view; None where axes were cut."""
    old, new = list(_factors(before)), list(_factors(after))
    if [factor for _, factor in old] != [factor for _, factor in new]:
        return None
    return frozenset(b for (a, _), (b, _) in zip(old, new, strict=True) if a in dims)


def _factors_beside(relation: r.Relation | None, node: fx.Node) -> tuple[r.Operand, ...]:
    """Return the operands that a product multiplies one operand with; none if the op is another."""
    if not isinstance(relation, r.Pattern) or relation.apart or relation.attention:
        return ()
    pattern = bind(relation.spec, len(relation.operands), tuple(relation.sizes))
    factors = [o for term, o in zip(pattern.operands, relation.operands, strict=True) if not term.added]
    others = tuple(o for o in factors if o.node is not node)
    return others if len(others) == len(factors) - 1 else ()


def _repeated(relation: r.Relation | None) -> set[int]:
    """Return the dims along which an index repeats itself."""
    match relation:
        case r.Expanded(x, like) if like is None:
            return {d for d, expr in enumerate(x.exprs) if expr == UNIT}
    return set()


def _linear_in(relation: r.Relation, mine: Sequence[tuple[r.Operand, Owned]]) -> frozenset[str]:
    """Return the parameters of owned operands in which the result of an op is linear, all of them together."""
    every = frozenset[str]().union(*(owned.weights for _, owned in mine))
    match relation:
        case r.Pointwise(_, "copy" | "linear" | "affine"):
            return every
        case r.Pointwise((first, *_), "quotient"):
            return every if [x.node for x, _ in mine] == [first.node] else frozenset()
        case r.Pointwise(_, "product") | r.Pattern(apart=False):
            pattern = bind(relation.spec, len(relation.operands)) if isinstance(relation, r.Pattern) else None
            terms = () if pattern is None else zip(relation.operands, pattern.operands, strict=True)
            added = {o.node for o, term in terms if term.added}
            factors = [owned for x, owned in mine if x.node not in added]
            pure = [owned for owned in factors if not owned.made]
            many = pure if len(factors) > 1 else factors
            of_product = many[0].weights if len(many) == 1 else frozenset[str]()
            return of_product.union(*(owned.weights for x, owned in mine if x.node in added))
        case r.Pattern(rescaled=x) if x is not None:
            return every
        case r.SameDims(pinned=(), absent=(), apart=False):
            return every
        case _:
            return every if r.moved_operand(relation) is not None else frozenset()
