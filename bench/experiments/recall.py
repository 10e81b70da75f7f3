"""Recall after shrinking: associative recall, which only attention solves, before and after.

PYTHONPATH=bench python -m experiments.recall [--seeds 3] [--steps 1500] [--scale gpu]

Two layers of GPT-2 learn to answer from 4 pairs of key and value that they have just been shown, and lose half of
their parameters once they can (60-80% of the run). Accuracy of the answers, and of the same rule with pairing broken.
"""

from __future__ import annotations

from experiments.results import arguments, report
from experiments.runs import Job, Variant
from experiments.tasks import Recall


def main() -> None:
    options = arguments(__doc__, steps=1500)
    task = Recall(pairs=16, width=256) if options.scale == "gpu" else Recall(pairs=4, keys=16, values=16)
    variants = tuple(
        Variant(
            name, 0.6, 0.8, {"target": target, **how}, pairing=name != "uncoupled",
            labels={"removed": f"{1 - target:.0%}"},
        )
        for target in (0.5, 0.3)
        for name, how in {
            "coupled": {},
            "random": {"score": "random", "index_score": "random"},
            "uncoupled": {},
        }.items()
    )  # fmt: skip
    jobs = [Job("recall", task, options.steps, seed, variants) for seed in range(options.seeds)]
    report("recall", "associative recall", jobs, options, "removed", "variant", also=("accuracy",))


if __name__ == "__main__":
    main()
