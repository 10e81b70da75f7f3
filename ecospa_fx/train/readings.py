"""Readings: the gradients that a trainer reads, and whether a decision can be made from them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from ecospa_fx.errors import OptimizerError
from ecospa_fx.score.estimator import CoupledEstimator
from ecospa_fx.score.reader import FREED_GRADIENT
from ecospa_fx.score.step_watcher import StepWatcher

from .foreign_steps import ForeignSteps
from .left_out import FROZEN_ALL, all_frozen, check_offered
from .settings import Gradients


class Readings:
    """Reads gradients for the estimators of a policy, at the time that a setting says.

    Args:
        model: the model.
        optimizers: the trainer's.
        estimators: those of its policy.
        gradients: when they are read, see `EcoSpaTrainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        estimators: Sequence[CoupledEstimator],
        gradients: Gradients,
    ) -> None:
        self.model, self.optimizers, self.estimators, self.gradients = model, optimizers, estimators, gradients
        self.steps: StepWatcher | None = None
        self._foreign: ForeignSteps | None = None
        self.attach()

    def attach(self) -> None:
        """Watch the optimizers, and read gradients in hooks where the setting says so; not a second time."""
        if self._foreign is not None:
            return
        self._foreign = ForeignSteps(self.model, self.optimizers)
        if self.gradients == "step":
            self.steps = StepWatcher(self.model, self.optimizers)
        for estimator in self.estimators:
            if self.gradients == "optimizer":
                estimator.attach(*self.optimizers)
            elif self.gradients == "backward":
                estimator.attach_backward()

    def read(self) -> bool:
        """Read the gradients of this step, unless hooks do; return whether an optimizer took the step.

        Raises:
            OptimizerError: hooks read in backward, and others have freed the gradients before.
        """
        if self.steps is None:
            if self.gradients == "backward" and any(e.empty and e.steps for e in self.estimators):
                raise OptimizerError(FREED_GRADIENT)
            return True
        readings = list(self.steps.readings())
        for estimator in self.estimators:
            for number, reading in enumerate(readings):
                estimator.accumulate(**reading._asdict(), new_step=number == 0)
        return bool(readings)

    @property
    def all_frozen(self) -> bool:
        """True if it is gradients that decide, and no coupling has a weight that trains."""
        return all_frozen(self.model, self.estimators)

    def must_wait(self, read: bool) -> bool:
        """Return whether a decision waits: for a step that no scaler skips, or for a weight that trains."""
        return self.all_frozen or any((not read and each.empty) or each.all_skipped for each in self.estimators)

    def check(self) -> None:
        """Refuse a decision that there is nothing to make from.

        Raises:
            NoCouplingError: calls of the model have withdrawn every coupling.
            OptimizerError: there were no gradients, or none but zeros; or an optimizer that is not the trainer's steps.
        """
        check_offered(self.model)
        lacking = [each.reader.lacking() for each in self.estimators]
        if self._foreign is not None:
            self._foreign.check(stateless=any(lacking))
        for each, message in zip(self.estimators, lacking, strict=True):
            if message is not None:
                raise OptimizerError(FROZEN_ALL if all_frozen(self.model, [each]) else message)

    def reset(self) -> None:
        """Begin anew, after a decision."""
        for estimator in self.estimators:
            estimator.reset()

    def detach(self) -> None:
        """Remove all hooks, until `attach`."""
        for estimator in self.estimators:
            estimator.detach()
        if self.steps is not None:
            self.steps.detach()
        if self._foreign is not None:
            self._foreign.detach()
            self._foreign = None
