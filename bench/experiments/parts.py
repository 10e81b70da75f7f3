"""Parts of a model: equally many parameters removed from attention alone, from feed-forward networks alone, from both.

PYTHONPATH=bench python -m experiments.parts [--seeds 3] [--steps 480] [--scale gpu]

A small GPT-2 on source text loses 10, 20 and 30% of its parameters between 25% and 65% of the run. Attention holds a
third of a block, so that more than that cannot be taken from it alone.
"""

from __future__ import annotations

from experiments.results import arguments, report
from experiments.runs import Job, Variant
from experiments.tasks import Text

FROZEN = {"attention": ["*.mlp*"], "feed-forward": ["*.attn*"], "both": []}
"""What stays whole, by names in GPT-2."""


def main() -> None:
    options = arguments(__doc__, steps=480)
    variants = tuple(
        Variant(
            name, 0.25, 0.65, {"target": target, "frozen": frozen}, labels={"removed": f"{1 - target:.0%}"}
        )
        for target in (0.9, 0.8, 0.7)
        for name, frozen in FROZEN.items()
    )  # fmt: skip
    jobs = [Job("source text", Text.of(options.scale), options.steps, seed, variants) for seed in range(options.seeds)]
    report("parts", "GPT-2, what is taken from where", jobs, options, "removed", "variant")


if __name__ == "__main__":
    main()
