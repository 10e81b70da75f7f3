"""ModelState: the plan of a compiled model, and whatever else all of its regions read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import EcoSpaError
from ecospa_fx.passes.capture.options import CaptureOptions
from ecospa_fx.passes.capture.outside_numbers import Place
from ecospa_fx.passes.find.analyse import Captures
from ecospa_fx.passes.find.flow import RegionFlow
from ecospa_fx.passes.find.joint import Joint
from ecospa_fx.passes.find.left_whole import Refusal
from ecospa_fx.passes.follow.attributes import Changes
from ecospa_fx.plan import Plan
from ecospa_fx.ranks.tensor_parallel import Sharding

from .execution import EXECUTIONS, Execution
from .recorded_call import RecordedCall


class ModelState:
    """The part of a compiled model that its regions share.

    Attributes:
        execution: `"graph"` runs generated code, `"module"` the model's own Python.
        experiments: whether an op without an axis rule may get one by experiment.
        plan: the entries that every parameter keeps.
        attributes: the integers of modules that follow shrinks, with the value before any shrink and now.
        captures: the analyses that equal blocks share.
        joints: the couplings that cross the edges of regions, at original sizes.
        joint_refusals: axes that cross them and cannot shrink, with the reasons.
        flow: the calls of regions in the forward that was captured; None where no coupling crosses their edges, or
            after a load.
        numbers: places of the numbers that the model's own Python reads outside of the regions; None where that is not
            known, as after the load of an earlier version's save.
        withheld: names of joints that some call before a save could not follow.
        elsewhere: names of couplings that this rank could shrink, and another one cannot.
        shared_out: (parameter, dim) -> how it is sharded, where tensor parallelism shares it out.
        couplings: the couplings by name at their sizes now; None until somebody asks for them.
        call: the first call of the whole model; None where it cannot be made again.
    """

    def __init__(self, experiments: bool = False, execution: Execution = "graph") -> None:
        if execution not in EXECUTIONS:
            raise EcoSpaError(f"execution={execution!r} is none of {', '.join(map(repr, EXECUTIONS))}")
        self.execution, self.experiments = execution, experiments
        self.plan = Plan()
        self.attributes: Changes = {}
        self.captures: Captures = []
        self.joints: tuple[Joint, ...] = ()
        self.joint_refusals: tuple[Refusal, ...] = ()
        self.flow: RegionFlow | None = None
        self.numbers: frozenset[Place] | None = None
        self.withheld: frozenset[str] = frozenset()
        self.elsewhere: frozenset[str] = frozenset()
        self.shared_out: Mapping[tuple[str, int], Sharding] = {}
        self.couplings: dict[str, Coupling] | None = None
        self.call: RecordedCall | None = None

    @property
    def options(self) -> CaptureOptions:
        """The options of every capture of the model."""
        return CaptureOptions(self.experiments, objects=self.execution == "graph")

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle writes: without graphs, which the next call captures again."""
        return {**self.__dict__, "captures": [], "couplings": None, "shared_out": {}, "flow": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelState:
        """Copy the state for a copy of the model; analyses never change and are shared."""
        memo[id(self)] = twin = object.__new__(type(self))
        copied = {key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()}
        twin.__dict__ |= {**copied, "captures": list(self.captures), "flow": self.flow}
        return twin

    def adopt(self, plan: Plan, attributes: Changes) -> None:
        """Take up the plan that a shrink has led to."""
        self.plan, self.attributes = plan, attributes
        self.forget_couplings()

    def forget_couplings(self) -> None:
        """Drop the couplings, so that the next look computes them again."""
        self.couplings = None
