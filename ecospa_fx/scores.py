"""Scores: the importance of an entry of a weight; see `score/scores.py`."""

from ecospa_fx.score.judging import index_scores
from ecospa_fx.score.scores import SCORES, Score, ScoreFunction, ScoreInput, score_named

__all__ = ["SCORES", "Score", "ScoreFunction", "ScoreInput", "index_scores", "score_named"]
