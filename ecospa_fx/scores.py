"""Scores: what an entry of a weight is worth; see `score/scores.py`."""

from ecospa_fx.score.scores import *  # noqa: F403
