"""explain: what was found in a model, what was refused and why, without changing the model."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from .compiled import MODEL, CompiledModel
from .coupling import Coupling, Refusal
from .errors import NoInputsError
from .passes.confirm import experiments as allowed
from .passes.nodes import place
from .passes.regions import choose, traceless
from .region import Region
from .shrinkable import original_class
from .why import axis_graph


@dataclass(frozen=True, eq=False)
class Explanation:
    """What is known of a model. `print` it.

    Attributes:
        model: name of the model's class.
        regions: names of what was captured, `""` for the root.
        couplings: what can shrink.
        refusals: weights that meet along an axis which cannot, with the reasons.
        missing_rules: ops that no axis rule is known for -> how often, first where; the axes they touch stay whole.
        experiments: ops whose rule is an experiment's, verified and not proved -> how often, first where.
        given_up: submodules that could not be captured -> why.
        seconds: wall-clock per pass, summed over regions, where this call captured.
        make_graph: builds `graph`.
    """

    model: str
    regions: tuple[str, ...]
    couplings: tuple[Coupling, ...]
    refusals: tuple[Refusal, ...]
    missing_rules: dict[str, str]
    experiments: dict[str, str]
    given_up: dict[str, str]
    seconds: dict[str, float]
    make_graph: Callable[[], nx.Graph]

    @property
    def graph(self) -> nx.Graph:
        """The coupling graph: parameter axes, atoms and ops as nodes, see `ecospa_fx.why.axis_graph`."""
        return self.make_graph()

    def __repr__(self) -> str:
        where = "the root" if self.regions == ("",) else _plural(len(self.regions), "region")
        return (
            f"<Explanation of {self.model}: {_plural(len(self.couplings), 'coupling')} in {where}, "
            f"{len(self.refusals)} refused, {_plural(len(self.missing_rules), 'op')} without a rule>"
        )

    def __str__(self) -> str:
        where = "the whole model" if self.regions == ("",) else _plural(len(self.regions), "region")
        parts = [f"{self.model}: {_plural(len(self.couplings), 'coupling')} in {where}"]
        if self.couplings:
            parts.append(_couplings_table(self.couplings))
        if self.refusals:
            parts.append("Refused, and why:\n" + _refusals_text(self.refusals))
        if self.missing_rules:
            lines = [f"  {op}: {where}" for op, where in self.missing_rules.items()]
            parts.append("Ops without an axis rule (what they touch stays whole):\n" + "\n".join(lines))
        if self.experiments:
            lines = [f"  {op}: {where}" for op, where in self.experiments.items()]
            parts.append("Ops whose axis rule is an experiment's (verified, not proved):\n" + "\n".join(lines))
        if self.given_up:
            lines = [f"  {name or 'the model'}: {why}" for name, why in self.given_up.items()]
            parts.append("Not captured:\n" + "\n".join(lines))
        return "\n\n".join(parts)


def explain(
    model: nn.Module,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    regions: str | Sequence[str] = "auto",
    experiments: bool = False,
) -> Explanation:
    """What can shrink in a model, what cannot, and why. Changes nothing; works on the meta device.

    >>> print(ecospa_fx.explain(model, example_inputs=(x,)))

    Args:
        model: any module, compiled or not.
        example_inputs: positional arguments of a call. A model that is compiled and has been called needs none.
        example_kwargs: keyword arguments of that call.
        regions: as for `ecospa_fx.compile`.
        experiments: as for `ecospa_fx.compile`; on the meta device none can be verified, so none is used.

    Raises:
        NoInputsError: there are no inputs, and the model offers none (`dummy_inputs`, `example_input_array`).
        CaptureError: it cannot be captured.
    """
    compiled = model.__dict__.get(MODEL)
    if compiled is not None and compiled.captured:
        return _explanation(model, compiled, {})
    args, kwargs = example_call(model, example_inputs, example_kwargs)
    if compiled is not None and compiled.regions:
        # Loaded at its small sizes: only its own regions can run it, and they capture what they are called with.
        with traceless(model), torch.no_grad():
            model(*args, **kwargs)
        return _explanation(model, compiled, {})
    waiting = type(model)
    model.__class__ = original_class(model)  # compiled, and waiting for a first call that this is not
    try:
        with allowed(experiments):
            found, given_up = choose(model, args, kwargs, regions)
    finally:
        model.__class__ = waiting
    scratch = CompiledModel(regions)
    scratch.given_up = given_up
    seconds: Counter[str] = Counter()
    for name, analysis in found.items():
        scratch.regions[name] = region = Region(name, scratch, {})
        for each in (analysis, *analysis.others):
            region.remember(each)
            seconds.update(each.seconds)
    return _explanation(model, scratch, dict(seconds))


def example_call(
    model: nn.Module, inputs: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call to capture with: what was given, else what the model itself offers.

    Raises:
        NoInputsError: neither.
    """
    if inputs is not None or kwargs is not None:
        return tuple(inputs or ()), dict(kwargs or {})
    offered = getattr(model, "dummy_inputs", None)
    if isinstance(offered, Mapping):
        return (), dict(offered)
    offered = getattr(model, "example_input_array", None)
    if offered is not None:
        return (tuple(offered) if isinstance(offered, (tuple, list)) else (offered,)), {}
    raise NoInputsError(
        f"nothing to capture {type(model).__name__} with: pass example_inputs=(x,) or example_kwargs={{...}}, the "
        "arguments of one call"
    )


def _explanation(model: nn.Module, compiled: CompiledModel, seconds: dict[str, float]) -> Explanation:
    inferences = [program.inference for region in compiled.regions.values() for program in region.programs]
    return Explanation(
        model=type(model).__name__,
        regions=tuple(compiled.regions),
        couplings=compiled.couplings(),
        refusals=tuple(refusal for region in compiled.regions.values() for refusal in region.refusals()),
        missing_rules=_uses((i.captured.region, i.missing) for i in inferences),
        experiments=_uses((i.captured.region, i.experiments) for i in inferences),
        given_up=dict(compiled.given_up),
        seconds=seconds,
        make_graph=lambda: nx.union_all(
            [nx.relabel_nodes(axis_graph(i), lambda key, n=n: (n, *key)) for n, i in enumerate(inferences)]
        ),
    )


def _uses(met: Iterable[tuple[str, Mapping[str, Sequence[Any]]]]) -> dict[str, str]:
    """Per op how often it was met, and where first, from the nodes per op of each region."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for region, by_op in met:
        for op, nodes in by_op.items():
            found.setdefault(op, []).extend((region, node) for node in nodes)
    return {
        op: f"{_plural(len(nodes), 'use')}, first in {place(nodes[0][1], nodes[0][0])}"
        for op, nodes in sorted(found.items())
    }


def _couplings_table(couplings: Iterable[Coupling]) -> str:
    """One row per coupling, equal ones of repeated blocks folded into one."""
    folded: dict[tuple[Any, ...], list[Coupling]] = {}
    for c in couplings:
        members = tuple(_starred(str(member)) for member in c.members)
        folded.setdefault((_starred(c.name), c.kind, c.size, c.original_size, c.linear, members), []).append(c)
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("coupling", overflow="fold")
    table.add_column("times", justify="right")
    table.add_column("kind")
    table.add_column("size", justify="right")
    table.add_column("between")
    table.add_column("members", overflow="fold")
    for (name, kind, size, original, linear, _), group in folded.items():
        first = group[0]
        shown = first.name if len(group) == 1 else name
        listed = " ".join(_short(str(member), first.name) for member in first.members)
        sizes = str(size) if size == original else f"{size} of {original}"
        table.add_row(shown, str(len(group)), kind, sizes, "linear" if linear else "pointwise", listed)
    console = Console(file=io.StringIO(), width=120, color_system=None, legacy_windows=False)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def _refusals_text(refusals: Iterable[Refusal]) -> str:
    folded: dict[str, int] = Counter(_starred(str(refusal)) for refusal in refusals)
    first: dict[str, Refusal] = {}
    for refusal in refusals:
        first.setdefault(_starred(str(refusal)), refusal)
    lines = []
    for key, times in folded.items():
        refusal = first[key]
        members = list(refusal.members)
        more = f" and {len(members) - 4} more" if len(members) > 4 else ""
        again = f", {times} times" if times > 1 else ""
        lines.append(f"  {', '.join(members[:4])}{more} (size {refusal.size}{again})")
        lines += [f"    - {reason}" for reason in refusal.reasons[:3]]
        if len(refusal.reasons) > 3:
            lines.append(f"    - and {len(refusal.reasons) - 3} more")
    return "\n".join(lines)


def _starred(name: str) -> str:
    """A name with its list positions blotted out: `layers.3.mlp` and `layers.7.mlp` are alike."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def _short(member: str, coupling: str) -> str:
    """A member's name below the module that the coupling is named after."""
    prefix = coupling.rpartition(".")[0]
    return member.removeprefix(f"{prefix}.") if prefix else member


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
