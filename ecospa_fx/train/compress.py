"""Compression: a trained model made smaller in one call, with a few batches of the data that it is for.

batches -> gradients at every position -> widths, entries     as `policy="adaptive"` decides
        -> moments of the inputs of weights -> what stays takes over, chosen by batches held out (`stroke.py`)
again, `steps` times, with fresh statistics of the smaller model
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ecospa_fx.api import compile as compiled
from ecospa_fx.arguments import FUNCTION, MAPPING, MODULE, NAMES, NUMBER, SEVERAL, TEXT, WHOLE, either, optional, takes
from ecospa_fx.couple.constraints import Constraints, Uniform
from ecospa_fx.errors import TargetError
from ecospa_fx.logs import logger
from ecospa_fx.model.compiled import MODEL
from ecospa_fx.model.cost import Cost
from ecospa_fx.model.lookup import check_values, couplings
from ecospa_fx.ranks.wrappers import unwrapped
from ecospa_fx.score.scores import score_named
from ecospa_fx.text import plural
from ecospa_fx.text import size as sized

from .adaptive import AdaptiveSparsifier
from .deployable import Deployable, check_deployable, deployment
from .latency import Latency
from .measuring import (
    as_it_was_unless_shrunk,
    check_kinds,
    check_plain_numbers,
    evaluating,
    listed_calls,
    value_of,
)
from .objective import Loss, Objective
from .settings import Among, DecisionSettings
from .stroke import Stroke
from .targets import Target, at_once

EVERY, MOST = 8, 2
"""One batch in so many is held out, if there are as many, and `MOST` of them. They do not say what entries are worth:
on SmolLM2, with four batches of 512 tokens, perplexity after 20% of the FFNs was 41.6 with one of them held out, and
34.9 with none."""


@dataclass(frozen=True)
class Compression:
    """The result of `compress`; print it.

    Attributes:
        removed: coupling name -> entries before and after.
        expected: coupling name -> expected rise of the loss without compensation, in the unit of the costs.
        left: name of a weight that took over -> share of the squares of the removed part that nothing took over.
        loss: loss of the batches held out (of all, if there were fewer than eight) before and after.
        parameters: their number before and after.
        size: bytes of parameters and buffers before and after.
        latency: seconds of a forward of the first batch, and of its loss, before and after.
        seconds: seconds that all of it took.
        notes: what was left out, or done otherwise, and why.
    """

    removed: Mapping[str, tuple[int, int]]
    expected: Mapping[str, float]
    left: Mapping[str, float]
    loss: tuple[float, float]
    parameters: tuple[int, int]
    size: tuple[int, int]
    latency: tuple[float, float]
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def rise(self) -> float:
        """The measured rise of the loss."""
        return self.loss[1] - self.loss[0]

    def __str__(self) -> str:
        (before, after), (dense, small), (slow, fast) = self.parameters, self.loss, self.latency
        gone = [f"  {name}: {size} -> {keep}" for name, (size, keep) in self.removed.items()]
        left = sorted(self.left.values())
        lines = [
            f"{before:,} -> {after:,} parameters ({after / before:.1%}), {sized(self.size[0])} -> "
            f"{sized(self.size[1])}, {plural(len(gone), 'coupling')}, in {self.seconds:.1f} s",
            f"loss {dense:.4g} -> {small:.4g} ({small - dense:+.2g}), forward {slow * 1e3:.3g} -> {fast * 1e3:.3g} ms",
        ]
        if left:
            lines.append(f"of what was removed {left[len(left) // 2]:.0%} is taken over by nothing (median of weights)")
        return "\n".join([*lines, *gone, *(f"note: {note}" for note in self.notes)])


@takes(
    model=MODULE, batches=SEVERAL, target=either(NUMBER, MAPPING), kinds=optional(either(NAMES, TEXT)), steps=WHOLE,
    loss=optional(FUNCTION), heal=optional(FUNCTION), scores=optional(MAPPING),
)  # fmt: skip
def compress(
    model: nn.Module,
    batches: Iterable[Any],
    target: Target = 0.7,
    *,
    among: Among = "all",
    kinds: Collection[str] | None = None,
    cost: Cost | Latency = "parameters",
    uniform: Uniform | None = None,
    min_keep: int = 1,
    deployable: Deployable | None = None,
    loss: Loss | None = None,
    steps: int = 1,
    heal: Callable[[nn.Module], object] | None = None,
    scores: Mapping[str, str] | None = None,
) -> Compression:
    """Make a trained model smaller, in place, with a few batches of the data that it is for; labels are not needed.

    >>> report = ecospa_fx.compress(model, batches, target=0.7)
    >>> print(report)

    Entries go by the squared change of the loss without them, position by position, no more in a coupling than 1.15
    times the mean share of its kind; those that stay take over, as far as that holds on batches that were held out.

    Args:
        model: any module; it is compiled if it is not. Its gradients and its mode stay as they are.
        batches: calls of the model: a mapping of keyword arguments, a tuple of positional ones, or one input. All of
            them are kept in memory while it runs. Eight calls of 512 positions or more are a good number. Beside the
            model there must be room for a forward and backward of one of them.
        target: share of the cost that remains; or of the entries of each kind, see `EcoSpaTrainer`.
        among: `"all"` of the cost, or the `"prunable"` part, which lies on some coupling.
        kinds: kinds of coupling that may shrink; None: all.
        cost: see `EcoSpaTrainer`.
        uniform: see `Constraints`.
        min_keep: see `Constraints`; with 0 whole sublayers may go, where that costs less than entries of many.
        deployable: see `EcoSpaTrainer`; with `"transformers"`, `save_pretrained` writes what plain transformers loads.
        loss: `loss(model, batch)` -> a scalar; it is called several times with a batch, and broken off where only the
            first layers of the model are looked at. By default that of the model's result if it has one, or the scalar
            that it returns alone or first; else of labels drawn from its own logits, or of a random projection of its
            outputs.
        steps: strokes; each has fresh statistics, and takes as long as the first.
        heal: called with the model after each stroke, such as a few steps of training. An error in it is raised, and
            leaves the model as it is then.
        scores: kind -> the score that says which entries of its couplings go, `{"experts": "reap"}`; how many go is
            decided as ever. One that reads gradients reads those of the loss of all batches together, for which the
            weights of these couplings hold gradients: it says little without `loss` or labels.

    Returns:
        A report of what went and what it cost.

    Raises:
        TargetError: there are no batches, the model cannot be called with one, the loss is not a finite number, the
            weights are quantised, or the target cannot be reached. Nothing has changed then.
    """
    begun, module = time.perf_counter(), unwrapped(model)
    if steps < 1:
        raise TargetError(f"steps={steps} is out of range; it is a whole number, at least 1")
    DecisionSettings(target, cost, among).check()
    check_kinds(kinds)
    _check_scores(scores or {})
    Constraints(min_keep, uniform=uniform)
    check_values(module, "compress")
    check_deployable(module, deployable)
    calls = listed_calls(batches)
    check_plain_numbers(module)
    own = Objective()
    objective: Loss = loss or own
    measured: Loss = loss or own.measured
    notes: list[str] = []
    held = range(EVERY - 1, len(calls), EVERY)[:MOST]
    judges = [calls[number] for number in held] or calls
    if not held:
        notes.append(f"{len(calls)} batches are too few to hold some out: pass {EVERY} or more")
    with as_it_was_unless_shrunk(module), evaluating(module):
        if MODEL not in module.__dict__:
            with torch.no_grad():
                value_of(objective, module, calls[0], 0)  # its own Python says best what is wrong with a batch
            compiled(module)
        with torch.no_grad():
            dense = [value_of(measured, module, batch, number) for number, batch in enumerate(judges)]
        constraints = _constraints(module, kinds, uniform, min_keep, deployable, notes)
        latency, size = _seconds(measured, module, calls[0]), _size(module)
        before = {c.name: c.size for c in couplings(module)}
        AdaptiveSparsifier(module, target=target, constraints=constraints, cost=cost, among=among)  # is it reachable?
        expected: dict[str, float] = {}
        left: dict[str, float] = {}
        for number in range(1, steps + 1):
            if number > 1:
                constraints = _constraints(module, kinds, uniform, min_keep, deployable)
            settings = DecisionSettings(at_once(target, number / steps), cost, among)
            stroke = Stroke(module, constraints, settings, scores or {})
            stroke.run(calls, held, objective)
            expected = {name: expected.get(name, 0.0) + rise for name, rise in stroke.rises.items()}
            left |= stroke.left
            notes += [note for note in stroke.notes if note not in notes]
            logger("shrink").info("stroke %d of %d: %s parameters are left", number, steps, f"{_size(module)[0]:,}")
            if heal is not None:
                heal(module)
        with torch.no_grad():
            small = [value_of(measured, module, batch, number) for number, batch in enumerate(judges)]
        after = {c.name: c.size for c in couplings(module)}
        return Compression(
            {name: (entries, after[name]) for name, entries in before.items() if after.get(name, entries) != entries},
            expected, left, (sum(dense) / len(dense), sum(small) / len(small)), (size[0], _size(module)[0]),
            (size[1], _size(module)[1]), (latency, _seconds(measured, module, calls[0])), time.perf_counter() - begun,
            tuple(notes),
        )  # fmt: skip


def _check_scores(scores: Mapping[str, str]) -> None:
    """Refuse scores that cannot be had, or that say nothing of their kind."""
    check_kinds(list(scores) or None)
    for kind, name in scores.items():
        score = score_named(name, f"scores[{kind!r}]")
        known = score.reads in ("gradients", "experts", "weights", "nothing")
        if not known or (score.reads == "experts" and kind != "experts"):
            raise TargetError(
                f"scores={{{kind!r}: {name!r}}}: it reads {score.reads}, and compress has none of these for {kind}; "
                "for experts there are 'reap' and 'frequency', for all kinds 'taylor' and others that read gradients, "
                "'magnitude' and 'random', or leave it out"
            )


def _constraints(
    model: nn.Module, kinds: Collection[str] | None, uniform: Uniform | None, min_keep: int,
    deployable: Deployable | None, notes: list[str] | None = None,
) -> Constraints:  # fmt: skip
    """Keep the couplings of other kinds whole, at the sizes that they have now; note what `deployable` forbids."""
    frozen = [each for each in couplings(model) if kinds is not None and each.kind not in kinds]
    constraints = Constraints(min_keep, frozen=frozen, uniform=uniform)
    if deployable is None:
        return constraints
    found = deployment(model, deployable, constraints)
    if notes is not None:
        notes.append(str(found))
    return found.constraints


@torch.no_grad()
def _seconds(measured: Loss, model: nn.Module, batch: Any) -> float:
    """Time a forward and its loss, called as all batches are: the quicker of two."""
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        value_of(measured, model, batch, 0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _size(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters, and the bytes of these and of buffers."""
    parameters = list(model.parameters())
    tensors = [*parameters, *model.buffers()]
    return sum(p.numel() for p in parameters), sum(t.numel() * t.element_size() for t in tensors)
