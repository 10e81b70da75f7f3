"""Explanation: the couplings and refusals of a model, with reasons, found without changing the model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
from rich.console import Group
from torch import nn

from ecospa_fx.arguments import CALL, FLAG, MODULE, NAMED, PATH, REGIONS, TEXT, instance, optional, takes
from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.couple.why import Path, Why, axis_graph, path_between
from ecospa_fx.errors import NoCouplingError, NoInputsError
from ecospa_fx.model.class_swap import others_wait, unswap_forward
from ecospa_fx.model.compiled import MODEL, CompiledModel, find_followed
from ecospa_fx.model.execution import Execution
from ecospa_fx.model.lookup import check_ready, try_call
from ecospa_fx.model.parametrized import removals, with_way_out
from ecospa_fx.model.region import Region
from ecospa_fx.passes.axes.algebra import Atom, atoms_of
from ecospa_fx.passes.find.joined import choose_regions
from ecospa_fx.passes.graph.nodes import place
from ecospa_fx.ranks.tensor_parallel import gathered_whole
from ecospa_fx.ranks.wrappers import looks_inside
from ecospa_fx.text import plural
from ecospa_fx.threads import alone
from ecospa_fx.train.sensitivities import Sensitivity

from .findings import Findings
from .report import write_report
from .snapshot import snapshot_of
from .tables import json_of, markdown_of, rich_of, text_of
from .uncoupled import uncoupled_axes
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
        """Return everything as Markdown, for an issue or a pull request."""
        return markdown_of(self)

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json_of(self)

    def by_module(self) -> dict[str, tuple[Coupling, ...]]:
        """Return the couplings along the parameters of each module that has any, by module name."""
        modules: dict[str, dict[str, Coupling]] = {}
        for coupling in self.couplings:
            for member in coupling.members:
                modules.setdefault(member.parameter.rpartition(".")[0], {})[coupling.name] = coupling
        return {name: tuple(modules[name].values()) for name in self.snapshot.modules if name in modules}

    @takes(a=TEXT, b=TEXT)
    def why(self, a: str, b: str) -> Why:
        """Explain how two weights are coupled: a path through the graph per coupling, a sentence per op.

        Args:
            a: a parameter, or a module that holds one matrix; the end of its name is enough if it is unique.
            b: another one.

        Raises:
            NoCouplingError: they share no axis, or the model has nothing of that name.
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
                    continue  # one weight given twice has a path only if it is multiplied by itself
                reasons = tuple(region.reasons(atom))
                if atom in names:
                    paths[names[atom]] = path
                elif reasons:
                    label = f"an axis of {region.count(atom)}"
                    paths[label], refused[label] = path, reasons
        for coupling in self.couplings if region is not self.snapshot.region_of(second) else ():
            names_of = {member.parameter for member in coupling.members}
            ends = [self.snapshot.ties.get(name, name) for name in (first, second)]
            if names_of >= set(ends):
                paths[coupling.name] = coupling.why(*ends)
        if not paths:
            raise NoCouplingError(
                f"`{first}` and `{second}` share no axis along which weights meet; why_not(name) says what lies along "
                "each of their dims"
            )
        return Why(first, second, paths, refused)

    @staticmethod
    def _shared_atoms(parameters: Mapping[str, Any], names: Sequence[str]) -> list[Atom]:
        first, second = (
            dict.fromkeys(atom for expr in parameters.get(name, ()) for atom in atoms_of(expr)) for name in names
        )
        return [atom for atom in first if atom in second]

    @takes(name=TEXT)
    def why_not(self, name: str) -> WhyNot:
        """Explain what keeps a weight from shrinking, dim by dim, in sentences.

        >>> explanation.why_not("layers.3.self_attn.q_proj")

        Args:
            name: a parameter or a module; the end of its name is enough if it is unique.

        Raises:
            NoCouplingError: the model has nothing of that name.
        """
        return why_not(self.snapshot, self.couplings, name)

    @takes(
        path=PATH, training=optional(NAMED), latency=optional(NAMED),
        sensitivity=optional(instance("an ecospa_fx.Sensitivity", Sensitivity)),
    )  # fmt: skip
    def report(
        self,
        path: str | os.PathLike[str],
        *,
        training: Mapping[str, Any] | None = None,
        sensitivity: Sensitivity | None = None,
        latency: Mapping[str, Any] | None = None,
    ) -> None:
        """Write everything as one HTML file, which opens from disk and needs no network.

        Args:
            path: the file.
            training: the result of `ecospa_fx.report.training_of(trainer, losses)`, for curves and widths over time.
            sensitivity: the result of `ecospa_fx.sensitivity`, for its table.
            latency: the result of `ecospa_fx.report.latency_of(before, after, (x,))`.
        """
        write_report(self, path, training, sensitivity, latency)


@takes(model=MODULE, **CALL, regions=REGIONS, experiments=FLAG, execution=TEXT)
@looks_inside
def explain(
    model: nn.Module,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    regions: str | Sequence[str] = "auto",
    experiments: bool = False,
    execution: Execution = "graph",
) -> Explanation:
    """Find what can shrink in a model, what cannot, and why. Changes nothing; works on the meta device.

    >>> print(ecospa_fx.explain(model, example_inputs=(x,)))

    Args:
        model: any module, compiled or not.
        example_inputs: positional arguments of a call. A compiled model that has been called needs none.
        example_kwargs: keyword arguments of that call.
        regions: as for `ecospa_fx.compile`.
        experiments: as for `ecospa_fx.compile`; on the meta device none can be verified, so none is used.
        execution: as for `ecospa_fx.compile`, for a model that is not compiled yet. With `"module"` the result names
            the integers that change with each coupling, and the couplings that need graph execution. Finding these
            takes values, so on the meta device the reason reads that it cannot be tried.

    Raises:
        NoInputsError: no inputs are given, and the model offers none (`dummy_inputs`, `example_input_array`).
        CaptureError: the model cannot be captured; with `execution="module"` that includes every call with a cache.
    """
    compiled = model.__dict__.get(MODEL)
    check_ready(model)
    if compiled is not None and compiled.captured:
        return _explanation(model, compiled, {})
    args, kwargs = example_call(model, example_inputs, example_kwargs)
    if compiled is not None and compiled.regions:
        # Loaded at its small sizes: only its own regions can run it, and they capture the calls they get.
        try_call(model, args, kwargs)
        return _explanation(model, compiled, {})
    if compiled is not None:  # it waits for a first call that this is not, and will be captured as it was compiled
        experiments, execution = experiments or compiled.experiments, compiled.execution
    scratch = CompiledModel(regions, experiments, execution)
    with alone():
        waiting = type(model)
        try:
            model.__dict__.pop(MODEL, None)
            unswap_forward(model)
            with gathered_whole(model), others_wait(model):
                across = execution == "graph"
                chosen = choose_regions(model, args, kwargs, regions, options=scratch.state.options, across=across)
        finally:
            model.__class__ = waiting
            if compiled is not None:
                model.__dict__[MODEL] = compiled
    scratch.not_captured = chosen.failed
    scratch.state.joints, scratch.state.joint_refusals = chosen.joints, chosen.refusals
    seconds: Counter[str] = Counter()
    for name, analysis in chosen.analyses.items():
        scratch.regions[name] = region = Region(name, scratch.state, {}, analysis.captured.border)
        for each in (analysis, *analysis.others):
            region.remember(each)
            seconds.update(each.seconds)
    if execution == "module":
        with gathered_whole(model):
            find_followed(model, scratch.regions)
    return _explanation(model, scratch, dict(seconds))


def example_call(
    model: nn.Module, inputs: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments to capture with: those given, else those that the model itself offers.

    Raises:
        NoInputsError: none are given and the model offers none.
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
        f"there are no inputs to capture {type(model).__name__} with: pass the arguments of one call as "
        "example_inputs=(x,) or example_kwargs={...}"
    )


def _explanation(model: nn.Module, compiled: CompiledModel, seconds: dict[str, float]) -> Explanation:
    regions = list(compiled.regions.values())
    axis_facts = [each.axis_facts for region in regions for each in reversed(region.specializations)]
    couplings, snapshot, calls = compiled.couplings(), snapshot_of(model, compiled), removals(model)
    found = [*compiled.state.joint_refusals, *(r for region in regions for r in region.offers.refusals())]
    refusals = tuple(with_way_out(refusal, calls) for refusal in found)
    return Explanation(
        model=type(model).__name__,
        regions=tuple(compiled.regions),
        couplings=couplings,
        refusals=refusals,
        uncoupled=tuple(uncoupled_axes(snapshot, regions, couplings, refusals, compiled.not_captured)),
        missing_rules=_uses((i.captured.region, i.missing) for i in axis_facts),
        experiments=_uses((i.captured.region, i.experiments) for i in axis_facts),
        not_captured=dict(compiled.not_captured),
        seconds=seconds,
        snapshot=snapshot,
        make_graph=lambda: nx.union_all(
            [nx.relabel_nodes(axis_graph(i), lambda key, n=n: (n, *key)) for n, i in enumerate(axis_facts)]
        ),
    )


def _uses(nodes_by_op: Iterable[tuple[str, Mapping[str, Sequence[Any]]]]) -> dict[str, str]:
    """Describe the uses of each op (their number, and the first one), from the nodes per op of each region."""
    uses: dict[str, list[tuple[str, Any]]] = {}
    for region, nodes_of in nodes_by_op:
        for op, nodes in nodes_of.items():
            uses.setdefault(op, []).extend((region, node) for node in nodes)
    return {
        op: f"{plural(len(nodes), 'use')}, first in {place(nodes[0][1], nodes[0][0])}"
        for op, nodes in sorted(uses.items())
    }
