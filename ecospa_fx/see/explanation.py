"""explain: what was found in a model, what was refused and why, without changing the model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from rich.console import Group
from torch import nn

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.couple.why import Path, Why, axis_graph, path_between
from ecospa_fx.errors import NoCouplingError, NoInputsError
from ecospa_fx.model.class_swap import original_class
from ecospa_fx.model.compiled import MODEL, CompiledModel, Execution, find_followed
from ecospa_fx.model.region import Region
from ecospa_fx.passes.axes.algebra import Atom, atoms_of
from ecospa_fx.passes.find.confirm import experiments as allowed
from ecospa_fx.passes.find.regions import choose
from ecospa_fx.passes.graph.isolate import isolated
from ecospa_fx.passes.graph.nodes import place
from ecospa_fx.text import plural

from .findings import Findings
from .report import write_report
from .snapshot import snapshot_of
from .tables import json_of, markdown_of, rich_of, text_of
from .why_not import WhyNot, why_not


@dataclass(frozen=True, eq=False)
class Explanation(Findings):
    """Findings that can be printed, questioned, drawn (`ecospa_fx.graphs`) and written as a report.

    >>> explanation = ecospa_fx.explain(model, example_inputs=(x,))
    >>> print(explanation.why("layers.0.q_proj", "layers.0.k_proj"))
    """

    def __repr__(self) -> str:
        where = "the root" if self.regions == ("",) else plural(len(self.regions), "region")
        return (
            f"<Explanation of {self.model}: {plural(len(self.couplings), 'coupling')} in {where}, "
            f"{len(self.refusals)} refused, {plural(len(self.missing_rules), 'op')} without a rule>"
        )

    def __str__(self) -> str:
        return text_of(self)

    def __rich__(self) -> Group:
        return rich_of(self)

    def to_markdown(self) -> str:
        """All of it as Markdown, for an issue or a pull request."""
        return markdown_of(self)

    def to_json(self) -> str:
        """All of it as JSON."""
        return json_of(self)

    def by_module(self) -> dict[str, tuple[Coupling, ...]]:
        """The couplings that run along parameters of each module, for the modules that hold some."""
        modules: dict[str, dict[str, Coupling]] = {}
        for coupling in self.couplings:
            for member in coupling.members:
                modules.setdefault(member.parameter.rpartition(".")[0], {})[coupling.name] = coupling
        return {name: tuple(modules[name].values()) for name in self.snapshot.modules if name in modules}

    def why(self, a: str, b: str) -> Why:
        """How two weights are coupled: a path through the graph per coupling, a sentence per op.

        Args:
            a: a parameter, or a module that holds one matrix; an end of its name will do where it is unique.
            b: another.

        Raises:
            NoCouplingError: they share no axis, or there is nothing of that name.
        """
        first, second = self.snapshot.matrix_of(a), self.snapshot.matrix_of(b)
        region = self.snapshot.region_of(first)
        paths: dict[str, Path] = {}
        refused: dict[str, tuple[str, ...]] = {}
        if region is not None and region is self.snapshot.region_of(second):
            prefix = f"{region.name}." if region.name else ""
            inside = [self.snapshot.ties.get(name, name).removeprefix(prefix) for name in (first, second)]
            names = {atom: name for name, atom in region.couplings()}
            for atom in self._shared_atoms(region.axis_facts.parameters, inside):
                try:
                    path = path_between(region.axis_facts, atom, inside[0], inside[1])
                except NoCouplingError:
                    continue  # one weight twice: there is a path only where it meets itself
                reasons = tuple(region.reasons(atom))
                if atom in names:
                    paths[names[atom]] = path
                elif reasons:
                    label = f"an axis of {region.count(atom)}"
                    paths[label], refused[label] = path, reasons
        if not paths:
            raise NoCouplingError(
                f"`{first}` and `{second}` share no axis along which weights meet; why_not says what each runs along"
            )
        return Why(first, second, paths, refused)

    @staticmethod
    def _shared_atoms(parameters: Mapping[str, Any], names: Sequence[str]) -> list[Atom]:
        held = [dict.fromkeys(atom for expr in parameters.get(name, ()) for atom in atoms_of(expr)) for name in names]
        return [atom for atom in held[0] if atom in held[1]]

    def why_not(self, name: str) -> WhyNot:
        """What keeps a weight from shrinking, dim by dim, in sentences.

        >>> explanation.why_not("layers.3.self_attn.q_proj")

        Args:
            name: a parameter or a module; an end of its name will do where it is unique.

        Raises:
            NoCouplingError: there is nothing of that name.
        """
        return why_not(self.snapshot, self.couplings, name)

    def report(self, path: str | os.PathLike[str], *, training: Mapping[str, Any] | None = None) -> None:
        """Write one HTML file with all of it, which works from disk and without a network.

        Args:
            path: the file.
            training: what `ecospa_fx.report.training_of(trainer, losses)` gives, for curves and widths over time.
        """
        write_report(self, path, training)


def explain(
    model: nn.Module,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    regions: str | Sequence[str] = "auto",
    experiments: bool = False,
    execution: Execution = "graph",
) -> Explanation:
    """What can shrink in a model, what cannot, and why. Changes nothing; works on the meta device.

    >>> print(ecospa_fx.explain(model, example_inputs=(x,)))

    Args:
        model: any module, compiled or not.
        example_inputs: positional arguments of a call. A model that is compiled and has been called needs none.
        example_kwargs: keyword arguments of that call.
        regions: as for `ecospa_fx.compile`.
        experiments: as for `ecospa_fx.compile`; on the meta device none can be verified, so none is used.
        execution: as for `ecospa_fx.compile`, of a model that is not compiled. With `"module"` it says which integers
            change with each coupling, and what only graphs can follow; that takes values, so it says of a model on the
            meta device that it cannot be tried.

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
        with isolated(model), torch.no_grad():
            model(*args, **kwargs)
        return _explanation(model, compiled, {})
    waiting = type(model)
    model.__class__ = original_class(model)  # compiled, and waiting for a first call that this is not
    try:
        with allowed(experiments):
            found, given_up = choose(model, args, kwargs, regions)
    finally:
        model.__class__ = waiting
    scratch = CompiledModel(regions, experiments, execution)
    scratch.given_up = given_up
    seconds: Counter[str] = Counter()
    for name, analysis in found.items():
        scratch.regions[name] = region = Region(name, scratch, {})
        for each in (analysis, *analysis.others):
            region.remember(each)
            seconds.update(each.seconds)
    if execution == "module":
        find_followed(model, scratch.regions)
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
    inferences = [program.axis_facts for region in compiled.regions.values() for program in region.programs]
    return Explanation(
        model=type(model).__name__,
        regions=tuple(compiled.regions),
        couplings=compiled.couplings(),
        refusals=tuple(refusal for region in compiled.regions.values() for refusal in region.refusals()),
        missing_rules=_uses((i.captured.region, i.missing) for i in inferences),
        experiments=_uses((i.captured.region, i.experiments) for i in inferences),
        given_up=dict(compiled.given_up),
        seconds=seconds,
        snapshot=snapshot_of(model, compiled),
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
        op: f"{plural(len(nodes), 'use')}, first in {place(nodes[0][1], nodes[0][0])}"
        for op, nodes in sorted(found.items())
    }
