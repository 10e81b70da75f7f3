"""Coupled against uncoupled: does it matter that coupled weights lose the same slices, and which slices?

PYTHONPATH=bench python -m experiments.coupled [--data DIR] [--seeds 3] [--steps 480] [--scale gpu]

A small GPT-2 on source text, and on WikiText-2 where --data has it, loses 50% and 70% of its parameters, early (25-65%
of the run) and late (70-90%), in five ways:

coupled     the paper's rule: Fisher importance of couplings, product of the slice norms in them, aligned
uncoupled   the same sizes at the same steps, but every matrix chooses alone which slices go
magnitude   aligned; couplings and their entries by squared weights
activation  aligned; couplings and their entries by the norms of the products they take part in
random      aligned; couplings and their entries at random: the control
"""

from __future__ import annotations

import math

from machine import RESULTS

from experiments.results import arguments, curves, difference, dots, grouped, over_dense_table, run, show
from experiments.runs import Job, Variant
from experiments.tasks import Text

WAYS: dict[str, dict[str, object]] = {
    "coupled": {},
    "uncoupled": {},
    "magnitude": {"score": "magnitude", "index_score": "magnitude"},
    "activation": {"score": "activation", "index_score": "activation"},
    "random": {"score": "random", "index_score": "random"},
}
WHEN = {"early": (0.25, 0.65), "late": (0.7, 0.9)}
TARGETS = (0.5, 0.3)


def main() -> None:
    options = arguments(__doc__, data=True, steps=480)
    texts = {"source text": None}
    if options.data is not None:
        texts["WikiText-2"] = options.data / "wikitext-2"
    variants = tuple(
        Variant(
            name,
            *WHEN[when],
            settings={"target": target, **settings},
            pairing=name != "uncoupled",
            labels={"when": when, "removed": f"{1 - target:.0%}"},
        )
        for target in TARGETS
        for when in WHEN
        for name, settings in WAYS.items()
    )
    jobs = [
        Job(title, Text.of(options.scale, source), options.steps, seed, variants)
        for seed in range(options.seeds)
        for title, source in texts.items()
    ]
    rows = run("coupled", jobs, options)
    for row in rows:
        row["perplexity"] = math.exp(row["loss"])
        row["panel"] = f"{row['title']}\n{row.get('removed')} removed {row.get('when')}"
    show(
        "GPT-2, loss in nats per byte",
        over_dense_table(rows, "title", "removed", "when", "variant", also=("perplexity",)),
    )
    for (removed, when), group in grouped(
        [row for row in rows if row["variant"] != "dense"], "removed", "when"
    ).items():
        for other in ("uncoupled", "magnitude", "activation", "random"):
            print(f"{removed} removed {when}: coupled less {other}: {difference(group, 'coupled', other)}")
    title = f"small GPT-2, {options.steps} steps, {options.seeds} seeds"
    dots(rows, RESULTS / "coupled.png", "panel", "variant", title=f"{title}: final loss over dense")
    early = [row for row in rows if row["variant"] == "dense" or row.get("when") == "early"]
    curves(early, RESULTS / "coupled_curves.png", "panel", title=f"{title}: validation loss")


if __name__ == "__main__":
    main()
