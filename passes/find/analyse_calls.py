"""Analysis of all calls: one region, analysed for every call of another signature in a forward of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from ecospa_fx.errors import CaptureError
from ecospa_fx.passes.capture.options import CaptureOptions
from ecospa_fx.passes.graph.shared_memory import SharedMemory
from ecospa_fx.passes.ir.region_graph import Call
from ecospa_fx.passes.ir.signature import training_flags

from .analyse import Analysis, Captures, analyse_once


def analyse_calls(
    model: nn.Module,
    name: str,
    calls: Sequence[Call],
    captures: Captures,
    memory: SharedMemory,
    used_outside: Mapping[str, str],
    options: CaptureOptions,
) -> Analysis:
    """Analyse one region for every call of another signature in a forward of the model."""
    if name in used_outside:
        raise CaptureError(f"region `{name}` cannot be captured by itself: {used_outside[name]}")
    module, outside = model.get_submodule(name), memory.outside(name)
    analyses = [analyse_once(module, name, calls[0], outside, captures, options=options)]
    for call in calls[1:]:
        training = training_flags(module)
        if all(analysis.captured.difference(call, module, training) is not None for analysis in analyses):
            analyses.append(analyse_once(module, name, call, outside, captures, options=options))
    return replace(analyses[0], others=tuple(analyses[1:]))
