"""Optimizer rules, by which the state of an optimizer follows a shrink; see `model/optimizer_state.py`."""

from ecospa_fx.model.optimizer_state import AVERAGES, Keep, State, StateRule, elementwise, factored, state_rule, take

__all__ = ["AVERAGES", "Keep", "State", "StateRule", "elementwise", "factored", "state_rule", "take"]
