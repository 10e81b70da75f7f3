"""Graphs of coupled weights, as networkx graphs and as DOT, SVG, Mermaid, GraphML and JSON.

block_graph      weights and couplings, equal blocks drawn once ("x24"): readable for a model of any depth
coupling_graph   every weight and every coupling
full_graph       every axis, atom and op, with the rule behind each edge: the proof itself
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterable
from typing import Any

import networkx as nx

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import EcoSpaError
from ecospa_fx.text import starred

from .drawings import Format, Level
from .findings import Findings
from .fold import fold_couplings, fold_refusals
from .tables import size_of

__all__ = [
    "COLOURS",
    "LEVELS",
    "REFUSED",
    "WRITERS",
    "block_graph",
    "check_format",
    "coupling_graph",
    "full_graph",
    "graphviz",
    "to_dot",
    "to_graphml",
    "to_json",
    "to_mermaid",
    "to_svg",
]

COLOURS = {
    "qk": "#4269d0", "vo": "#2a9d8f", "heads": "#8e6bbf", "groups": "#c26fb0", "ffn": "#e08b2d", "glu": "#d1652c",
    "experts": "#b8475a", "conv": "#7a8b3c", "recurrent": "#8a6d3b", "residual": "#777777",
}  # fmt: skip
"""A colour per kind of coupling, the same in graphs and reports."""

REFUSED = "#c0392b"


def coupling_graph(findings: Findings) -> nx.Graph:
    """Build the graph of every weight and every coupling.

    Returns:
        A graph whose nodes have `kind` (`weight`, `coupling`), `label`, `block` and, for couplings, `coupling` (its
        kind), `size` and `times`; edges have `dim`.
    """
    graph = nx.Graph(name=findings.model)
    for coupling in findings.couplings:
        _add(graph, coupling, 1, lambda name: name)
    return graph


def block_graph(findings: Findings) -> nx.Graph:
    """Build the graph of weights, couplings and refusals, equal blocks once; attributes as in `coupling_graph`."""
    graph = nx.Graph(name=findings.model)
    for fold in fold_couplings(findings.couplings):
        name = starred if len(fold.couplings) > 1 else (lambda text: text)
        _add(graph, fold.couplings[0], len(fold.couplings), name)
    for refusal, times in fold_refusals(findings.refusals):
        name = starred if times > 1 else (lambda text: text)
        key = f"refused: {name(' '.join(refusal.members))}"
        block = _common([name(member) for member in refusal.members])
        graph.add_node(
            key, kind="refusal", label=f"refused, {refusal.size}", block=block, times=times, reason=refusal.reasons[0]
        )
        for member in refusal.members:
            parameter, dim = member.rsplit("[", 1)
            weight = _weight(graph, name(f"{parameter}."), block)
            graph.add_edge(weight, key, dim=f"[{dim}")
    return graph


def full_graph(findings: Findings) -> nx.Graph:
    """Build the graph of every axis, atom and op, with plain attributes; `findings.graph` has the objects."""
    source = findings.graph
    graph = nx.Graph(name=findings.model)
    names = {key: f"n{number}" for number, key in enumerate(source)}
    for key, attributes in source.nodes(data=True):
        label = attributes.get("label", "")
        graph.add_node(names[key], kind=attributes["kind"], label=label, where=attributes.get("where", ""), block="")
    for a, b, attributes in source.edges(data=True):
        graph.add_edge(names[a], names[b], kind=attributes["kind"], rule=attributes.get("rule") or "")
    return graph


def _add(graph: nx.Graph, coupling: Coupling, times: int, name: Callable[[str], str]) -> None:
    key = name(f"{coupling.name}.").rstrip(".")
    block = key.rpartition(".")[0]
    tail = key.rpartition(".")[2]
    graph.add_node(
        key, kind="coupling", label=f"{tail} {size_of(coupling)}", coupling=coupling.kind, size=coupling.size,
        block=block, times=times, linear=coupling.linear,
    )  # fmt: skip
    for member in coupling.members:
        if member.matrix:
            weight = _weight(graph, name(f"{member.parameter}."), block)
            part = "" if member.part is None else f" part {member.part}"
            before = graph.edges[weight, key]["dim"] + " " if graph.has_edge(weight, key) else ""
            graph.add_edge(weight, key, dim=f"{before}[{member.dim}]{part}")


def _weight(graph: nx.Graph, parameter: str, block: str) -> str:
    full = parameter.rstrip(".")
    weight = full.removesuffix(".weight")
    if weight not in graph:
        graph.add_node(
            weight, kind="weight", label=weight.rpartition(".")[2] or weight, block=weight.rpartition(".")[0]
        )
    return weight


def _common(members: Iterable[str]) -> str:
    parts = [member.split(".") for member in members]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _blocks(graph: nx.Graph) -> dict[str, list[str]]:
    """Group nodes by the block they are drawn in."""
    blocks: dict[str, list[str]] = {}
    for key, block in graph.nodes(data="block"):
        blocks.setdefault(block or "", []).append(key)
    return blocks


def _times(graph: nx.Graph, keys: Iterable[str]) -> int:
    return max((graph.nodes[key].get("times", 1) for key in keys), default=1)


def to_dot(graph: nx.Graph) -> str:
    """Format a graph in the language of graphviz."""
    ids = {key: f"n{number}" for number, key in enumerate(graph)}
    lines = [
        f"graph {_quoted(graph.name)} {{",
        "  rankdir=LR; ranksep=0.7; nodesep=0.12;",
        '  node [fontname="Helvetica", fontsize=11, height=0.3, margin="0.12,0.05"];',
        '  edge [fontname="Helvetica", fontsize=8, color="#999999"];',
    ]
    for number, (block, keys) in enumerate(_blocks(graph).items()):
        indent = "  "
        if block:
            times = _times(graph, keys)
            label = f"{block} x{times}" if times > 1 else block
            lines.append(f"  subgraph cluster_{number} {{")
            lines.append(f'    label={_quoted(label)}; fontname="Helvetica"; fontsize=10; color="#bbbbbb";')
            indent = "    "
        lines += [f"{indent}{ids[key]} [{_dot_style(graph.nodes[key])}];" for key in keys]
        if block:
            lines.append("  }")
    for a, b, attributes in graph.edges(data=True):
        if graph.nodes[a]["kind"] != "weight" and graph.nodes[b]["kind"] == "weight":
            a, b = b, a
        label = attributes.get("dim", "")
        lines.append(f"  {ids[a]} -- {ids[b]}{f' [label={_quoted(label)}]' if label else ''};")
    return "\n".join([*lines, "}"]) + "\n"


def _dot_style(attributes: dict[str, Any]) -> str:
    label = f"label={_quoted(attributes['label'])}"
    match attributes["kind"]:
        case "coupling":
            return f'{label}, shape=ellipse, style=filled, fontcolor=white, color="{COLOURS[attributes["coupling"]]}"'
        case "refusal":
            return f'{label}, shape=ellipse, style=dashed, color="{REFUSED}", fontcolor="{REFUSED}"'
        case "weight" | "parameter":
            return f'{label}, shape=box, style="rounded"'
        case _:
            return f'{label}, shape=plaintext, fontcolor="#666666"'


def to_mermaid(graph: nx.Graph) -> str:
    """Format a graph as a Mermaid flowchart, which GitHub and GitLab draw in Markdown."""
    ids = {key: f"n{number}" for number, key in enumerate(graph)}
    lines = ["flowchart LR"]
    for number, (block, keys) in enumerate(_blocks(graph).items()):
        times = _times(graph, keys)
        if block:
            label = f"{block} x{times}" if times > 1 else block
            lines.append(f"  subgraph b{number}[{_quoted(label)}]")
        for key in keys:
            attributes = graph.nodes[key]
            label = _quoted(attributes["label"])
            shape = f"([{label}])" if attributes["kind"] in ("coupling", "refusal") else f"[{label}]"
            kind = attributes.get("coupling", "refused" if attributes["kind"] == "refusal" else "")
            lines.append(f"    {ids[key]}{shape}{f':::{kind}' if kind else ''}")
        if block:
            lines.append("  end")
    for a, b, attributes in graph.edges(data=True):
        label = attributes.get("dim", "")
        lines.append(f"  {ids[a]} --{f' {_quoted(label)} --' if label else '-'} {ids[b]}")
    used = {graph.nodes[key].get("coupling") for key in graph}
    lines += [
        f"  classDef {kind} fill:{colour},color:#fff,stroke:none" for kind, colour in COLOURS.items() if kind in used
    ]
    lines.append(f"  classDef refused fill:none,color:{REFUSED},stroke:{REFUSED},stroke-dasharray:4")
    return "\n".join(lines) + "\n"


def to_graphml(graph: nx.Graph) -> str:
    """Format a graph as GraphML, for yEd, Gephi and the like."""
    return "\n".join(nx.generate_graphml(graph)) + "\n"


def to_json(graph: nx.Graph) -> str:
    """Format a graph as node-link JSON, which `networkx.node_link_graph` reads."""
    return json.dumps(nx.node_link_data(graph, edges="edges"), indent=1) + "\n"


def graphviz() -> str:
    """Find the program `dot` of graphviz.

    Raises:
        EcoSpaError: it is not installed.
    """
    path = shutil.which("dot")
    if path is None:
        raise EcoSpaError(
            "SVG needs the program `dot` of graphviz, which is not installed (apt install graphviz, brew install "
            "graphviz); DOT, Mermaid, GraphML and JSON need no program"
        )
    return path


def to_svg(graph: nx.Graph) -> str:
    """Draw a graph as SVG.

    Raises:
        EcoSpaError: graphviz is not installed, or fails.
    """
    finished = subprocess.run([graphviz(), "-Tsvg"], input=to_dot(graph), capture_output=True, text=True, check=False)
    if finished.returncode:
        raise EcoSpaError(f"graphviz failed: {finished.stderr.strip()}")
    return finished.stdout


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', "'")
    return f'"{escaped}"'


LEVELS: dict[Level, Callable[[Findings], nx.Graph]] = {
    "blocks": block_graph,
    "couplings": coupling_graph,
    "full": full_graph,
}
"""The graph of each level of detail."""

WRITERS: dict[Format, Callable[[nx.Graph], str]] = {
    "dot": to_dot,
    "svg": to_svg,
    "mermaid": to_mermaid,
    "graphml": to_graphml,
    "json": to_json,
}
"""The writer of each format."""


def check_format(name: Format) -> None:
    """Check that the program that a format needs is installed, before a graph is built for it.

    Raises:
        EcoSpaError: it is not installed.
    """
    if WRITERS[name] is to_svg:
        graphviz()
