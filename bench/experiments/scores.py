"""Scores compared: each decides alone, for couplings and for their entries, to the same size.

PYTHONPATH=bench python -m experiments.scores [--seeds 3] [--steps 480] [--scale gpu]

A small GPT-2 on source text, 70% of its parameters removed between 25% and 65% of the run. `norms` is the paper's:
Fisher importance, entries by the product of their slice norms; `fisher, fisher` takes Fisher for both.
"""

from __future__ import annotations

from experiments.results import arguments, report
from experiments.runs import Job, Variant
from experiments.tasks import Text

SCORES = ("gradient", "taylor", "taylor_squared", "magnitude", "adam", "activation", "random")


def main() -> None:
    options = arguments(__doc__, steps=480)
    ways = {"norms": {}, "fisher, fisher": {"index_score": "fisher"}}
    ways |= {name: {"score": name, "index_score": name} for name in SCORES}
    variants = tuple(Variant(name, 0.25, 0.65, {"target": 0.3, **how}) for name, how in ways.items())
    jobs = [Job("source text", Text.of(options.scale), options.steps, seed, variants) for seed in range(options.seeds)]
    report("scores", "GPT-2 to 30% of its size by score", jobs, options, "variant")


if __name__ == "__main__":
    main()
