"""Trial of joints: the model's own Python between its regions, run at the sizes that a shrink would leave there.

    not_followed(model, ..., joined) -> the joints that it does not follow, with the reasons

A forward in which regions only hand out what they returned, without the entries that would be gone, must run the same
ops between them, on the same tensors, with the same numbers but for sizes, and these as the axes say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ecospa_fx.passes.axes.algebra import Atom
from ecospa_fx.passes.axes.selection import count, touched
from ecospa_fx.passes.capture.between import Between, ForwardPath, follow_between
from ecospa_fx.passes.capture.uniform import with_sizes
from ecospa_fx.passes.graph.nodes import by_name, op_name, place, tensor_meta
from ecospa_fx.passes.graph.tensors import sliced
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Exprs
from ecospa_fx.passes.ir.border import WeightDim
from ecospa_fx.passes.ir.op_site import OpSite
from ecospa_fx.passes.rules import op_info

from .joint import BETWEEN, Across

Kept = Mapping[Atom, Tensor]


def not_followed(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    between: Between,
    joined: Across,
    tensors: Mapping[str, Tensor],
    path: ForwardPath,
) -> dict[WeightDim, str]:
    """Return the joints that the Python between regions does not follow, by their first member, with the reason.

    Args:
        model: the model.
        args: positional arguments of the forward that `between` has seen.
        kwargs: keyword arguments of it.
        between: what it ran between its regions.
        joined: the joints.
        tensors: parameters and buffers of the model by name.
        path: the forward that `between` is.
    """
    trial = _Trial(model, args, kwargs, between, joined, tensors, path)
    every = list(range(len(joined.joints)))
    if not every or trial.difference(every) is None:
        return {}
    reasons = {}
    for number in every:
        why = trial.difference([number]) if len(every) > 1 else trial.difference(every)
        if why is not None:
            reasons[joined.joints[number].members[0]] = why
    if reasons:
        return reasons
    together = trial.difference(every)
    return {joint.members[0]: str(together) for joint in joined.joints}


@dataclass(frozen=True, eq=False)
class _Trial:
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    between: Between
    joined: Across
    tensors: Mapping[str, Tensor]
    path: ForwardPath

    def difference(self, numbers: Sequence[int]) -> str | None:
        """Say how the Python between the regions differs from what the axes say, with some joints shrunk."""
        # Of another size each, so that one cannot pass for another.
        masks = {n: _without(self.joined.joints[n].size, 1 + i) for i, n in enumerate(numbers)}
        left = {n: mask.nonzero().flatten() for n, mask in masks.items()}
        kept = {atom: masks[n] for n in numbers for where, _, atom in self.joined.places[n] if where == BETWEEN}
        positions: dict[str, dict[int, Tensor]] = {}
        for n in numbers:
            for name, dim in (*self.joined.joints[n].outside, *self._used_between(n)):
                positions.setdefault(name, {})[dim] = left[n]
        small = {name: sliced(self.tensors[name], dims) for name, dims in positions.items()}

        def instead(number: int, fake: Callable[[Tensor], Tensor]) -> Any:
            if number >= len(self.between.calls):
                raise _Differs("it calls more regions")
            call = self.between.calls[number]
            edges = self.joined.edges.get(call.region, {})
            results = iter(range(len(call.results)))

            def cut(tensor: Tensor) -> Tensor:
                i = next(results)
                dims = {
                    dim: left[of]
                    for (kind, which, dim), of in edges.items()
                    if (kind, which) == ("result", i) and of in left
                }
                if tensor.is_meta or type(tensor) is not Tensor:
                    shape = [len(dims[d]) if d in dims else n for d, n in enumerate(tensor.shape)]
                    with unset_fake_temporarily():
                        made = torch.empty(shape, dtype=tensor.dtype, device="meta")
                    return fake(made)
                return sliced(tensor, dims).clone()

            leaves, spec = call.returned
            return pytree.tree_unflatten([cut(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

        try:
            after = follow_between(
                self.model, self.args, self.kwargs, self.joined.analyses, path=self.path, tensors=small,
                instead=instead,
            )  # fmt: skip
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            return f"the model's own Python between its regions does not follow: {type(error).__name__}: {line}"
        try:
            _compare(self.between, after, self.joined.between, kept)
        except _Differs as error:
            return f"the model's own Python between its regions does not follow: {error}"
        return None

    def _used_between(self, number: int) -> Iterator[WeightDim]:
        """Yield the dims along a joint of weights that ops between regions use."""
        atoms = {atom for where, _, atom in self.joined.places[number] if where == BETWEEN}
        for name, exprs in self.joined.between.parameters.items():
            yield from ((name, dim) for dim, expr in enumerate(exprs) if expr in atoms)


class _Differs(Exception):
    """The ops between regions are others than expected."""


def _without(size: int, fewer: int) -> Tensor:
    """Make a mask without the first entries, of which one stays."""
    mask = torch.ones(size, dtype=torch.bool)
    mask[: min(fewer, size - 1)] = False
    return mask


def _compare(before: Between, after: Between, axis_facts: AxisFacts, kept: Kept) -> None:
    """Compare what ran between regions after a shrink with what should.

    Raises:
        _Differs: it is something else.
    """
    if [call.region for call in before.calls] != [call.region for call in after.calls]:
        raise _Differs("it calls other regions")
    expected, new = _resized(before, axis_facts, kept)
    same: dict[fx.Node, fx.Node] = {}
    for mine, theirs in zip(before.calls, after.calls, strict=True):
        same.update((new[a], b) for a, b in zip(mine.results, theirs.results, strict=True))
    names = {name: node for node, name in _weights(after).items()}
    same.update((new[node], names[name]) for node, name in _weights(before).items() if name in names)
    back = {node: old for old, node in new.items()}
    ops = [node for node in expected.nodes if node.op == "call_function"]
    theirs_ops = [node for node in after.captured.graph.nodes if node.op == "call_function"]
    for mine_op, their_op in zip(ops, theirs_ops, strict=False):
        original = back[mine_op]
        here = f"{op_name(original)} ({place(original)})"
        if mine_op.target is not their_op.target:
            raise _Differs(f"{here} is {op_name(their_op)} at other sizes")
        _match(_bound(mine_op), _bound(their_op), same, here)
        same[mine_op] = their_op
        sizes = _sizes(original, axis_facts, kept)
        if sizes != [tuple(m.shape) for m in tensor_meta(their_op)]:
            raise _Differs(f"{here} returns {[tuple(m.shape) for m in tensor_meta(their_op)]} instead of {sizes}")
    if len(ops) != len(theirs_ops):
        raise _Differs(f"it runs {len(theirs_ops)} ops instead of {len(ops)}")
    for mine, theirs in zip(before.calls, after.calls, strict=True):
        for name, node in mine.arguments.items():
            other = theirs.arguments.get(name)
            if (node is None) != (other is None) or (node is not None and same.get(new[node]) is not other):
                raise _Differs(f"`{mine.region}` gets another `{name}`")


def _sizes(node: fx.Node, axis_facts: AxisFacts, kept: Kept) -> list[tuple[int, ...]]:
    """Return the sizes that the results of an op should have."""
    metas = tensor_meta(node)
    if node in axis_facts.values:
        return [_left(exprs, meta.shape, kept) for exprs, meta in zip(axis_facts.values[node], metas, strict=True)]
    source = next((s for s in axis_facts.sources if s.node is node), None)
    return [tuple(meta.shape) if source is None else _left(source.exprs, meta.shape, kept) for meta in metas]


def _left(exprs: Exprs, shape: Sequence[int], kept: Kept) -> tuple[int, ...]:
    return tuple(int(count(e, kept)) if touched(e, kept) else n for e, n in zip(exprs, shape, strict=True))


def _weights(between: Between) -> dict[fx.Node, str]:
    tensors = between.captured.tensors
    return {n: tensors[n.name] for n in between.captured.graph.nodes if n.op == "placeholder" and n.name in tensors}


def _resized(before: Between, axis_facts: AxisFacts, kept: Kept) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Copy the graph between regions, with the arguments that its ops should have after a shrink."""
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in before.captured.graph.nodes:
        if node.op != "output":
            new[node] = graph.node_copy(node, new.__getitem__)
    for original, node in list(new.items()):
        rule = op_info(original.target)
        if rule is None or rule.resize is None or original not in axis_facts.operands:
            continue
        axes = (*axis_facts.values[original], *(o.exprs for o in axis_facts.operands[original]))
        if any(touched(expr, kept) for exprs in (*axes, axis_facts.made.get(original, ())) for expr in exprs):
            site = OpSite(node, original, axis_facts, kept)
            rule.resize(site)
            site.apply()
    for source in axis_facts.sources:
        if any(touched(expr, kept) for expr in source.exprs):
            shape = source.node.meta["val"].shape
            with_sizes(new[source.node], shape, _left(source.exprs, shape, kept))
    return graph, new


def _bound(node: fx.Node) -> Any:
    """Return the arguments of an op, by name where it has a schema, with defaults."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return list(node.args), dict(node.kwargs)
    given = by_name(target, node.args, node.kwargs, defaults=True)
    return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in given.items()}


def _match(mine: Any, theirs: Any, same: dict[fx.Node, fx.Node], here: str) -> None:
    """Match arguments; a tensor from elsewhere is told by where it is first used."""
    leaves, spec = pytree.tree_flatten(mine)
    others, other_spec = pytree.tree_flatten(theirs)
    if spec != other_spec:
        raise _Differs(f"{here} takes other arguments")
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, fx.Node) != isinstance(b, fx.Node):
            raise _Differs(f"{here} takes other arguments")
        if isinstance(a, fx.Node):
            if same.setdefault(a, b) is not b:
                raise _Differs(f"{here} takes another tensor")
        elif a != b and b != -1:
            raise _Differs(f"{here} takes {b} instead of {a}")
