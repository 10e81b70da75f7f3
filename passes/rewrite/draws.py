"""Draws: random numbers that a masked call draws, drawn again for the entries that a shrunk one has left.

    SameDraws(axis_facts, kept, sizes)
      -> call         runs an op of the masked call, and remembers its arguments if it draws
      -> stand_ins    a function for each op that drew, for `rewrite` to call in its place

A generator fills a smaller tensor with other numbers. So an op that draws runs at its original sizes in the shrunk
call too, from the state that the generator had in the masked call, and its result is cut to the entries that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ecospa_fx.passes.axes.algebra import sized
from ecospa_fx.passes.axes.selection import Selection
from ecospa_fx.passes.graph.nodes import argument_nodes, by_name, may_draw, tensor_meta
from ecospa_fx.passes.ir.axis_facts import AxisFacts, Exprs

from .stored import StateLayout, compressed, layout

StandIn: TypeAlias = "Callable[[Any], Callable[..., Any]]"  # the op of the rewritten graph -> the function in its place


@dataclass(frozen=True, eq=False)
class _Drawn:
    """An op that has drawn: its arguments by name, and the generators in the states that they had before."""

    arguments: dict[str, Any]
    states: list[tuple[torch.Generator, Tensor]]


class SameDraws:
    """The draws of one masked call, for the shrunk call that is compared with it.

    Args:
        axis_facts: axes of the captured graph.
        kept: the selection.
        sizes: the dynamic sizes of the call.
    """

    def __init__(self, axis_facts: AxisFacts, kept: Selection, sizes: Mapping[Any, int]) -> None:
        self._axis_facts, self._kept, self._sizes = axis_facts, kept, sizes
        self._drawn: dict[fx.Node, _Drawn] = {}

    def call(self, node: fx.Node, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an op of the masked call; remember its arguments if it draws."""
        if not may_draw(node.target):
            return run(node.target, args, kwargs)
        copies = _copied((args, kwargs))
        before = [(generator, generator.get_state()) for generator in _generators(node, (args, kwargs))]
        result = run(node.target, args, kwargs)
        if any(not torch.equal(generator.get_state(), state) for generator, state in before):
            self._drawn[node] = _Drawn(by_name(node.target, *copies), before)
        return result

    def stand_ins(self) -> dict[fx.Node, StandIn]:
        """Return a stand-in for each op that drew."""
        return {node: self._stand_in(node, drawn) for node, drawn in self._drawn.items()}

    def _stand_in(self, node: fx.Node, drawn: _Drawn) -> StandIn:
        operands = iter(self._axis_facts.operands.get(node, ()))
        layouts = iter([
            self._layout(operand.exprs) if tensor_meta(arg) and (operand := next(operands, None)) else None
            for arg in argument_nodes(node)
        ])  # fmt: skip
        layout_of: Any = lambda _: next(layouts)  # noqa: E731
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), layout_of)
        target: Any = node.target
        left = by_name(target, args, kwargs)
        results = [self._layout(exprs) for exprs in self._axis_facts.values.get(node, ())]

        def in_place_of(op: Any) -> Callable[..., Any]:
            def same_draw(*args: Any, **kwargs: Any) -> Any:
                own = op(*(copies := _copied((args, kwargs)))[0], **copies[1])  # its sizes must be right too
                given = by_name(op, args, kwargs)
                whole = {name: _whole(v, given.get(name), left.get(name)) for name, v in drawn.arguments.items()}
                for generator, state in drawn.states:
                    generator.set_state(state)
                result = target(**{**given, **whole})
                written = dict(_written(target, whole, given, left))
                outputs, spec = pytree.tree_flatten(result)
                cuts = results or [None] * len(outputs)
                cut = [
                    written[id(output)] if id(output) in written else _cut(output, each)
                    for output, each in zip(outputs, cuts, strict=True)
                ]
                same_sizes = [t.shape for t in cut] == [t.shape for t in pytree.tree_leaves(own)]
                return pytree.tree_unflatten(cut, spec) if same_sizes else own

            return same_draw

        return in_place_of

    def _layout(self, exprs: Exprs) -> StateLayout | None:
        return layout([sized(expr, self._sizes) for expr in exprs], self._kept)


def _copied(arguments: Any) -> Any:
    return pytree.tree_map_only(Tensor, _copy, arguments)


def _copy(tensor: Tensor) -> Tensor:
    """Copy a tensor and its layout: the numbers of a generator go into a tensor in the order of its memory."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided or any(
        not st and n > 1 for n, st in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        return tensor.clone()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _generators(node: fx.Node, arguments: Any) -> list[torch.Generator]:
    """Return the generators that an op may draw from: those of its devices, and those that it is given."""
    metas = [meta for each in (node, *argument_nodes(node)) for meta in tensor_meta(each)]
    cuda = {meta.device.index or 0 for meta in metas if meta.device.type == "cuda"}
    given = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Generator)]
    return [torch.default_generator, *(torch.cuda.default_generators[index] for index in sorted(cuda)), *given]


def _whole(whole: Any, given: Any, left: Any) -> Any:
    """Return an argument at its original sizes, with the entries that are given in their places.

    The others are those of the masked call, and so is the layout in memory: an op may pick another one at other sizes.
    Of the numbers, integers count entries; a shrink rewrites them.
    """
    if isinstance(whole, (list, tuple)):
        if not any(isinstance(item, Tensor) for item in whole):
            return whole
        return [_whole(*each) for each in zip(whole, given, left, strict=True)]
    if not isinstance(whole, Tensor):
        return given if isinstance(whole, float) else whole
    if left is None:
        return given if given.shape != whole.shape or given.stride() == whole.stride() else _copy(whole).copy_(given)
    if list(given.shape) != left.shape_left(whole.shape):  # a source, selected for its use together with a context
        return whole
    full = _copy(whole)
    full[left.mask.to(full.device).expand(full.shape)] = given.flatten()
    return full


def _cut(tensor: Any, left: StateLayout | None) -> Any:
    return tensor if left is None else compressed(tensor, left)


def _written(
    op: Any, whole: Mapping[str, Any], given: Mapping[str, Any], left: Mapping[str, Any]
) -> Iterator[tuple[int, Tensor]]:
    """Write what an op in place has left at original sizes into the tensors that are given; yield these by identity."""
    for argument in op._schema.arguments:
        value = whole.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
            if value is not given[argument.name]:
                given[argument.name].copy_(_cut(value, left.get(argument.name)))
            yield id(value), given[argument.name]
