"""Findings: everything found in a model, as data; tables, graphs and reports render it, `explain` fills it in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import networkx as nx

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.passes.find.left_whole import Refusal, UncoupledAxis
from ecospa_fx.text import plural

from .savings import Savings, savings_of
from .snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class Findings:
    """The couplings, refusals and gaps found in a model.

    Attributes:
        model: name of the model's class.
        regions: names of the captured regions; `""` is the root.
        couplings: the couplings that can shrink.
        refusals: axes along which weights meet that cannot shrink, with the reasons.
        uncoupled: axes of matrices along which no two weights meet, and those that lie outside of the regions, with the
            reasons. Each dim of each matrix is here, in a refusal or in a coupling.
        missing_rules: ops without an axis rule -> number of uses and the first one. Axes that they touch stay whole.
        experiments: ops whose axis rule comes from an experiment (verified, not proved) -> number of uses and the
            first one.
        not_captured: submodules that could not be captured -> the reason.
        seconds: wall-clock seconds per pass, summed over regions, if this call captured.
        snapshot: axes, shapes and module names at the time of the call, from which questions are answered.
        make_graph: builds `graph`.
    """

    model: str
    regions: tuple[str, ...]
    couplings: tuple[Coupling, ...]
    refusals: tuple[Refusal, ...]
    uncoupled: tuple[UncoupledAxis, ...]
    missing_rules: dict[str, str]
    experiments: dict[str, str]
    not_captured: dict[str, str]
    seconds: dict[str, float]
    snapshot: Snapshot
    make_graph: Callable[[], nx.Graph]

    @property
    def graph(self) -> nx.Graph:
        """The coupling graph: parameter axes, atoms and ops as nodes, see `ecospa_fx.couple.why.axis_graph`."""
        return self.make_graph()

    @property
    def title(self) -> str:
        """The headline: the model and its number of couplings."""
        where = "the whole model" if self.regions == ("",) else plural(len(self.regions), "region")
        share = self.snapshot.share_outside
        outside = f", {share:.0%} of the parameters outside" if share >= 0.005 else ""
        return f"{self.model}: {plural(len(self.couplings), 'coupling')} in {where}{outside}"

    def savings(self) -> Savings:
        """Compute the parameters, bytes and FLOPs that each coupling can save."""
        return savings_of(self.snapshot, self.couplings)
