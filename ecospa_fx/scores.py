"""Scores: what an entry of a weight is worth; see `score/scores.py`."""

from ecospa_fx.score.judging import index_scores as index_scores
from ecospa_fx.score.scores import *  # noqa: F403
