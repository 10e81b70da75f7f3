"""Optimizer rules, by which the state of an optimizer follows a shrink; see `model/optimizer_table.py`."""

from ecospa_fx.model.optimizer_table import (
    Keep,
    OptimizerRules,
    State,
    StateRule,
    TransformsAs,
    elementwise,
    factored,
    register,
    state_rule,
    take,
)

__all__ = [
    "Keep",
    "OptimizerRules",
    "State",
    "StateRule",
    "TransformsAs",
    "elementwise",
    "factored",
    "register",
    "state_rule",
    "take",
]
