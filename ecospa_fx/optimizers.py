"""Optimizer rules, by which the state of an optimizer follows a shrink; see `model/optimizer_table.py`."""

from ecospa_fx.model.optimizer_state import *  # noqa: F403
from ecospa_fx.model.optimizer_table import *  # noqa: F403
