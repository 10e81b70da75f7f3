"""One-shot shrinking of a trained model, without training after it: the loss that absorption and rotation save.

PYTHONPATH=bench python -m experiments.one_stroke [--archs gpt2 llama] [--steps 700] [--seed 0]

A small language model learns source text. Then a quarter, half or three quarters of the entries of one kind of coupling
are removed, in each way that applies, chosen by the product of slice norms unless stated otherwise:

removed     as the paper does it
absorbed    kept entries take over the function of removed ones, by least squares on 16 training batches
rotated     in the basis of the singular vectors of the two weights, the last ones go
seen        likewise, of the activations in the same 16 batches: of their product
both        that, and absorbed
adaptive    that, with the number of entries per coupling chosen by the expected rise of the loss

Validation loss over that of the whole model, in nats per byte. About five minutes per model on one core.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, machine
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

import ecospa_fx
from ecospa_fx.compensate.forecast import forecast, worth_of
from ecospa_fx.couple.constraints import Constraints
from ecospa_fx.demo.corpus import validation_batches
from ecospa_fx.model.cost import CostModel
from ecospa_fx.model.lookup import state_of
from ecospa_fx.score.judging import index_scores
from ecospa_fx.score.saliency import Saliency
from ecospa_fx.train.adaptive import AdaptiveSparsifier
from experiments.runs import _rate
from experiments.tasks import Text

KINDS = {
    "FFN": ("ffn", "glu"), "heads": ("heads",), "Q/K": ("qk",), "V/O": ("vo",),
    "FFN, Q/K, V/O": ("ffn", "glu", "qk", "vo"),
}  # fmt: skip
WAYS = {
    "removed": "#7f7f7f", "absorbed": "#0072b2", "rotated": "#e69f00", "seen": "#cc79a7", "both": "#009e73",
    "adaptive": "#000000",
}  # fmt: skip
SHARES = (0.25, 0.5, 0.75)
BATCHES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["gpt2", "llama"])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/experiments"), help="trained weights; a second call goes on from there"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for arch in options.archs for row in strokes(arch, options.steps, options.seed, options.runs)]
    about = {"steps": options.steps, "seed": options.seed, "machine": machine(), "date": date.today().isoformat()}
    with (RESULTS / "one_stroke.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    plot(rows)


def strokes(arch: str, steps: int, seed: int, runs: Path) -> list[dict[str, object]]:
    """Train a model and shrink copies of it; a row for each."""
    task = Text(None, arch=arch)
    model = trained(task, steps, seed, runs / f"one_stroke_{arch}_{steps}_{seed}.pt")
    held_out = list(islice(validation_batches(task._corpus(), 16, task.batch_size, task.context), 16))

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return sum(task.loss(model, batch).item() for batch in held_out) / len(held_out)

    began = time.perf_counter()
    saliency = Saliency(model)
    with ecospa_fx.Grams(model) as grams:
        for batch in task.batches(BATCHES, seed + 1):
            task.loss(model, batch).backward()
            saliency.accumulate()
            model.zero_grad()
    print(f"{arch}: gathered in {time.perf_counter() - began:.1f} s")
    seen, judged, whole, rows = grams.state_dict(), saliency.state_dict(), loss(model), []
    for name, kinds in KINDS.items():
        for share in SHARES:
            known: dict[str, float] = {}
            for way in WAYS:
                smaller = copy.deepcopy(model)
                began = time.perf_counter()
                done = (
                    adapt(smaller, kinds, share, seen, judged)
                    if way == "adaptive"
                    else stroke(smaller, kinds, share, way, seen)
                )
                if not done:
                    continue
                seconds = time.perf_counter() - began
                known[way] = loss(smaller) - whole
                rows.append(
                    {"arch": arch, "what": name, "removed": share, "way": way, "dense": f"{whole:.4f}",
                     "over_dense": f"{known[way]:.5f}", "seconds": f"{seconds:.2f}"}
                )  # fmt: skip
            print(f"{arch} {whole:.3f}, {share:.0%} of {name}:", {k: round(v, 4) for k, v in known.items()}, flush=True)
    return rows


def trained(task: Text, steps: int, seed: int, file: Path) -> nn.Module:
    """A model that has learned, compiled and in eval mode; its weights are kept in a file."""
    torch.manual_seed(seed)
    model, (first, _) = task.model(), next(task.batches(1, seed))
    if file.exists():
        model.load_state_dict(torch.load(file))
    else:
        train(model, task, steps, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    return ecospa_fx.compile(model.eval(), example_inputs=(first,))


def train(model: nn.Module, task: Text, steps: int, seed: int) -> None:
    """All of a run at once."""
    optimizer = torch.optim.AdamW(model.parameters(), task.rate, (0.9, 0.95), weight_decay=0.01)
    for step, batch in enumerate(task.batches(steps, seed), 1):
        for group in optimizer.param_groups:
            group["lr"] = task.rate * _rate(step, steps)
        task.loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def stroke(model: nn.Module, kinds: tuple[str, ...], share: float, way: str, seen: dict[str, torch.Tensor]) -> bool:
    """Shrink in one way, or say that it is none for these couplings."""
    found = [c for c in ecospa_fx.couplings(model) if c.kind in kinds]
    grams = ecospa_fx.Grams(model)
    grams.detach()
    grams.load_state_dict(seen)
    turned: dict[str, torch.Tensor] = {}
    if way in ("rotated", "seen", "both"):
        linear = [c for c in found if c.linear]
        turned = ecospa_fx.rotate(model, linear, grams=grams if way != "rotated" else None).energy
        if not turned:
            return False
    keep = {}
    for coupling in found:
        count = max(1, coupling.size - round(share * coupling.size))
        if coupling.name in turned:
            keep[coupling] = torch.arange(count)
        else:
            scores = index_scores(model, coupling, by_context=coupling.context is not None)
            keep[coupling] = scores.argsort(dim=-1, descending=True)[..., :count].sort(-1).values
    if all(coupling.size == kept.shape[-1] for coupling, kept in keep.items()):
        return False
    ecospa_fx.shrink(model, keep, absorb=grams if way in ("absorbed", "both") else None)
    return way not in ("absorbed", "both") or bool(grams.left)


def adapt(
    model: nn.Module, kinds: tuple[str, ...], share: float, seen: dict[str, torch.Tensor], judged: dict[str, Any]
) -> bool:
    """Shrink as the adaptive policy does, to as many parameters; where there is one kind only, layers share it out."""
    grams, saliency = ecospa_fx.Grams(model), Saliency(model)
    grams.detach()
    grams.load_state_dict(seen)
    saliency.load_state_dict(judged)
    found = [c for c in ecospa_fx.couplings(model) if c.kind in kinds]
    rest = [c for c in ecospa_fx.couplings(model) if c.kind not in kinds]
    even = {c.name: max(1, c.size - round(share * c.size)) for c in found}
    if even == {c.name: c.size for c in found}:
        return False
    sizes = CostModel(model, state_of(model))
    at_most = sizes.total(even)
    sparsifier = AdaptiveSparsifier(model, target=at_most / sizes.original, constraints=Constraints(frozen=rest))
    widths = sparsifier.widths({c: worth_of(c, saliency) for c in found}, at_most)
    curves = forecast(model, found, saliency, grams=grams, absorb=True, rotate=True, widths=widths).curves
    keep = {coupling: curves[coupling].keep(width) for coupling, width in widths.items()}
    linear = {c.name: kept.shape[-1] for c, kept in keep.items() if c.linear}
    ecospa_fx.rotate(model, linear, keep=linear, grams=grams)
    ecospa_fx.shrink(model, keep, absorb=grams)
    return True


def plot(rows: list[dict[str, object]]) -> None:
    """Loss over dense by the share removed: a row of panels per model."""
    archs, names = list(dict.fromkeys(row["arch"] for row in rows)), list(KINDS)
    figure = Figure(figsize=(3 * len(names), 2.7 * len(archs)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (arch, name) in enumerate((arch, name) for arch in archs for name in names):
        axes = figure.add_subplot(len(archs), len(names), number + 1)
        for way, colour in WAYS.items():
            mine = [row for row in rows if (row["arch"], row["what"], row["way"]) == (arch, name, way)]
            over = [max(float(str(row["over_dense"])), 1e-5) for row in mine]
            axes.plot([row["removed"] for row in mine], over, "o-", color=colour, label=way, markersize=4)
        axes.set(title=f"{arch}, {name}", yscale="log", ylim=(1e-5, 5), xlabel="share removed", xticks=SHARES)
        axes.grid(alpha=0.3)
        if number == 0:
            axes.set_ylabel("loss over dense, nats per byte")
            axes.legend(fontsize=8)
    figure.savefig(RESULTS / "one_stroke.png", dpi=110)


if __name__ == "__main__":
    main()
