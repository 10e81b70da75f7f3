"""Moving buffers: those that some call of a region computes from parameters, and that shrink with these in every call.

settled(...)     the graphs of a region once a call is known that may compute more buffers, and the plan with these
-> commit        buffers that begin to move after a shrink lose the entries that the shrink has taken
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from ecospa_fx.passes.find.analyse import Analysis
from ecospa_fx.passes.find.discover import discover
from ecospa_fx.passes.graph.tensors import join, named_tensors
from ecospa_fx.passes.infer.infer import inferred_again
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.rewrite.replay import replay, selected_by, write_plan
from ecospa_fx.passes.rewrite.rewrite import rewrite
from ecospa_fx.plan import Plan

from .journal import Journal
from .slicing import Change, prepare_tensors
from .specialization import Specialization
from .state import ModelState


@dataclass(frozen=True, eq=False)
class Settled:
    """The graphs and the plan of a region whose moving buffers are known.

    Attributes:
        specializations: the captured calls.
        plan: the plan, with the buffers that begin to move.
        change: their tensors.
    """

    specializations: list[Specialization]
    plan: Plan
    change: Change

    def commit(self, state: ModelState, journal: Journal) -> None:
        """Take up the plan and its tensors; the region takes up the graphs."""
        self.change.commit(journal)
        journal.note_object(state)
        state.adopt(self.plan, state.attributes)


def moving_buffers(module: nn.Module, shrunk: set[str], graphs: Sequence[Specialization | Analysis]) -> frozenset[str]:
    """Return the buffers that some graph computes from parameters, or that have shrunk with them."""
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    computed = [each.captured.buffers & each.axis_facts.parameters.keys() for each in graphs]
    return frozenset(shrunk & buffers).union(*computed)


def settled(
    region: str,
    module: nn.Module,
    specializations: Sequence[Specialization],
    state: ModelState,
    more: Sequence[Analysis],
) -> Settled:
    """Let buffers that one graph computes from parameters shrink with these in the graphs that only read them.

    Args:
        region: name of the region.
        module: the region.
        specializations: its captured calls.
        state: of the model.
        more: analyses of calls that come to these.

    Raises:
        PinnedAxisError: a buffer begins to move after a shrink that some graph cannot follow.
    """
    plan = state.plan.copy()
    for analysis in more:
        _plan_late(plan, region, analysis.axis_facts)
    moving = moving_buffers(module, set(plan.under(region)), [*specializations, *more])
    settled_ones = []
    for each in specializations:
        if not moving & each.captured.used() <= each.axis_facts.parameters.keys():
            axis_facts = inferred_again(each.axis_facts, replace(each.captured, moving=moving), state.experiments)
            program = rewrite(axis_facts, replay(axis_facts, plan), module)
            each = Specialization(program, discover(axis_facts))
        settled_ones.append(each)
    named = ((join(region, name), tensor) for name, tensor in named_tensors(module).items())
    change = prepare_tensors(named, state.plan, plan) if plan != state.plan else Change()
    return Settled(settled_ones, plan, change)


def _plan_late(plan: Plan, region: str, axis_facts: AxisFacts) -> None:
    """Write into a plan the entries that stay of buffers which an earlier shrink did not know to be along its axes."""
    late = {
        name: exprs
        for name, exprs in axis_facts.parameters.items()
        if name in axis_facts.captured.buffers and join(region, name) not in plan.original_shapes
    }
    if late:
        write_plan(plan, region, late, selected_by(axis_facts, plan))
