"""Recurrent layers: one op runs over all steps."""

from __future__ import annotations

from typing import Any

import torch

from ecospa_fx.passes.ir.relations import Opaque, Operand

from .registry import axis_rule

aten = torch.ops.aten


@axis_rule(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def recurrent(x: Operand, state: Any, weights: list[Operand], biased: bool, layers: int, *options: Any) -> Opaque:
    """Hidden entries depend on each other from step to step."""
    *_, bidirectional, _ = options
    # The first layer multiplies the input with a weight per direction; everything else is hidden.
    directions = 2 if bidirectional else 1
    first = [weights[i * len(weights) // (layers * directions)] for i in range(directions)]
    states = state if isinstance(state, (list, tuple)) else (state,)
    return Opaque((x, *states, *weights), ((x, x.ndim - 1), *((weight, 1) for weight in first)))
