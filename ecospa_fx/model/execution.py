"""Execution: who runs a compiled model, the programs of its graphs or its own Python."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Execution: TypeAlias = Literal["graph", "module"]
EXECUTIONS = get_args(Execution)
