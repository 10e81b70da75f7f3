"""Recurrent layers: one op runs over all steps."""

from __future__ import annotations

from typing import Any

import torch

from ecospa_fx.passes.ir.relations import Opaque, Operand

from .registry import axis_rule

aten = torch.ops.aten


@axis_rule(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def recurrent(*args: Any) -> Opaque:
    """Hidden entries depend on each other from step to step."""
    flat = [item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    return Opaque(tuple(item for item in flat if isinstance(item, Operand)))
