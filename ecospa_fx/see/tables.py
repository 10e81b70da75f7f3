"""Tables: findings as text for 80 columns, as rich tables, Markdown and JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.passes.find.left_whole import Refusal
from ecospa_fx.text import Hanging, plain

from .findings import Findings
from .fold import Fold, fold_couplings, fold_refusals, fold_uncoupled, heading

MOST_MEMBERS, MOST_REASONS, MOST_GROUPS = 6, 3, 6
WIDTH = 80


def couplings_table(couplings: tuple[Coupling, ...]) -> Table:
    """Build a table with a row per group of equal couplings, of one module."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("coupling", overflow="fold", style="bold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("times", justify="right")
    table.add_column("between")
    table.add_column("members", overflow="fold", ratio=1)
    for fold in fold_couplings(couplings):
        between = "linear" if fold.couplings[0].linear else "pointwise"
        members = Text(" ".join(word.replace(" ", "\u00a0") for word in fold.members))
        table.add_row(Text(fold.tail), size_of(fold.couplings[0]), str(len(fold.couplings)), between, members)
    return table


def size_of(coupling: Coupling) -> str:
    """Format a coupling's size, and its original one; `16 x 8` if each of eight contexts (heads) chooses its own."""
    size = str(coupling.size)
    if coupling.size != coupling.original_size:
        size += f" of {coupling.original_size}"
    contexts = getattr(coupling, "contexts", 1)
    return f"{size} x {contexts}" if contexts > 1 else size


def by_module(couplings: tuple[Coupling, ...]) -> Iterator[tuple[str, tuple[Coupling, ...]]]:
    """Iterate over couplings by the module of their names, equal modules of repeated blocks as one."""
    grouped: dict[str, list[Fold]] = {}
    for fold in fold_couplings(couplings):
        grouped.setdefault(fold.module, []).append(fold)
    for module, folds in grouped.items():
        yield heading(module), tuple(c for fold in folds for c in fold.couplings)


def refusal_lines(refusal: Refusal, times: int) -> tuple[str, list[str]]:
    """Format the weights that meet in a refusal, and a line per reason."""
    more = len(refusal.members) - MOST_MEMBERS
    again = f", {times} times" if times > 1 else ""
    head = ", ".join(refusal.members[:MOST_MEMBERS]) + (f" and {more} more" if more > 0 else "")
    reasons = list(refusal.reasons[:MOST_REASONS])
    if len(refusal.reasons) > MOST_REASONS:
        reasons.append(f"and {len(refusal.reasons) - MOST_REASONS} more")
    return f"{head} (size {refusal.size}{again})", reasons


def _notes(findings: Findings) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """Iterate over the sections below the couplings: a heading, and items with their detail lines."""
    if findings.refusals:
        folded = fold_refusals(findings.refusals)
        yield "Refused, and why", [refusal_lines(refusal, times) for refusal, times in folded]
    if findings.uncoupled:
        yield "On no coupling, and why", _uncoupled_items(findings)
    changing = [(fold, changes) for fold in fold_couplings(findings.couplings) if (changes := _changes(fold))]
    if changing:
        lines: list[tuple[str, list[str]]] = [
            (f"{'.'.join(filter(None, (fold.module, fold.tail)))}: {', '.join(changes)}", [])
            for fold, changes in changing
        ]
        yield "Integers that change with it (execution='module')", lines
    if findings.missing_rules:
        items: list[tuple[str, list[str]]] = [(f"{op}: {uses}", []) for op, uses in findings.missing_rules.items()]
        yield "Ops without an axis rule (the axes they touch stay whole)", items
    if findings.experiments:
        uncertain: list[tuple[str, list[str]]] = [(f"{op}: {uses}", []) for op, uses in findings.experiments.items()]
        yield "Ops whose axis rule comes from an experiment (verified, not proved)", uncertain
    if findings.not_captured:
        yield "Not captured", [(f"{name or 'the model'}: {why}", []) for name, why in findings.not_captured.items()]


def _uncoupled_items(findings: Findings) -> list[tuple[str, list[str]]]:
    """Format the axes that meet no others, a line per reason."""
    groups = fold_uncoupled(findings.uncoupled)
    items: list[tuple[str, list[str]]] = [
        (f"{reason}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""), [])
        for reason, names in list(groups.items())[:MOST_GROUPS]
    ]
    rest = list(groups.values())[MOST_GROUPS:]
    if rest:
        items.append((f"{len(rest)} more reasons, for {sum(map(len, rest))} axes: see why_not(name)", []))
    return items


def _changes(fold: Fold) -> list[str]:
    """Name the attributes that change with a group of couplings, from the module that its members share."""
    first = fold.couplings[0]
    prefix = f"{first.name.rpartition('.')[0]}."
    return [change.removeprefix(prefix) for change in first.changes]


def text_of(findings: Findings) -> str:
    """Format findings as text for a terminal of 80 columns."""
    parts = [findings.title]
    for module, couplings in by_module(findings.couplings):
        parts.append(f"{module}\n{textwrap.indent(plain(couplings_table(couplings), WIDTH - 2), '  ')}")
    for name, items in _notes(findings):
        lines = [f"{name}:"]
        for item, details in items:
            lines.append(_wrapped(item, "  ", "    "))
            lines += [_wrapped(detail, "    - ", "      ") for detail in details]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def rich_of(findings: Findings) -> Group:
    """Format findings for a terminal of any width, in colour."""
    parts: list[Any] = [Text(findings.title, style="bold")]
    for module, couplings in by_module(findings.couplings):
        parts += [Text(), Text(module, style="cyan"), Padding(couplings_table(couplings), (0, 0, 0, 2))]
    for name, items in _notes(findings):
        parts += [Text(), Text(f"{name}:", style="bold")]
        for item, details in items:
            parts.append(Padding(Hanging(item), (0, 0, 0, 2)))
            parts += [Padding(Hanging(f"- {detail}", style="yellow"), (0, 0, 0, 4)) for detail in details]
    return Group(*parts)


def markdown_of(findings: Findings) -> str:
    """Format findings as Markdown."""
    parts = [f"## {findings.title}"]
    for module, couplings in by_module(findings.couplings):
        rows = ["| coupling | size | times | between | members |", "|---|---:|---:|---|---|"]
        for fold in fold_couplings(couplings):
            between = "linear" if fold.couplings[0].linear else "pointwise"
            members = ", ".join(f"`{member}`" for member in fold.members)
            cells = fold.tail, size_of(fold.couplings[0]), str(len(fold.couplings)), between, members
            rows.append(f"| {' | '.join(cells)} |")
        parts.append(f"### `{module}`\n\n" + "\n".join(rows))
    for name, items in _notes(findings):
        lines = []
        for item, details in items:
            lines += [f"- {item}", *(f"  - {detail}" for detail in details)]
        parts.append(f"### {name}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def document_of(findings: Findings) -> dict[str, Any]:
    """Convert findings to plain values."""
    return {
        "model": findings.model,
        "regions": list(findings.regions),
        "couplings": [coupling_document(coupling) for coupling in findings.couplings],
        "refusals": [
            {"members": list(r.members), "size": r.size, "reasons": list(r.reasons), "region": r.region}
            for r in findings.refusals
        ],
        "uncoupled": [
            {"members": list(axis.members), "size": axis.size, "reasons": list(axis.reasons), "region": axis.region}
            for axis in findings.uncoupled
        ],
        "missing_rules": findings.missing_rules,
        "experiments": findings.experiments,
        "given_up": findings.not_captured,
        "seconds": findings.seconds,
    }


def coupling_document(coupling: Coupling) -> dict[str, Any]:
    """Convert a coupling to plain values, without the index of its members."""
    return {
        "name": coupling.name,
        "kind": coupling.kind,
        "size": coupling.size,
        "original_size": coupling.original_size,
        "linear": coupling.linear,
        "region": coupling.region,
        "context": getattr(coupling, "context", None),
        "contexts": getattr(coupling, "contexts", 1),
        "changes": list(getattr(coupling, "changes", ())),
        "members": [{"parameter": m.parameter, "dim": m.dim, "part": m.part} for m in coupling.members],
    }


def json_of(findings: Findings) -> str:
    """Format findings as JSON."""
    return json.dumps(document_of(findings), indent=1)


def _wrapped(text: str, first: str, rest: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
