"""Why: the path through a captured graph by which two weights are coupled, as networkx and as text.

Nodes are parameter axes, atoms, the dims of intermediate values, and ops. An op is joined to every dim it touches that
carries the atom; each of those edges keeps the rule and the FX node that made it. `nx.shortest_path` between two
parameter axes is then the explanation.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import networkx as nx
from torch import fx

from ecospa_fx.errors import NoCouplingError
from ecospa_fx.passes.axes.algebra import Atom, Expr, atoms_of
from ecospa_fx.passes.graph.nodes import arguments, op_name, place, source_line
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.rules import op_info

_GETITEM = operator.getitem


@dataclass(frozen=True)
class PathStep:
    """One op on a path between two parameters.

    Attributes:
        op: name of the op.
        where: module and source line.
        before: the axis that enters it.
        after: the axis that leaves it.
        because: the effect of the op on the axis, in words.
        code: source line.
    """

    op: str
    where: str
    before: str
    after: str
    because: str
    code: str = ""

    def __str__(self) -> str:
        return f"{self.before} -> {self.after}: {self.op} at {self.where} ({self.because})"


@dataclass(frozen=True)
class Path:
    """The ops by which an axis gets from one parameter to another."""

    start: str
    end: str
    steps: tuple[PathStep, ...]

    def __str__(self) -> str:
        lines = [f"{self.start} is coupled with {self.end}:"]
        lines += [f"  {number:2}. {sentence}" for number, sentence in enumerate(self.sentences(), 1)]
        return "\n".join(lines)

    def sentences(self) -> Iterator[str]:
        """Yield a sentence per step."""
        for step in self.steps:
            yield f"{step.op} takes it to {step.after}: {step.because} ({step.where})."


@dataclass(frozen=True)
class Why:
    """The couplings of two weights, each with its path through the graph.

    Attributes:
        a: name of one parameter.
        b: name of the other.
        paths: coupling, or axis that cannot shrink -> path through the graph.
        refused: axis that cannot shrink -> the reasons.
    """

    a: str
    b: str
    paths: Mapping[str, Path]
    refused: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        parts = []
        for name, path in self.paths.items():
            if name in self.refused:
                head = f"{path.start} meets {path.end} along {name}, which cannot shrink because"
                reasons = [f"  {reason}" for reason in self.refused[name]]
                steps = str(path).splitlines()[1:]
                parts.append("\n".join([head, *reasons, "They meet so:", *steps]))
            else:
                parts.append(f"{name}: {path}")
        return "\n\n".join(parts)


def axis_graph(axis_facts: AxisFacts, atoms: Collection[Atom] | None = None) -> nx.Graph:
    """Build the graph of the axes of a captured graph and the ops that join them.

    Args:
        axis_facts: the axes.
        atoms: only axes that carry one of these; by default all.

    Returns:
        A graph with node attributes `kind` (`parameter`, `atom`, `axis`, `source`, `op`) and `label`. Edges between ops
        and axes keep `rule` (name of the axis rule) and `node` (the FX node).
    """
    graph = nx.Graph(region=axis_facts.captured.region)
    wanted = None if atoms is None else set(atoms)

    def carries(expr: Expr) -> list[Atom]:
        return [atom for atom in dict.fromkeys(atoms_of(expr)) if wanted is None or atom in wanted]

    region = f"{axis_facts.captured.region}." if axis_facts.captured.region else ""
    tensors = axis_facts.captured.tensors
    names = {
        node: tensors[node.name] for node in axis_facts.values if node.name in tensors and node.op == "placeholder"
    }

    def axis(node: fx.Node, dim: int, output: int = 0, user: fx.Node | None = None) -> Any:
        if node in names:
            key: Any = ("parameter", names[node], dim)
            graph.add_node(key, kind="parameter", label=f"{region}{names[node]}[{dim}]")
        elif user is not None and node not in axis_facts.values:
            # Each use of a source has axes of its own: a table that all layers share does not tie them.
            key = ("source", node.name, user.name, dim)
            graph.add_node(key, kind="source", label=f"{node.name}[{dim}]")
        else:
            if node.target is _GETITEM:
                node, output = arguments(node)
            key = ("axis", node.name, output, dim)
            graph.add_node(key, kind="axis", label=f"{node.name}[{dim}]")
        return key

    for node, outputs in axis_facts.values.items():
        if node.op == "placeholder":
            for dim, expr in enumerate(outputs[0]):
                for atom in carries(expr):
                    graph.add_node(("atom", atom.serial), kind="atom", label=repr(atom))
                    graph.add_edge(axis(node, dim), ("atom", atom.serial), kind="lies on")
            continue
        if node not in axis_facts.operands:
            continue
        rule = op_info(node.target)
        operands = axis_facts.operands[node]
        touched = [axis(o.node, dim, user=node) for o in operands for dim, e in enumerate(o.exprs) if carries(e)]
        touched += [axis(node, dim, i) for i, o in enumerate(outputs) for dim, e in enumerate(o) if carries(e)]
        if touched:
            key = ("op", node.name)
            graph.add_node(key, kind="op", label=op_name(node), where=place(node, axis_facts.captured.region))
            for end in touched:
                graph.add_edge(key, end, rule=rule.axes.__name__ if rule else None, node=node, kind="acts on")
    return graph


def path_between(axis_facts: AxisFacts, atom: Atom, a: str, b: str) -> Path:
    """Return the shortest path along `atom` between two parameters of a region.

    Raises:
        NoCouplingError: `atom` does not lie on one of them.
    """
    graph = axis_graph(axis_facts, [atom])
    graph.remove_nodes_from([key for key in graph if key[0] == "atom"])
    ends = []
    for name in (a, b):
        on = [key for key in graph if key[0] == "parameter" and key[1] == name]
        if not on:
            prefix = f"{axis_facts.captured.region}." if axis_facts.captured.region else ""
            members = ", ".join(sorted({prefix + key[1] for key in graph if key[0] == "parameter"}))
            raise NoCouplingError(f"`{prefix}{name}` is not a member of this coupling; its members are {members}")
        ends.append(on)
    paths = [nx.shortest_path(graph, x, y) for x in ends[0] for y in ends[1] if x != y and nx.has_path(graph, x, y)]
    if not paths:
        # Both sides of a fused projection are one parameter: there and back through the product where they meet.
        paths = [path for x in ends[0] for path in _round_trips(graph, axis_facts, atom, x)]
    if not paths:
        raise NoCouplingError(f"`{a}` meets `{b}` nowhere along this coupling")
    keys = min(paths, key=len)
    nodes = {node.name: node for node in axis_facts.values}
    labels = graph.nodes
    steps = tuple(
        PathStep(
            op=labels[op]["label"],
            where=labels[op]["where"],
            before=labels[before]["label"],
            after=labels[after]["label"],
            because=_because(axis_facts, atom, nodes[op[1]]),
            code=source_line(nodes[op[1]]),
        )
        for before, op, after in zip(keys[::2], keys[1::2], keys[2::2], strict=False)
    )
    return Path(labels[keys[0]]["label"], labels[keys[-1]]["label"], steps)


def _round_trips(graph: nx.Graph, axis_facts: AxisFacts, atom: Atom, start: Any) -> Iterator[list[Any]]:
    """Yield paths from a parameter axis to one operand of a contraction over `atom`, and from another operand back."""
    for fact in axis_facts.facts:
        key = ("op", fact.node.name)
        if fact.role != "contracted" or atom not in atoms_of(fact.expr) or key not in graph:
            continue
        outside = graph.subgraph([other for other in graph if other != key])
        arms = [
            nx.shortest_path(outside, start, end)
            for end in graph.neighbors(key)
            if end != start and nx.has_path(outside, start, end)
        ]
        arms.sort(key=len)
        for first, second in combinations(arms, 2):
            yield [*first, key, *reversed(second)]


_ROLES = {
    "contracted": "multiplied entry by entry and summed over",
    "reduced": "reduced over what is left of it",
    "free": "brought into a product by one side",
    "batch": "one product per entry",
    "expanded": "repeated along",
}


def _because(axis_facts: AxisFacts, atom: Atom, node: fx.Node) -> str:
    """Return in words what an op does to an axis."""
    roles = {fact.role for fact in axis_facts.facts if fact.node is node and atom in atoms_of(fact.expr)}
    if "reduced" in roles:
        roles -= {"free", "batch"}
    sentences = [words for role, words in _ROLES.items() if role in roles]
    if sentences:
        return "; ".join(sentences)
    rule = op_info(node.target)
    return f"{rule.why[:1].lower()}{rule.why[1:]}" if rule else ""
