"""Assembly: what torch.export gives of a region, as a `RegionGraph`.

assemble(program, flat, ...)
-> inline, mark_bodies   subgraphs in place, bodies of live calls marked
-> _Placeholders         weights, constants and inputs apart
-> fast_attention        causal masks and repeated keys become arguments
-> clean                 asserts and no-ops out, placeholders sorted by what they hold
-> canonicalise          one op for each thing that can be computed
-> _signature            calls that the graph serves
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from ecospa_fx.passes.axes.algebra import as_size
from ecospa_fx.passes.graph.tensors import named_tensors, same_storage
from ecospa_fx.passes.ir.region_graph import Filled, RegionGraph
from ecospa_fx.passes.ir.signature import Signature, autocast_now, training_flags
from ecospa_fx.passes.ir.size_guards import SizeGuards
from ecospa_fx.passes.ir.state_access import TENSOR
from ecospa_fx.passes.objects.live_calls import mark_bodies
from ecospa_fx.passes.simplify.canonicalise import canonicalise
from ecospa_fx.passes.simplify.clean import clean, settle
from ecospa_fx.passes.simplify.fast_attention import fast_attention
from ecospa_fx.passes.simplify.inline import inline

from .dry_run import DryRun
from .export import Flat
from .hooks import inner_hooks


def assemble(
    program: torch.export.ExportedProgram,
    flat: Flat,
    tensors: Sequence[Tensor],
    region: str,
    dry: DryRun,
    filled: Filled,
) -> RegionGraph:
    """Make the graph of a region out of its exported program.

    Args:
        program: from `export`.
        flat: the module that was exported; it has run.
        tensors: that it was exported with.
        region: name of the region.
        dry: how the region's forward uses the objects of the call.
        filled: see `capture`.
    """
    module, carried = flat.region, flat.carried
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    inline(graph, program.graph_module)
    mark_bodies(graph, len(carried.stored), region)
    placeholders = _Placeholders()
    placeholders.collect(program, graph)
    inputs = placeholders.inputs
    settle(graph, inputs[len(inputs) - len(flat.state) :])
    fast_attention(graph)
    clean(graph)
    canonicalise(graph, placeholders.constants)
    names = placeholders.tensors.values()
    named = named_tensors(module)
    strangers = (
        path
        for path in carried.state
        if path not in dry.written and path not in carried.stored
        and (carried.types[path.number], path.path) not in filled
    )  # fmt: skip
    return RegionGraph(
        region=region,
        graph=graph,
        tensors=placeholders.tensors,
        parameters=frozenset(placeholders.parameters),
        constants=placeholders.constants,
        inputs=tuple(inputs),
        signature=_signature(program, flat, tensors, graph, placeholders),
        sizes={name: named[name].shape for name in names},
        out_spec=flat.out_spec,
        out_leaves=tuple(flat.out_leaves),
        same_storage=same_storage(module, names),
        hooked={path: number for path, number in inner_hooks(module).items() if path not in flat.observe},
        observed=tuple(flat.points),
        assigned=flat.assigned,
        carried=carried,
        strangers=frozenset(strangers),
        filled=filled,
        index_attributes=dry.index_attributes,
    )


@dataclass
class _Placeholders:
    """The placeholders of an exported graph by what they hold; attributes as in `RegionGraph`."""

    tensors: dict[str, str] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)
    constants: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)

    def collect(self, program: torch.export.ExportedProgram, graph: fx.Graph) -> None:
        """Sort the inputs of a program, and the attributes that `graph`, a copy of its graph, gets."""
        for entry in program.graph_signature.input_specs:
            name, target = entry.arg.name, (entry.target or "").removeprefix("region.")
            if entry.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.tensors[name] = target
                if entry.kind is InputKind.PARAMETER:
                    self.parameters.add(name)
            elif entry.kind is InputKind.USER_INPUT:
                self.inputs.append(name)
            else:
                self.constants[name] = program.constants[entry.target]
        for node in graph.nodes:
            if node.op == "get_attr":
                self.constants[node.name] = getattr(program.graph_module, node.target)


def _signature(
    program: torch.export.ExportedProgram,
    flat: Flat,
    tensors: Sequence[Tensor],
    graph: fx.Graph,
    placeholders: _Placeholders,
) -> Signature:
    """Describe the calls that a graph serves: sizes are those that torch.export left dynamic."""
    names, assigned = set(placeholders.inputs), {each.full_name for each in flat.assigned}
    nodes = [node for node in graph.nodes if node.name in names]
    shapes = [tuple(as_size(size) for size in node.meta["val"].shape) for node in nodes]
    symbols = [size for shape in shapes for size in shape if isinstance(size, sympy.Symbol)]
    environment = nodes[0].meta["val"].fake_mode.shape_env if symbols else None
    return Signature(
        flat.spec,
        tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in flat.leaves),
        tuple((tensor.dtype, tensor.device, shape) for tensor, shape in zip(tensors, shapes, strict=True)),
        training_flags(flat.region),
        {symbol: (_number(span.lower), _number(span.upper)) for symbol, span in program.range_constraints.items()},
        autocast_now(),
        SizeGuards.of(
            (environment.replace(guard.expr) for guard in environment.guards) if environment else (), symbols
        ),
        {
            name: node.meta["val"].dtype
            for node in graph.nodes
            if (name := placeholders.tensors.get(node.name)) is not None and name not in assigned
        },
    )


def _number(bound: Any) -> float:
    """Convert a bound of a dynamic dim to a plain number: calls are compared with it, and sympy is slow."""
    return int(bound) if isinstance(bound, (int, sympy.Integer)) else math.copysign(math.inf, 1 if bound > 0 else -1)
