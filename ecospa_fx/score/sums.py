"""Sums: sums of scores over training steps, by one of several rules, that follow the model through shrinks.

tensors of one step -> SliceTotals -> SliceSums, one launch -> means per (parameter, dim)
                         and a rule: Total, Average, LastSteps, Latest
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.couple.coupling import Coupling
from ecospa_fx.errors import TargetError
from ecospa_fx.model.lookup import couplings, is_captured, plan
from ecospa_fx.passes.graph.tensors import parameters_of
from ecospa_fx.ranks.fsdp2 import reshard

from .slices import SliceKey, SliceSums, counts_here


@dataclass
class StepCount:
    """Training steps since the last reset.

    Attributes:
        seen: steps that were read.
        skipped: how many of them a gradient scaler left out; on the device of the gradients, which nothing waits for.
    """

    seen: int = 0
    skipped: Tensor | None = None

    @property
    def taken(self) -> int:
        """Steps that were not left out, at least 1."""
        return max(self.seen - (0 if self.skipped is None else int(self.skipped)), 1)

    def note(self, found_inf: Tensor | None, new_step: bool) -> None:
        """Count a new step as left out, unless `found_inf` is 0."""
        if found_inf is not None and new_step:
            one = found_inf.detach().clamp(max=1)
            self.skipped = one if self.skipped is None else self.skipped.add_(one)

    def reset(self) -> None:
        """Count from 0 again, in the same memory."""
        self.seen = 0
        if self.skipped is not None:
            self.skipped.zero_()


class Total:
    """The rule by which the sums of one step join those of the steps before: all count equally.

    Attributes:
        decay: factor on the sums so far.
        gain: factor on what a step adds.
        steps: sums of single steps, the oldest first, where a rule keeps them apart.
    """

    decay, gain = 1.0, 1.0

    def __init__(self) -> None:
        self.steps: deque[dict[SliceKey, Tensor]] = deque()

    def record(
        self, sums: Mapping[SliceKey, Tensor], names: Container[str], new_step: bool, found_inf: Tensor | None
    ) -> None:
        """Take notice that a step has been added to the sums of these parameters."""

    def restore(self, sums: Mapping[SliceKey, Tensor]) -> None:
        """Write into the sums what they come to over all steps that count."""

    def divisor(self, count: StepCount) -> float:
        """Return what the sums are divided by to be means over steps."""
        return count.taken


class Average(Total):
    """An exponential moving average, as the second moment of Adam.

    Args:
        decay: share of the average that stays at each step.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay, self.gain = decay, 1.0 - decay

    def divisor(self, count: StepCount) -> float:
        """Return the share of a whole average that one begun at 0 has reached."""
        return 1.0 - self.decay**count.taken


class LastSteps(Total):
    """The sums of the last few steps, each kept apart, so that it can be taken out again.

    Args:
        length: how many steps.
    """

    decay = 0.0

    def __init__(self, length: int) -> None:
        super().__init__()
        self.steps = deque(maxlen=length)

    def record(
        self, sums: Mapping[SliceKey, Tensor], names: Container[str], new_step: bool, found_inf: Tensor | None
    ) -> None:
        """Keep the sums of the step, unless it was left out, for which a GPU must be waited for."""
        if found_inf is not None and bool(found_inf):
            return
        if new_step or not self.steps:
            self.steps.append({})
        self.steps[-1].update({key: added.clone() for key, added in sums.items() if key[0] in names})

    def restore(self, sums: Mapping[SliceKey, Tensor]) -> None:
        """Write the sums over the steps that are kept."""
        for key, total in sums.items():
            total.copy_(sum((step[key] for step in self.steps if key in step), torch.zeros_like(total)))

    def divisor(self, count: StepCount) -> float:
        """Return the number of steps that are kept."""
        return max(1, len(self.steps))


class Latest(Total):
    """The sums of one reading, which replaces the one before."""

    decay = 0.0

    def divisor(self, count: StepCount) -> float:
        """Return 1."""
        return 1.0


def accumulation(decay: float | None, window: int | None) -> Total:
    """Choose the rule for two settings, of which at most one is given.

    Raises:
        TargetError: one is out of range, or both are given.
    """
    if decay is not None and (not isinstance(decay, (int, float)) or not 0.0 < decay < 1.0):
        raise TargetError(f"decay={decay!r} is not between 0 and 1; None adds all steps up")
    if window is not None and (not isinstance(window, int) or not 1 <= window < 2**31):
        raise TargetError(f"window={window!r} is out of range; it is a whole number of steps, at least 1")
    if window is not None and decay is not None:
        raise TargetError(f"decay={decay!r} and window={window!r}: one of them forgets, not both; leave one out")
    if window is not None:
        return LastSteps(window)
    return Total() if decay is None else Average(decay)


class SliceTotals:
    """Sums for each row and column that couplings lie on, of matrices only; they follow the model through shrinks.

    Args:
        model: a compiled model.
        rule: how steps are added up.
        weighted: add up `(w * g)²` in place of `g²`.

    Attributes:
        sums: (parameter, dim) -> sums of each slice; only of tensors that were added. Where parameters are sharded, the
            share of this rank.
    """

    def __init__(self, model: nn.Module, rule: Total, *, weighted: bool = False) -> None:
        self.model, self.rule, self.weighted = model, rule, weighted
        self.sums: dict[SliceKey, Tensor] = {}
        self._slices: SliceSums | None = None
        self._built_for: tuple[Coupling | None, dict[SliceKey, Tensor] | None] = (None, None)
        self._positions: dict[SliceKey, Tensor] = {}  # original positions of what _slices scores, where not all

    def add(
        self,
        tensors: Mapping[str, Tensor],
        parameters: Mapping[str, Any],
        *,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        new_step: bool = True,
    ) -> None:
        """Add the squares of tensors of the parameters' shapes; arguments as those of `SliceSums.add`."""
        slices, rule = self.current(), self.rule
        slices.add(
            tensors, parameters if slices.weighted else None,
            decay=rule.decay, gain=rule.gain, scale=scale, found_inf=found_inf,
        )  # fmt: skip
        for name in tensors:
            for dim in slices.dims.get(name, ()):
                self.sums.setdefault((name, dim), slices.views[name, dim])
        rule.record(self.sums, tensors, new_step, found_inf)

    def replace(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> None:
        """Replace the sums by those of these tensors."""
        self.sums.clear()
        self.add(tensors, parameters)

    def means(self, count: StepCount) -> dict[SliceKey, Tensor]:
        """Return for each slice the mean of its entries per step, float64 on the CPU, added up over ranks."""
        parameters = dict(parameters_of(self.model))
        self.rule.restore(self.sums)
        reduced, divisor = self.current().reduced(), self.rule.divisor(count)
        numels = {name: parameters[name].numel() for name in {name for name, _ in self.sums}}
        return {
            (name, dim): reduced[name, dim].double() / (numels[name] // max(1, len(reduced[name, dim]))) / divisor
            for name, dim in self.sums
        }

    def reset(self) -> None:
        """Set the sums to 0, in the same memory."""
        self.sums.clear()
        self.rule.steps.clear()
        if self._slices is not None:
            self._slices.zero()

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, at the sizes of the model now.

        Where parameters are sharded these are the sums over all ranks, and every rank must call it.
        """
        reshard(self.model)
        whole: Callable[[Mapping[SliceKey, Tensor]], Mapping[SliceKey, Tensor]] = dict
        if self.sums and is_captured(self.model):
            slices = self.current()  # without what a shrink since then has removed
            whole = slices.whole if slices.sharded else whole
        return labelled(self.sums, self.rule, whole)

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Go on with the sums that `tensors` returned; where parameters are sharded they count on one rank."""
        reshard(self.model)
        parameters = dict(parameters_of(self.model, remove_duplicate=False))
        names = {label: key_of(label.rpartition(": ")[2])[0] for label in named}
        counted = {
            label: tensor if counts_here(parameters.get(names[label])) else torch.zeros_like(tensor)
            for label, tensor in named.items()
        }
        self.sums = unlabelled(counted, self.rule)

    def current(self) -> SliceSums:
        """Return the sums of the model as it is now; they are carried over, without what a shrink removed."""
        offered = couplings(self.model)
        built_for, sums = self._built_for
        first = offered[0] if offered else None
        if self._slices is not None and sums is self.sums and built_for is first:
            return self._slices
        parameters, kept = dict(parameters_of(self.model)), plan(self.model).kept
        slices = SliceSums(parameters, _scored_dims(offered, parameters), weighted=self.weighted)
        carried = {key: old for key, old in self.sums.items() if key in slices.views}

        def remaining(key: SliceKey, old: Tensor) -> Tensor:
            if old.shape == slices.views[key].shape:
                return old
            before = self._positions.get(key)
            before = torch.arange(len(old)) if before is None else before
            return old[torch.isin(before, kept[key]).to(old.device)]

        for key, old in carried.items():
            slices.views[key].copy_(remaining(key, old))
        steps = [
            {key: remaining(key, old).to(slices.views[key].device) for key, old in step.items() if key in slices.views}
            for step in self.rule.steps
        ]
        self.rule.steps = deque(steps, maxlen=self.rule.steps.maxlen)
        self.sums = {key: slices.views[key] for key in carried}
        self._slices, self._built_for, self._positions = slices, (first, self.sums), kept
        return slices


def label_of(key: SliceKey) -> str:
    """Name a slice key in a saved state."""
    name, dim = key
    return f"{name}[{dim}]"


def key_of(label: str) -> SliceKey:
    """Read what `label_of` wrote."""
    name, _, dim = label.removesuffix("]").rpartition("[")
    return name, int(dim)


def labelled(
    sums: Mapping[SliceKey, Tensor],
    rule: Total,
    whole: Callable[[Mapping[SliceKey, Tensor]], Mapping[SliceKey, Tensor]] = dict,
) -> dict[str, Tensor]:
    """Return sums, and those of single steps that a rule keeps, by name; each read through `whole`."""
    named = {label_of(key): each for key, each in whole(sums).items()}
    for i, step in enumerate(rule.steps):
        named |= {f"step {i}: {label_of(key)}": each for key, each in whole(step).items()}
    return named


def unlabelled(named: Mapping[str, Tensor], rule: Total) -> dict[SliceKey, Tensor]:
    """Return the sums that `labelled` has named, and put those of single steps back into the rule."""
    whole: dict[SliceKey, Tensor] = {}
    steps: dict[int, dict[SliceKey, Tensor]] = {}
    for name, tensor in named.items():
        step, _, label = name.rpartition(": ")
        sums = steps.setdefault(int(step.split()[1]), {}) if step else whole
        sums[key_of(label)] = tensor
    rule.steps.clear()
    rule.steps.extend(steps[i] for i in sorted(steps))
    return whole


def _scored_dims(offered: Iterable[Coupling], parameters: Mapping[str, Any]) -> dict[str, set[int]]:
    """Collect the dims of matrices that couplings lie on."""
    dims: dict[str, set[int]] = {}
    for coupling in offered:
        for member in coupling.members:
            if member.matrix and member.parameter in parameters:
                dims.setdefault(member.parameter, set()).add(member.dim)
    return dims
