"""Rewrite: the graph of a region at the sizes that a plan leaves.

    rewrite(axis_facts, kept, region)
      -> _copy            the captured graph, with inputs and constants as arguments
      -> NothingLeft      where all of a coupling has gone, ops whose results are constants then are left out
      -> select_sources   values that depend on no parameter are index-selected where they are used
      -> resize           sizes in arguments become counts, bounds become prefix sums (one `resize` per rule)
      -> _bind            parameters are read from the live region; its nn.Linears are called as modules
      -> Program          Python code that runs with the region as `self`

Every rewrite starts from the captured graph at original sizes, so shrinking twice is shrinking once by the composition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from ecospa_fx.errors import RuleError
from ecospa_fx.passes.axes.algebra import Size, as_size
from ecospa_fx.passes.axes.selection import Selection, count, in_first_contexts, touched
from ecospa_fx.passes.capture.hooks import calls_itself
from ecospa_fx.passes.graph.boundary_op import edge
from ecospa_fx.passes.graph.nodes import op_name, place
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.guards import setting_read
from ecospa_fx.passes.ir.numbers import put_number
from ecospa_fx.passes.ir.op_site import OpSite
from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.ir.same_settings import same_settings
from ecospa_fx.passes.objects.live_calls import go_live, pass_edges
from ecospa_fx.passes.rules import op_info

from .constants import find_constants
from .draws import StandIn
from .generate import generate
from .nothing_left import NothingLeft
from .program import Program
from .sources import select_sources

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Tap:
    """A function that stands between a value and some ops that take it, such as one that reads the gradient there.

    Attributes:
        node: the node of the captured graph that makes the value.
        users: nodes that take it from the tap; others take the value itself.
        function: takes the value, and returns one that equals it.
    """

    node: fx.Node
    users: tuple[fx.Node, ...]
    function: Callable[[torch.Tensor], torch.Tensor]


def rewrite(
    axis_facts: AxisFacts,
    kept: Selection,
    region: nn.Module,
    watched: Sequence[fx.Node] = (),
    live: bool = True,
    stand_ins: Mapping[fx.Node, StandIn] = MappingProxyType({}),
    taps: Sequence[Tap] = (),
) -> Program:
    """Generate the program of a region under a selection.

    Args:
        axis_facts: axes of the captured graph.
        kept: the entries of each atom that stay.
        region: the live region; only the types of its modules matter.
        watched: nodes of the captured graph whose values `run` returns after the outputs.
        live: methods of objects are called, not computed as they were traced; `run` takes the objects then.
        stand_ins: makes, for nodes of the captured graph, a function to call in place of the op at the sizes left.
        taps: functions that values pass through on their way to some ops.

    Raises:
        RuleError: the `resize` of a rule failed.
    """
    captured = axis_facts.captured
    graph, new, objects, constants = _copy(captured, live)
    left = NothingLeft(axis_facts, graph, new, find_constants(axis_facts, kept), _sizes_now(axis_facts, kept), live,
                       watched)  # fmt: skip
    if left.known:
        left.put_constants()
    constants |= select_sources(graph, axis_facts, kept, new, {*left.known, *left.parts})
    constants |= _number_inputs(captured, graph, new)
    for original, node in new.items():
        if original in left.known or original in left.parts:
            continue
        rule = op_info(original.target)
        if rule is None or rule.resize is None or original not in axis_facts.operands:
            continue
        axes = (*axis_facts.values[original], *(o.exprs for o in axis_facts.operands[original]))
        if not any(touched(expr, kept) for exprs in (*axes, axis_facts.made.get(original, ())) for expr in exprs):
            continue
        site = OpSite(node, original, axis_facts, kept)
        try:
            rule.resize(site)
        except Exception as error:
            raise RuleError(
                f"the sizes of {op_name(original)} ({place(original, captured.region)}) cannot follow a shrink: its "
                f"rule failed with {type(error).__name__}: {error}; this is a bug in the rule, nothing was changed"
            ) from error
        site.apply()
    for original, stand_in in stand_ins.items():
        if original not in left.known:
            new[original].target = stand_in(new[original].target)
    sizes = _sizes_held(axis_facts, kept)
    if live:
        go_live(captured.carried, graph, new, objects, sizes)
    else:
        pass_edges(graph, new)
    if watched:
        output = next(node for node in reversed(graph.nodes) if node.op == "output")
        output.args = ((*output.args[0], *(new[node] for node in watched)),)
    _insert([tap for tap in taps if tap.node not in left.known], graph, new)
    if left.known:
        left.erase()
    _bind(captured, region, graph, new)
    run, source, results = generate(graph)
    results = results[: len(results) - len(watched)]
    called = frozenset(node.target for node in graph.nodes if node.op == "call_module")
    by_name = {node.name: node for node in captured.graph.nodes if node.op == "placeholder"}
    called_with = tuple(
        tuple(sizes(by_name[name])) if by_name[name] in axis_facts.values else shape
        for name, (_, _, shape) in zip(captured.inputs, captured.signature.tensors, strict=True)
    )
    settings = [setting_read(path, name, value) for (path, name), value in captured.settings.items()]
    return Program(
        captured, axis_facts, run, tuple(constants.values()), source, called, called_with, results,
        same_settings([*settings, *captured.reads]),
    )  # fmt: skip


def _insert(taps: Sequence[Tap], graph: fx.Graph, new: Mapping[fx.Node, fx.Node]) -> None:
    """Lead values through taps, through one after another where several stand at one place."""
    through: dict[tuple[fx.Node, fx.Node], fx.Node] = {}  # (value, user) -> the last tap between them
    for tap in taps:
        value = new[tap.node]
        groups: dict[fx.Node, set[fx.Node]] = {}
        for user in (new[user] for user in tap.users if user in new):
            given = through.get((value, user), value)
            if given in user.all_input_nodes:  # else it takes something made of it, at the sizes left
                groups.setdefault(given, set()).add(user)
        for given, users in groups.items():
            with graph.inserting_before(next(node for node in graph.nodes if node in users)):
                call = graph.call_function(tap.function, (given,))
            for user in users:
                user.replace_input_with(given, call)
                through[value, user] = call


def _sizes_now(axis_facts: AxisFacts, kept: Selection) -> Callable[[fx.Node], Sequence[Size]]:
    uniform = in_first_contexts(kept)

    def sizes(node: fx.Node) -> Sequence[Size]:
        if node in axis_facts.values:
            return [count(expr, uniform) for expr in axis_facts.values[node][0]]
        return [as_size(size) for size in node.meta["val"].shape]

    return sizes


def _sizes_held(axis_facts: AxisFacts, kept: Selection) -> Callable[[fx.Node], Sequence[Size]]:
    """Return the sizes of tensors in objects: one entry stands where none is left, see `nothing_left.py`."""
    sizes = _sizes_now(axis_facts, kept)

    def held(node: fx.Node) -> Sequence[Size]:
        of_an_object = node.target is edge or node.name in axis_facts.captured.state
        return [1 if size == 0 else size for size in sizes(node)] if of_an_object else sizes(node)

    return held


def _copy(
    captured: RegionGraph, live: bool
) -> tuple[fx.Graph, dict[fx.Node, fx.Node], list[fx.Node], dict[fx.Node, Any]]:
    """Copy the captured graph into one that takes inputs, objects, then constants.

    Returns:
        The copy, node of the captured graph -> node of the copy, and the placeholders of objects and of constants.
    """
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    constants: dict[fx.Node, Any] = {}
    by_name = {node.name: node for node in captured.graph.nodes if node.op in ("placeholder", "get_attr")}
    for name in captured.inputs:
        new[by_name[name]] = graph.placeholder(name)
    objects = [graph.placeholder(f"held_{i}") for i in range(len(captured.carried.types) if live else 0)]
    for name, value in captured.constants.items():
        new[by_name[name]] = node = graph.placeholder(name)
        constants[node] = value
    for name, tensor in captured.tensors.items():
        if by_name[name].users:
            new[by_name[name]] = graph.get_attr(tensor)
    for node in captured.graph.nodes:
        if node not in new and node.op not in ("placeholder", "get_attr"):
            new[node] = graph.node_copy(node, new.__getitem__)
    return graph, new, objects, constants


def _number_inputs(captured: RegionGraph, graph: fx.Graph, new: dict[fx.Node, fx.Node]) -> dict[fx.Node, Any]:
    """Make arguments of the numbers that change from call to call; return placeholder -> the value at capture."""
    by_name = {old.name: node for old, node in new.items()}
    numbers: dict[fx.Node, Any] = {}
    for i, number in enumerate(captured.numbers):
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            placeholder = graph.placeholder(f"number_{i}")
        numbers[placeholder] = number.read.value
        for name, position in number.places:
            node = by_name[name]
            node.args, node.kwargs = put_number((node.args, node.kwargs), position, placeholder)
    return numbers


def _bind(captured: RegionGraph, region: nn.Module, graph: fx.Graph, new: dict[fx.Node, fx.Node]) -> None:
    """Call the region's own nn.Linears, so that later hooks and wrappers on them work; erase unused attributes."""
    for node in list(graph.nodes):
        if node.target is not aten.linear.default:
            continue
        weight, bias = node.args[1], (*node.args, None)[2]
        if weight.op != "get_attr" or (bias is not None and bias.op != "get_attr"):
            continue
        path = weight.target.rpartition(".")[0]
        module = region.get_submodule(path)
        names = (f"{path}.weight", f"{path}.bias" if getattr(module, "bias", None) is not None else None)
        unhooked = path not in captured.hooked  # else its hooks would run twice
        if unhooked and calls_itself(module) and names == (weight.target, bias.target if bias else None):
            with graph.inserting_before(node):
                call = graph.call_module(path, (node.args[0],))
            node.replace_all_uses_with(call)
            graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
