"""Beyond the paper: absorption, rotation and the adaptive policy against the paper's rule and others.

PYTHONPATH=bench python -m experiments.beyond [--data DIR] [--seeds 3] [--steps 480] [--scale gpu]

A small GPT-2 on source text loses 50, 60 and 70% of the entries of couplings, in five shrinks early (25-65% of the run)
or late (70-90%); and, with --data, in fine-tuning on WikiText-2 (20-70% of half as many steps, at a quarter of the
rate) after a whole run on source text. At 60% in every way, at 50 and 70% by the paper's rule and the adaptive one:

paper        Fisher importance of couplings, product of the slice norms in them
random       aligned, at random
uncoupled    the paper's sizes, every matrix chooses alone
compensated  the paper's choice of couplings and sizes, with absorb=True, rotate=True
ordered      early only: that, but kept entries stay in the basis of singular vectors after a rotation
adaptive     policy="adaptive"
small        a model of the final size, its entries drawn at random, from scratch for as many parameters x steps;
             that is, with more data; or for as many steps, "as long", with less compute

Torch-Pruning removes nothing from a GPT-2, so it meets paper and adaptive on an OPT of the same size, late, if it is
installed: group magnitudes, its bottleneck setting (peers.py), the optimizer begun anew, all of it at the first shrink
of the others: in five iterative steps it takes the last head.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import RESULTS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from ecospa_fx.compensate import compensation
from experiments.results import Row, arguments, difference, dots, grouped, over_dense_table, run, show
from experiments.runs import Job, Training, Variant, row_of, train
from experiments.scratch import small, small_as_long
from experiments.tasks import Text

WHEN = {"early": (0.25, 0.65), "late": (0.7, 0.9), "fine-tuning": (0.2, 0.7)}
SHRINKS = 5
COLOURS = {
    "dense": "#7f7f7f", "paper": "#0072b2", "random": "#e69f00", "uncoupled": "#d55e00", "compensated": "#56b4e9",
    "ordered": "#f0e442", "adaptive": "#009e73", "small": "#000000",
    "small, as long": "#999933", "Torch-Pruning": "#cc79a7",
}  # fmt: skip


@contextmanager
def in_order() -> Iterator[None]:
    """Rotate to the basis of singular vectors itself."""
    whole = compensation.rotate_within
    compensation.rotate_within = lambda *given, keep, **more: whole(*given, **more)
    try:
        yield
    finally:
        compensation.rotate_within = whole


def torch_pruning(
    job: Job, variant: Variant, start: Training, batches: Sequence[Any], rows: Sequence[Mapping[str, Any]],
    place: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Torch-Pruning in one stroke, to the size of the adaptive run or just above it."""
    import peers

    (other,) = (row for row in rows if row["variant"] == "adaptive")
    case = peers.Case(job.task.model, {"input_ids": batches[0][0]}, ("out_proj", "fc2"))

    def pruned(ratio: float) -> nn.Module:
        model = job.task.model()
        model.load_state_dict(start.model.state_dict())
        peers.torch_pruning(model, case, ratio, bottleneck=True)
        return model

    sizes = {ratio: sum(p.numel() for p in pruned(ratio / 100).parameters()) for ratio in range(5, 90)}
    best = min((size, ratio) for ratio, size in sizes.items() if size >= other["parameters"])[1] / 100
    training = Training.begun(pruned(best).to(job.device), job.task)
    training.load_state_dict(start.state_dict())
    train(job, training, batches, job.steps)
    return row_of(job, training, variant.name, variant.labels) | {"ratio": best}


def variants(when: str) -> tuple[Variant, ...]:
    """The runs of one regime."""
    found = []
    for target in (0.4, 0.5, 0.3):
        labels = {"when": when, "removed": f"{1 - target:.0%}"}
        base = {"target": target, "among": "prunable"}
        fair = {"absorb": True, "rotate": True}
        ways: dict[str, dict[str, Any]] = {"paper": {"settings": base}}
        if target == 0.4:
            ways |= {
                "random": {"settings": base | {"score": "random", "index_score": "random"}},
                "uncoupled": {"settings": base, "pairing": False},
                "compensated": {"settings": base | fair},
            }
            if when == "early":
                ways["ordered"] = {"settings": base | fair, "around": in_order}
        ways["adaptive"] = {"settings": base | {"policy": "adaptive"}}
        if target == 0.4 and when != "fine-tuning":
            ways["small"] = {"settings": base, "own": small}
            if when == "late":
                ways["small, as long"] = {"settings": base, "own": small_as_long}
        for name, way in ways.items():
            found.append(Variant(name, *WHEN[when], shrinks=SHRINKS, labels=labels, **way))
    return tuple(found)


def jobs_of(options: Any) -> list[Job]:
    """One per seed and regime; those with most to say first."""
    text = Text.of(options.scale)
    found: list[Job] = []
    for seed in range(options.seeds):
        both = variants("late") + variants("early")
        found.append(Job("source text", text, options.steps, seed, both))
        if options.data is not None:
            other = Text.of(options.scale, options.data / "wikitext-2")
            tuned = Text(**{**vars(other), "rate": other.rate / 4})
            found.append(
                Job("WikiText-2", tuned, options.steps // 2, seed, variants("fine-tuning"), (text, options.steps))
            )
        if importlib.util.find_spec("torch_pruning"):
            base = {"target": 0.4, "among": "prunable"}
            labels = {"when": "late", "removed": "60%"}
            ways = {"paper": {"settings": base}, "adaptive": {"settings": base | {"policy": "adaptive"}}}
            ways |= {"Torch-Pruning": {"own": torch_pruning}}
            mine = tuple(Variant(n, *WHEN["late"], shrinks=SHRINKS, labels=labels, **w) for n, w in ways.items())
            opt = Text(**{**vars(text), "arch": "opt"})
            found.append(Job("source text, OPT", opt, options.steps, seed, mine))
    return found


def main() -> None:
    options = arguments(__doc__, data=True, steps=480)
    rows = run("beyond", jobs_of(options), options)
    for row in rows:
        row["panel"] = f"{row['title']}\n{row.get('removed')} removed, {row.get('when')}"
    show(
        f"{options.steps} steps, {options.seeds} seeds; loss in nats per byte",
        over_dense_table(rows, "title", "when", "removed", "variant", also=("compute", "seconds")),
    )
    removed = [row for row in rows if row["variant"] != "dense"]
    for (title, when, share), group in grouped(removed, "title", "when", "removed").items():
        gaps = {
            name: statistics.mean(r["over_dense"] for r in mine) for (name,), mine in grouped(group, "variant").items()
        }
        shares = ", ".join(f"{name} {gap / gaps['paper']:.0%}" for name, gap in gaps.items() if name != "paper")
        print(f"{title}, {when}, {share}: the gap to dense in that of the paper's rule: {shares}")
        print(f"    adaptive less paper: {difference(group, 'adaptive', 'paper')}")
    rows = [row for row in rows if row["variant"] != "small"]  # far below, with more data: the table has it
    dots(
        rows, RESULTS / "beyond.png", "panel", "variant",
        title=f"{options.steps} steps, {options.seeds} seeds: final loss over dense",
    )  # fmt: skip
    curves([row for row in rows if row["variant"] == "dense" or row["removed"] == "60%"])


def curves(rows: Sequence[Row]) -> None:
    """Loss over steps above, over seconds below, a column per regime; mean over seeds."""
    panels = grouped([row for row in rows if row["variant"] != "dense"], "title", "when")
    figure = Figure(figsize=(4.2 * len(panels), 7.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(panels), squeeze=False)
    lines: dict[str, Any] = {}
    for column, ((title, when), members) in enumerate(panels.items()):
        dense = [row for row in rows if row["variant"] == "dense" and row["title"] == title]
        begin = [math.inf, math.inf]
        for (variant,), runs in grouped([*dense, *members], "variant").items():
            count = min(len(run["curve"]) for run in runs)
            steps, seconds, losses = (
                [statistics.mean(run["curve"][i][k] for run in runs) for i in range(count)]
                for k in ("step", "seconds", "loss")
            )
            for line, across in ((0, steps), (1, seconds)):
                (drawn,) = axes[line][column].plot(across, losses, color=COLOURS[variant], marker=".")
                lines.setdefault(variant, drawn)
                if variant == "adaptive":
                    begin[line] = across[0]
        last = statistics.mean(row["loss"] for row in dense)
        for line, label in enumerate(("step", "seconds of one core")):
            axes[line][column].set(xlabel=label, ylim=(last - 0.01, last + 0.2), title=f"{title}, 60% removed, {when}")
            axes[line][column].set_xlim(left=0.85 * begin[line])
            axes[line][column].grid(alpha=0.25)
            axes[line][column].spines[["top", "right"]].set_visible(False)
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=len(lines), fontsize=9)
    axes[0][0].set_ylabel("validation loss, nats per byte")
    axes[1][0].set_ylabel("validation loss, nats per byte")
    figure.savefig(RESULTS / "beyond_curves.png")


if __name__ == "__main__":
    main()
