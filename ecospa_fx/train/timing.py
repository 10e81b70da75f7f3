"""Timing: models called in turn, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from ecospa_fx.passes.follow.trial import in_eval_mode

FIRST_CALLS = 3
"""The first calls capture, allocate and tune."""


@torch.no_grad()
def in_turn(
    models: Sequence[nn.Module],
    call: Callable[[nn.Module], object],
    rounds: int,
    clock: Callable[[], float],
) -> list[tuple[float, ...]]:
    """Time a call of each model in every round, in eval mode and without gradients.

    Args:
        models: what to time; each is in its mode of before afterwards.
        call: calls one of them.
        rounds: how many count; `FIRST_CALLS` more come before.
        clock: returns seconds.

    Returns:
        For each round the seconds of each model, in the order of `models`.
    """
    seconds: list[tuple[float, ...]] = []
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(in_eval_mode(model))
        for turn in range(FIRST_CALLS + rounds):
            order = range(len(models)) if turn % 2 == 0 else reversed(range(len(models)))  # none is always the first
            found = {place: _timed(models[place], call, clock) for place in order}
            if turn >= FIRST_CALLS:
                seconds.append(tuple(found[place] for place in range(len(models))))
    return seconds


def _timed(model: nn.Module, call: Callable[[nn.Module], object], clock: Callable[[], float]) -> float:
    _wait(model)
    begun = clock()
    call(model)
    _wait(model)
    return clock() - begun


def _wait(model: nn.Module) -> None:
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.is_cuda:
        torch.cuda.synchronize(parameter.device)
