"""Rules by which the state of an optimizer follows a shrink; see `model/optimizer_state.py`."""

from ecospa_fx.model.optimizer_state import *  # noqa: F403
