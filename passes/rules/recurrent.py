"""Recurrent layers: one op runs over all steps, or over one."""

from __future__ import annotations

from typing import Any

import torch

from ecospa_fx.passes.ir.relations import Operand, Pattern

from .operands import spaced, tensors
from .registry import axis_rule, refuse

aten = torch.ops.aten


@axis_rule(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def recurrent(x: Operand, states: Any, weights: list[Operand], biased: bool, layers: int, dropout: float, train: bool,
              bidirectional: bool, batch_first: bool) -> Pattern:  # fmt: skip
    """Hidden entries depend on each other from step to step."""
    steps = "t!" if x.ndim == 2 else "b t!" if batch_first else "t! b"
    batch = "b" * (x.ndim > 2)
    before = tensors(states)
    directions = 1 + bidirectional
    each = len(weights) // (layers * directions)
    terms = [f"{steps} i", *(f"layers{n}! {batch} h{n}!" for n in range(len(before)))]
    for number, weight in enumerate(weights):
        first = number // each < directions and number % each == 0  # its columns take the inputs
        terms.append(f"g{number}! i" if first else f"+{spaced(f'w{number}_', weight.ndim, '!')}")
    after = [f"{steps} out!", *(f"layers{n}! {batch} h{n}!" for n in range(len(before)))]
    return Pattern(f"{', '.join(terms)} -> {', '.join(after)}", (x, *before, *weights), apart=True)


refuse(
    "The steps of packed sequences lie in one dim, and hidden entries depend on each other from step to step",
    aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data,
)  # fmt: skip


@axis_rule(aten.lstm_cell.default)
def lstm_cell(x: Operand, states: list[Operand], *weights: Operand | None) -> Pattern:
    """Hidden entries depend on each other from step to step."""
    spec = "... i, +... h!, +... h!, gates! i, +gates! h!, +gates!, +gates! -> ... h!"
    return Pattern(spec, tensors(x, states, *weights), apart=True)


@axis_rule(aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
def cell(x: Operand, state: Operand, *weights: Operand | None) -> Pattern:
    """Hidden entries depend on each other from step to step."""
    spec = "... i, +... h!, gates! i, +gates! h!, +gates!, +gates! -> ... h!"
    return Pattern(spec, tensors(x, state, *weights), apart=True)
