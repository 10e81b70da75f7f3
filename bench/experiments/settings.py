"""Settings of the paper's rule: the share of couplings that shrink at a step (top_k), and of their score kept (theta).

PYTHONPATH=bench python -m experiments.settings [--seeds 3] [--steps 480] [--scale gpu]

A small GPT-2 on source text goes to half its parameters by the paper's rule alone, with a sparsification step every
fortieth of the run from a quarter of it on: every pair of 10, 30, 50% of the couplings and 70, 90, 95% of their score.
The rule alone decides when the target is reached, so a strict pair may miss it; `reached_at` is the step.
"""

from __future__ import annotations

from experiments.results import arguments, over_dense_table, report, show
from experiments.runs import Job, Variant
from experiments.tasks import Text

SHARES = (0.1, 0.3, 0.5)
THETAS = (0.7, 0.9, 0.95)


def main() -> None:
    options = arguments(__doc__, steps=480)
    variants = tuple(
        Variant(
            f"{top_k:.0%}, {theta:.0%}", 0.25, None, {"target": 0.5, "top_k": top_k, "theta": theta},
            shrinks=30, labels={"top_k": top_k, "theta": theta},
        )
        for top_k in SHARES
        for theta in THETAS
    )  # fmt: skip
    jobs = [Job("source text", Text.of(options.scale), options.steps, seed, variants) for seed in range(options.seeds)]
    rows = report("settings", "GPT-2 to half its size by top_k and theta", jobs, options, "variant")
    done = [row for row in rows if row["variant"] == "dense" or row["done"]]
    show(
        "of these, the runs that reached the target", over_dense_table(done, "variant", also=("reached_at", "shrinks"))
    )


if __name__ == "__main__":
    main()
