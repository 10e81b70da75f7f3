"""Masked graph: the definition of removal, as an experiment at original sizes.

    masked(axis_facts, kept, inputs) -> an interpreter of the captured graph
      -> _contraction_masks   at every contraction over an axis, the removed entries count as zero
      -> _OverWhatIsLeft      at every other reduction over it (an average, a norm, a softmax) they are absent: the op
                              runs on the entries that stay, and its results go back to where these entries were

Positions along an axis (an argmax, the indices of a top-k) come out as those that the entries have at original sizes,
so all that is counted or picked by them is right there too. It computes what a smaller model of the same class does.
Nothing else may read a removed entry, so the places of removed entries in results hold a number that no common function
is infinite at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ecospa_fx.passes.axes.algebra import Atom, Expr, atoms_of, sized
from ecospa_fx.passes.axes.selection import (
    PerContext,
    Selected,
    Selection,
    broadcast_mask,
    in_context,
    index_of,
    mask_of,
    touched,
)
from ecospa_fx.passes.graph.nodes import argument_nodes, is_tensor, tensor_meta, written_arguments
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.op_site import OpSite
from ecospa_fx.passes.ir.relations import positions
from ecospa_fx.passes.rules import op_info

NOWHERE = 0.5  # in place of removed entries: log, sqrt, 1 / x, atanh and the like are finite, with their gradients


class Masked(fx.Interpreter):
    """Interpreter of a captured graph in which removed entries do not take part.

    Attributes:
        masks: node -> (index among its node arguments, mask that broadcasts over this argument).
        reductions: node -> how it runs over what is left.
    """

    masks: Mapping[str, Sequence[tuple[int, Tensor]]]
    reductions: Mapping[str, _OverWhatIsLeft]

    def run_node(self, n: fx.Node) -> Any:
        """Run one node without the entries that are removed."""
        masks, reduction = self.masks.get(n.name, ()), self.reductions.get(n.name)
        if not masks and reduction is None:
            return super().run_node(n)
        values = [self.env[arg] for arg in argument_nodes(n)]
        for occurrence, mask in masks:
            values[occurrence] = values[occurrence].masked_fill(~mask.to(values[occurrence].device), 0)
        if reduction is not None:
            return reduction.run(values)
        waiting = iter(values)
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda _: next(waiting))
        return getattr(self, n.op)(n.target, args, kwargs)


def masked(axis_facts: AxisFacts, kept: Selection, inputs: Sequence[Tensor]) -> type[Masked]:
    """Return the interpreter that runs a call with `inputs` as if the entries that `kept` lacks did not take part."""

    class Here(Masked):
        masks = _contraction_masks(axis_facts, kept, inputs)
        reductions = _reductions(axis_facts, kept, inputs)

    return Here


def _contraction_masks(
    axis_facts: AxisFacts, kept: Selection, inputs: Sequence[Tensor]
) -> dict[str, list[tuple[int, Tensor]]]:
    """Return the masks, by node, that make removed entries zero in every contraction of a call with `inputs`."""
    sizes = axis_facts.captured.signature.dynamic_sizes(inputs)
    masks: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for fact in axis_facts.facts:
        if fact.role != "contracted" or not touched(fact.expr, kept):
            continue
        # Masking one operand is enough: the other's entries are then multiplied by zero.
        node = fact.node
        occurrences = [i for i, arg in enumerate(argument_nodes(node)) if tensor_meta(arg)]
        for occurrence, operand in zip(occurrences, axis_facts.operands[node], strict=True):
            # A grouped convolution contracts a factor of a dim: the mask is that of the dim under these atoms alone.
            atoms = set(atoms_of(fact.expr))
            alone = {atom: kept[atom] for atom in atoms if atom in kept}
            dims = [dim for dim, expr in enumerate(operand.exprs) if atoms <= set(atoms_of(expr))]
            if dims and operand.node in [o.node for o in fact.operands]:
                # Other dims along the same axis lose these entries as well.
                axes = [sized(expr, sizes) for expr in operand.exprs]
                masks[node.name].extend((occurrence, broadcast_mask(axes, dim, alone)) for dim in dims)
                break
    return masks


def _reductions(axis_facts: AxisFacts, kept: Selection, inputs: Sequence[Tensor]) -> dict[str, _OverWhatIsLeft]:
    """Return, by node, the reductions over selected axes in which removed entries are absent."""
    sizes = axis_facts.captured.signature.dynamic_sizes(inputs)
    absent: dict[fx.Node, dict[Atom, Selected]] = defaultdict(dict)
    for fact in axis_facts.facts:
        if fact.role == "reduced":
            absent[fact.node].update({atom: kept[atom] for atom in atoms_of(fact.expr) if atom in kept})
    return {node.name: _OverWhatIsLeft(axis_facts, node, left, sizes) for node, left in absent.items() if left}


@dataclass(frozen=True)
class _OverWhatIsLeft:
    """One op that runs on the entries that stay along the axes that it reduces; other axes keep all entries.

    Attributes:
        axis_facts: axes of the captured graph.
        node: the op.
        left: the entries that stay.
        sizes: the dynamic sizes of the call.
    """

    axis_facts: AxisFacts
    node: fx.Node
    left: Mapping[Atom, Selected]
    sizes: Mapping[Any, int]

    def run(self, values: Sequence[Any]) -> Any:
        """Run the op on the values of its arguments, at original sizes, and return results at original sizes."""
        node, given = self.node, list(values)
        tensors = [i for i, arg in enumerate(argument_nodes(node)) if is_tensor(arg)]
        for i, operand in zip(tensors, self.axis_facts.operands[node], strict=True):
            for dim, index in self._indices(operand.exprs):
                given[i] = given[i].gather(dim, _as_large_as(index, given[i], dim))
        result = fx.Interpreter(nn.Module(), graph=self._alone()).run(*given)
        for i, operand in zip(tensors, self.axis_facts.operands[node], strict=True):
            if argument_nodes(node)[i] in written_arguments(node) and given[i] is not values[i]:
                values[i].copy_(self._put_back(given[i], operand.exprs))
        result = self._at_original_positions(result)
        outputs = self.axis_facts.values[node]
        if isinstance(result, Tensor):
            return self._put_back(result, outputs[0])
        return tuple(self._put_back(*each) for each in zip(result, outputs, strict=True))

    def _at_original_positions(self, result: Any) -> Any:
        """Turn positions among the entries that stay, in one of the results, into those among all."""
        found = positions(self.axis_facts.relations[self.node])
        if found is None:
            return result
        number, x, dim = found
        index = dict(self._indices(self.axis_facts.resolve(x.exprs))).get(dim)
        if index is None:
            return result
        places: Tensor = result if isinstance(result, Tensor) else result[number]
        aligned = places if places.ndim == x.ndim else places.unsqueeze(dim)
        sizes = [index.shape[d] if d == dim else size for d, size in enumerate(aligned.shape)]
        whole = index.to(places.device).expand(sizes).gather(dim, aligned).view_as(places)
        return whole if isinstance(result, Tensor) else tuple(whole if i == number else r for i, r in enumerate(result))

    def _alone(self) -> fx.Graph:
        """Make a graph of the op alone, with the sizes among its arguments written anew by its rule."""
        graph, info = fx.Graph(), op_info(self.node.target)
        places = [graph.placeholder(f"value_{i}") for i, _ in enumerate(argument_nodes(self.node))]
        for place, arg in zip(places, argument_nodes(self.node), strict=True):
            place.meta = arg.meta
        waiting = iter(places)
        op = graph.node_copy(self.node, lambda _: next(waiting))
        if info is not None and info.resize is not None:
            site = OpSite(op, self.node, self.axis_facts, self.left)
            info.resize(site)
            site.apply()
        graph.output(op)
        return graph

    def _put_back(self, result: Tensor, exprs: Sequence[Expr]) -> Tensor:
        """Put results back to where the entries that stay were."""
        for dim, index in reversed(self._indices(exprs)):
            shape = list(result.shape)
            shape[dim] = len(mask_of(sized(exprs[dim], self.sizes), {}))
            whole = result.new_full(shape, NOWHERE if result.is_floating_point() else 0)
            result = whole.scatter(dim, _as_large_as(index, result, dim), result)
        return result

    def _indices(self, exprs: Sequence[Expr]) -> list[tuple[int, Tensor]]:
        """Return each dim that has lost entries, with the positions that stay in a shape that broadcasts.

        Dims that keep other entries in each entry of another dim come first, while that one is whole.
        """
        exprs = [sized(expr, self.sizes) for expr in exprs]
        uniform, varying = [], []
        for dim, expr in enumerate(exprs):
            contexts = {c.context for a in atoms_of(expr) if isinstance(c := self.left.get(a), PerContext)}
            shape = [1] * len(exprs)
            if contexts <= set(atoms_of(expr)):
                index = mask_of(expr, self.left).nonzero().flatten()
                shape[dim] = len(index)
                uniform += [(dim, index.view(shape))] if touched(expr, self.left) else []
                continue
            (context,) = contexts
            along = next(d for d, other in enumerate(exprs) if context in atoms_of(other))
            rows = [in_context(self.left, context, entry) for entry in index_of(exprs[along], context).tolist()]
            index = torch.stack([mask_of(expr, row).nonzero().flatten() for row in rows])
            shape[along], shape[dim] = index.shape
            varying.append((dim, (index if along < dim else index.T).reshape(shape)))
        return [*varying, *uniform]


def _as_large_as(index: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """Repeat an index along all dims but the one that it picks from."""
    return index.to(tensor.device).expand([index.shape[d] if d == dim else size for d, size in enumerate(tensor.shape)])
