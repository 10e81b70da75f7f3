"""Recurrent layers: one op runs over all steps, or over one.

A hidden unit is a row of every gate, a column of the recurrent matrix and a column of what reads it. All layers and
directions of one op share the axis of hidden units, because their states lie in one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ecospa_fx.passes.ir.relations import Operand, Pattern

from .operands import tensors
from .registry import axis_rule

aten = torch.ops.aten


def _layers(
    gates: int, steps: str, batch: str, x: Sequence[Operand], states: Sequence[Operand], weights: Sequence[Operand],
    layers: int, biased: bool, bidirectional: bool,
) -> Pattern:  # fmt: skip
    """Write the pattern of an op over all steps; behind its input it may take the sizes of batches per step."""
    directions = 1 + bidirectional
    each = len(weights) // (layers * directions)
    # LSTM can hand on fewer values than it has units. Torch tells that by the sizes, which may not become equal.
    projected = each == 3 + 2 * biased
    hidden = "h!" if projected else "h~"
    out = "p~" if projected else hidden
    rows = f"(g! {hidden})"
    held = [f"+layers! {batch} {name}" for name in (out, hidden)[: len(states)]]
    terms = [f"{steps} i", *("+sizes!" for _ in x[1:]), *held]
    for number in range(layers * directions):
        inputs = "i" if number < directions else f"(d! {out})"
        terms += [f"{rows} {inputs}", f"{rows} {out}", *(f"+{rows}" for _ in range(2 * biased))]
        terms += [f"p~ {hidden}"] * projected
    after = [f"{steps} (d! {out})", *(term[1:] for term in held)]
    sizes = {"g": gates, "d": directions}
    return Pattern(f"{', '.join(terms)} -> {', '.join(after)}", (*x, *states, *weights), sizes=sizes, apart=True)


def _recurrent(gates: int, *ops: Any) -> None:
    def recurrent(x: Operand, states: Any, weights: list[Operand], biased: bool, layers: int, dropout: float,
                  train: bool, bidirectional: bool, batch_first: bool) -> Pattern:  # fmt: skip
        """Gates and steps stay, and so do hidden units that are more than the values handed on."""
        steps = "t!" if x.ndim == 2 else "b t!" if batch_first else "t! b"
        batch = "b" * (x.ndim > 2)
        return _layers(gates, steps, batch, (x,), tensors(states), weights, layers, biased, bidirectional)

    axis_rule(*ops)(recurrent)


def _packed(gates: int, *ops: Any) -> None:
    def packed(x: Operand, batches: Operand, states: Any, weights: list[Operand], biased: bool, layers: int,
               dropout: float, train: bool, bidirectional: bool) -> Pattern:  # fmt: skip
        """Gates and steps stay, and so do hidden units that are more than the values handed on."""
        return _layers(gates, "t!", "b!", (x, batches), tensors(states), weights, layers, biased, bidirectional)

    axis_rule(*ops)(packed)


def _cell(gates: int, *ops: Any) -> None:
    def cell(x: Operand, states: Any, *weights: Operand | None) -> Pattern:
        """Gates stay: each of them has a row per hidden unit."""
        held = tensors(states)
        rows = "(g! h~)"
        terms = ["... i", *("+... h~" for _ in held), f"{rows} i", f"{rows} h~", f"+{rows}", f"+{rows}"]
        operands = (x, *held, *tensors(*weights))
        return Pattern(f"{', '.join(terms)} -> ... h~", operands, sizes={"g": gates}, apart=True)

    axis_rule(*ops)(cell)


_recurrent(4, aten.lstm.input)
_recurrent(3, aten.gru.input)
_recurrent(1, aten.rnn_tanh.input, aten.rnn_relu.input)
_packed(4, aten.lstm.data)
_packed(3, aten.gru.data)
_packed(1, aten.rnn_tanh.data, aten.rnn_relu.data)
_cell(4, aten.lstm_cell.default)
_cell(3, aten.gru_cell.default)
_cell(1, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
