"""A GPT-2 of ten million parameters on all text at hand, from scratch: loss over steps, over FLOPs, over seconds.

PYTHONPATH=bench python -m experiments.pretraining --data DIR [--steps 3000] [--seeds 1] [--report]

36 MB of the standard library, documentation and licences of installed packages and sources of some (`language.py`), in
tokens of a BPE trained on it; 6 blocks of 352 channels, 16 windows of 128 tokens a step, in bfloat16. Held out:
other files of the same kinds, and the test text of WikiText-2 as another kind. Couplings lose 60% of their entries in
five shrinks between 25% and 65% of the run:

dense               none of that
paper               Fisher importance of couplings, product of the slice norms in them
adaptive            policy="adaptive"
small, same tokens  a model of the final size, its entries drawn at random, from scratch for as many steps
random              couplings and entries at random
uncoupled           the paper's sizes, every matrix chooses alone
small, same FLOPs   that small model for as many FLOPs as the dense one took, with more tokens

The whole takes about four hours of one core. It can be stopped at any time and goes on with the same command, from a
save of the last five minutes in `--runs`; rows come to `results/pretraining.jsonl`, with `--report` they are reported
as far as they are there.
"""

from __future__ import annotations

from machine import RESULTS

from experiments.language import Language
from experiments.results import arguments, over_dense_table, over_steps_flops_seconds, run, show
from experiments.runs import Job, Variant
from experiments.scratch import small_as_long, small_as_many_flops

BASE = {"target": 0.4, "among": "prunable"}


def main() -> None:
    options = arguments(__doc__, data=True, steps=3000, seeds=1, workers=1)
    outside = None if options.data is None else options.data / "wikitext-2" / "test.txt"
    sizes = {"width": 768, "layers": 12, "context": 512, "batch_size": 32} if options.scale == "gpu" else {}
    task = Language(outside, options.runs / "language", **sizes)
    ways = {
        "paper": {"settings": BASE},
        "adaptive": {"settings": BASE | {"policy": "adaptive"}},
        "small, same tokens": {"settings": BASE, "own": small_as_long},
        "random": {"settings": BASE | {"score": "random", "index_score": "random"}},
        "uncoupled": {"settings": BASE, "pairing": False},
        "small, same FLOPs": {"settings": BASE, "own": small_as_many_flops},
    }
    variants = tuple(Variant(name, 0.25, 0.65, shrinks=5, **way) for name, way in ways.items())
    jobs = [
        Job("text at hand", task, options.steps, seed, variants, evaluations=20, save_every=300)
        for seed in range(options.seeds)
    ]
    rows = run("pretraining", jobs, options)
    show(
        f"GPT-2, {options.steps} steps; loss in nats per token",
        over_dense_table(rows, "variant", also=("loss_outside", "compute", "flops", "seconds")),
    )
    title = f"GPT-2 of 10 million parameters, {options.steps} steps of 2,048 tokens: loss on held-out text"
    first = [row for row in rows if row["seed"] == 0]
    for row in first:
        row["title"] = "held out"
    over_steps_flops_seconds(first, RESULTS / "pretraining.png", "loss", "loss_outside", title=title)


if __name__ == "__main__":
    main()
