"""Nothing left: the ops that a program leaves out where couplings have lost all of their entries.

    NothingLeft(axis_facts, graph, new, known, ...)    on the copy that becomes a program, see `constants.py`
      -> put_constants    a sum with zeros is its other part; constants are made where ops that stay take them
      -> erase            ops that nothing needs any more go, but for those that draw or write elsewhere

A method of an object that is called live gets one entry in place of none: a cache counts its tokens by what it holds.
Weights that are still there and whose ops have gone get gradients of zeros, see `spent.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ecospa_fx.passes.axes.algebra import Size, as_size
from ecospa_fx.passes.graph.boundary_op import edge
from ecospa_fx.passes.graph.nodes import by_name, is_tensor, may_draw, memory_root, written_arguments
from ecospa_fx.passes.ir import relations as r
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.objects.live_calls import BODY, SIZE_OPS, size_node

from .constants import Constant, Empty, Known
from .spent import spent

aten = torch.ops.aten
_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.add_.Tensor, aten.sub_.Tensor}


@dataclass(eq=False)
class NothingLeft:
    """The parts of a copy of a captured graph that go.

    Attributes:
        axis_facts: axes of the captured graph.
        graph: the copy.
        new: node of the captured graph -> node of the copy; those that go leave it.
        known: the results without entries, and the constants; those that cannot be made leave it.
        sizes: returns the sizes now of the tensor that a node of the captured graph makes.
        live: methods of objects are called, not computed as they were traced.
        needed: nodes whose values somebody wants to see.
        parts: a sum with zeros -> its other part, which stands in its place.
    """

    axis_facts: AxisFacts
    graph: fx.Graph
    new: dict[fx.Node, fx.Node]
    known: dict[fx.Node, Known]
    sizes: Callable[[fx.Node], Sequence[Size]]
    live: bool
    needed: Sequence[fx.Node] = ()
    parts: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _cone: set[fx.Node] = field(default_factory=set)  # all that leads to what is known
    _written: set[fx.Node] = field(default_factory=set)
    _replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)  # node that something stands for -> its original
    _ends: dict[fx.Node, fx.Node] = field(default_factory=dict)  # node in place of a constant -> that constant

    def put_constants(self) -> None:
        """Lead around sums with zeros, and make the constants and empty results that ops which stay take."""
        nodes = list(self.axis_facts.captured.graph.nodes)
        waiting = list(self.known)
        while waiting:
            node = waiting.pop()
            if node not in self._cone:
                self._cone.add(node)
                waiting += node.all_input_nodes
        outside = [node for node in nodes if not self._traced(node)]
        self._written = {memory_root(arg) for node in outside for arg in written_arguments(node)}
        for node in nodes:
            if node.target in _SUMS and node not in self.known:
                self._lead_around(node)
        for node in reversed(nodes):
            if node in self.known:
                self._make(node)
        self._part_results(nodes[-1])

    def _traced(self, node: fx.Node) -> bool:
        """Return whether a node is a part of a method that is called in its place."""
        return self.live and BODY in node.meta and node.target is not edge

    def _root(self, node: fx.Node) -> fx.Node:
        root = memory_root(node)
        while root in self.parts:
            root = memory_root(self.parts[root])
        return root

    def _lead_around(self, node: fx.Node) -> None:
        """Put in place of a sum with zeros its other part, unless something writes into either."""
        left, right = node.args[0], node.args[1]
        in_place = next(written_arguments(node), None) is not None
        if self._zero(right):
            other = left
        elif self._zero(left) and node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
            other = right
        else:
            return
        if not isinstance(other, fx.Node) or not is_tensor(other) or other in self.known:
            return
        a, b = node.meta["val"], other.meta["val"]
        if a.dtype != b.dtype or [*map(as_size, a.shape)] != [*map(as_size, b.shape)]:
            return
        if list(self.sizes(node)) != list(self.sizes(other)):
            return  # the entries that are left of it are selected where it is used
        if not in_place and {node, self._root(other)} & self._written:
            return
        old = self.new[node]
        with self.graph.inserting_before(old):
            value = self.new[other] if in_place else self.graph.call_function(spent, (self.new[other],))
        old.replace_all_uses_with(value)
        self.graph.erase_node(old)
        self.new[node], self.parts[node] = value, other
        if not in_place:
            self._ends[value] = left if other is right else right  # type: ignore[assignment]

    def _zero(self, arg: Any) -> bool:
        constant = self.known.get(arg) if isinstance(arg, fx.Node) else None
        return isinstance(constant, Constant) and constant.zero

    def _make(self, node: fx.Node) -> None:
        """Make a constant or an empty result for the ops that stay and take it; where it cannot be, its op stays."""
        if self._traced(node) or (self.live and node.target is edge and not node.args[3]):
            return
        users = [user for user in node.users if user not in self.known and not self._traced(user)]
        users = [user for user in users if user not in self.parts]
        into = [user for user in node.users if self.live and user.target is edge and not user.args[3]]
        others = [user for user in users if user not in into]
        if not into and not others and node not in self.needed:
            return
        old, known = self.new[node], self.known[node]
        if not is_tensor(node):
            del self.known[node]
            return
        shape = list(self.sizes(node))
        with self.graph.inserting_before(old):
            like = self._tensor_on(node)
            sizes = [size_node(size, self.graph, self.new) for size in shape]
            if like is None or any(type(size) is int and size < 0 for size in sizes):
                del self.known[node]
                return
            dtype = {"dtype": node.meta["val"].dtype}
            if into:
                held = [1 if size == 0 else size for size in sizes]
                one = self.graph.call_function(aten.new_full.default, (like, held, 1), dtype)
                for user in into:
                    self.new[user].replace_input_with(old, one)
            if not others and node not in self.needed:
                return
            if isinstance(known, Empty):
                made = self.graph.call_function(aten.new_full.default, (like, sizes, 0), dtype)
            elif known.bias is None:
                made = self.graph.call_function(aten.new_full.default, (like, sizes, known.value), dtype)
            else:
                made = self._repeated(known, sizes)
            if isinstance(known, Constant) and node.meta["val"].is_floating_point():
                made = self.graph.call_function(spent, (made,))
                self._ends[made] = node
                relations = self.axis_facts.relations
                viewed = any(user.op == "output" or isinstance(relations.get(user), r.Regrouped) for user in others)
                if viewed or self._root(node) in self._written:  # it needs memory of its own, entry by entry
                    made = self.graph.call_function(
                        aten.clone.default, (made,), {"memory_format": torch.contiguous_format}
                    )
        old.replace_all_uses_with(made)
        if node.target is not edge:
            self.new[node] = made
            self._replaced[old] = node

    def _repeated(self, constant: Constant, sizes: Sequence[Any]) -> fx.Node:
        """Repeat a bias along the dims that it has not."""
        assert constant.bias is not None
        value, own = self.new[constant.bias], list(self.sizes(constant.bias))
        if constant.dims != tuple(range(-len(own), 0)):
            ones: list[Size] = [1] * -min(constant.dims)
            for dim, size in zip(constant.dims, own, strict=True):
                ones[dim] = size
            value = self.graph.call_function(aten.reshape.default, (value, ones))
        return self.graph.call_function(aten.expand.default, (value, list(sizes)))

    def _tensor_on(self, node: fx.Node) -> fx.Node | None:
        """Return a tensor of the region on the device of a result."""
        device = node.meta["val"].device
        for old, new in self.new.items():
            if old.op in ("placeholder", "get_attr") and is_tensor(old) and old.meta["val"].device == device:
                return new
        return None

    def _part_results(self, output: fx.Node) -> None:
        """Copy results that would be tensors of the caller, or twice the same, and were not before."""
        results = [arg for arg in output.args[0] if isinstance(arg, fx.Node)]  # type: ignore[union-attr]
        roots = [self._root(arg) for arg in results]
        for arg, root in zip(results, roots, strict=True):
            if root is memory_root(arg) or (root.op == "call_function" and roots.count(root) == 1):
                continue
            with self.graph.inserting_before(self.new[output]):
                copy = self.graph.call_function(aten.clone.default, (self.new[arg],))
            self.new[output].replace_input_with(self.new[arg], copy)

    def erase(self) -> None:
        """Erase the ops that nothing needs any more, and let the weights that they took depend on what is left."""
        back = {new: old for old, new in self.new.items()}
        weights = [node for node in self.graph.nodes if node.op == "get_attr" and back.get(node) in self._cone]
        marked = self._ancestors(*(node for node in self.graph.nodes if not self._may_go(node, back.get(node))))
        writing = [
            node for node in self.graph.nodes
            if node not in marked and next(written_arguments(node), None)
            and not self._empty(back.get(node, self._replaced.get(node)))
        ]  # fmt: skip
        while True:
            alive = {self._root(back[node]) for node in marked if node in back}
            found = [
                node for node in writing
                if node not in marked and any(self._lives(arg, back, alive) for arg in written_arguments(node))
            ]  # fmt: skip
            if not found:
                break
            marked |= self._ancestors(*found)
        for node in reversed(self.graph.nodes):
            if node not in marked:
                self.graph.erase_node(node)
        for old in [old for old, node in self.new.items() if node not in marked and node.op != "get_attr"]:
            del self.new[old]
        used = self._ancestors(next(reversed(self.graph.nodes)))
        self._spend([node for node in weights if node not in used])

    def _ancestors(self, *nodes: fx.Node) -> set[fx.Node]:
        """Return nodes, and all that leads to them."""
        found: set[fx.Node] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += node.all_input_nodes
        return found

    def _may_go(self, node: fx.Node, old: fx.Node | None) -> bool:
        """Return whether an op may be left out if nothing takes its result."""
        if node.op == "get_attr":
            return False
        if node.op != "call_function" or node.target is edge or (old is not None and old not in self._cone):
            return False
        if old is not None and self._draws(old):
            return False
        if self._empty(old):
            return True
        arithmetic = (*SIZE_OPS, operator.getitem, operator.sub, spent)
        return isinstance(node.target, torch._ops.OpOverload) or node.target in arithmetic

    def _empty(self, node: fx.Node | None) -> bool:
        """Return whether a result has no entries: an op that writes it in place writes nothing."""
        return node is not None and isinstance(self.known.get(node), Empty)

    def _draws(self, node: fx.Node) -> bool:
        """Return whether an op draws from a generator: one that drops entries with probability 0 does not."""
        if not may_draw(node.target) or r.copied_operand(self.axis_facts.relations.get(node)) is not None:
            return False
        first = next(iter(node.all_input_nodes), None)
        if self._empty(first):
            return False
        target: Any = node.target
        return by_name(target, node.args, node.kwargs, defaults=True).get("dropout_p") != 0

    def _lives(self, arg: fx.Node, back: dict[fx.Node, fx.Node], alive: set[fx.Node]) -> bool:
        """Return whether memory that is written to is not only that of ops which may go."""
        root = self._root(back[arg]) if arg in back else memory_root(arg)
        return root.op != "call_function" or root in alive

    def _spend(self, weights: Sequence[fx.Node]) -> None:
        """Let what stands in place of a constant depend on the spent weights that it was made of."""
        parameters = self.axis_facts.captured.parameters
        names = {old.name: new for old, new in self.new.items()}
        spendable = {names[name] for name in parameters if name in names}
        spent_here = {node for node in weights if node in spendable}
        old_of = {node: old for old, node in self.new.items() if node in spent_here}
        for node, constant in self._ends.items():
            if not node.users:
                continue
            above = self._ancestors(constant)
            own = [weight for weight in weights if weight in spent_here and old_of[weight] in above]
            if own:
                node.args = (*node.args, *own)
                continue
            (value,) = node.args
            node.replace_all_uses_with(value)  # type: ignore[arg-type]
            for old in [old for old, new in self.new.items() if new is node]:
                self.new[old] = value  # type: ignore[assignment]
            self.graph.erase_node(node)
