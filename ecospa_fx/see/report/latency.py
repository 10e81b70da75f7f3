"""Latency: the time of a forward before and after, measured side by side, so that other load meets both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ecospa_fx.arguments import INPUTS, KEYWORDS, MODULE, optional, takes
from ecospa_fx.errors import ArgumentError
from ecospa_fx.train.timing import in_turn

KEYS = ("before", "after", "ratio", "low", "high", "rounds", "where")


@takes(before=MODULE, after=MODULE, inputs=INPUTS, kwargs=optional(KEYWORDS))
def latency_of(
    before: nn.Module,
    after: nn.Module,
    inputs: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    rounds: int = 21,
) -> dict[str, Any]:
    """Time a forward of two models in turn, in eval mode and without gradients.

    >>> explanation.report("small.html", latency=ecospa_fx.report.latency_of(whole, model, (x,)))

    Args:
        before: the model at its original size; its weights do not matter.
        after: the model as it is now.
        inputs: positional arguments of the call.
        kwargs: keyword arguments of it.
        rounds: calls of each; every round has one of both.

    Returns:
        Plain values: `before` and `after`, median seconds; `ratio`, the median over rounds of after / before, with the
        middle half of the rounds from `low` to `high`; `rounds`; `where`, the device and the threads.

    Raises:
        ArgumentError: `rounds` is below 2.
    """
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 2:
        raise ArgumentError(f"latency_of: `rounds` is {rounds!r}; it must be a whole number, at least 2")
    seconds = in_turn((before, after), lambda model: model(*inputs, **(kwargs or {})), rounds, time.perf_counter)
    slow, fast = zip(*seconds, strict=True)
    low, ratio, high = statistics.quantiles([b / a for a, b in seconds], n=4, method="inclusive")
    return {
        "before": statistics.median(slow), "after": statistics.median(fast), "ratio": ratio, "low": low, "high": high,
        "rounds": rounds, "where": _device(after),
    }  # fmt: skip


def words_of(latency: Mapping[str, Any]) -> str:
    """Format a measurement in a line."""
    before, after = (f"{1e3 * latency[key]:.3g}" for key in ("before", "after"))
    return (
        f"a forward takes {after} ms, before {before} ms (x {latency['ratio']:.2f}, middle half {latency['low']:.2f} "
        f"to {latency['high']:.2f}, on {latency['where']})"
    )


def _device(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.is_cuda:
        return torch.cuda.get_device_name(parameter.device)
    threads = torch.get_num_threads()
    return f"{'cpu' if parameter is None else parameter.device.type}, {threads} thread{'s' if threads > 1 else ''}"
