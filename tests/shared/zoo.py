"""Tiny models, each with the couplings and refusals that it has, written out by hand from its arithmetic.

`B` batch, `S` sequence, `D` model width, `H` heads, `K` key heads, `E` entries per head, `F` hidden width. Sizes differ
wherever a model can afford it, so that a wrong axis shows; `everything_equal` is the opposite on purpose.
"""

from __future__ import annotations

import zoo_attention
import zoo_convolutions
import zoo_experts
import zoo_perceptrons
import zoo_refused
from specimens import ZOO, Pair, Specimen, pair

__all__ = ["ZOO", "Pair", "Specimen", "pair"]
TOPICS = (zoo_attention, zoo_convolutions, zoo_experts, zoo_perceptrons, zoo_refused)
