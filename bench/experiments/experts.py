"""Experts removed from a trained mixture in one stroke, chosen by one score or another, three seeds.

PYTHONPATH=bench python -m experiments.experts --data DATA [--seeds 3] [--steps 1500] [--heal 100]

A small Mixtral (4 layers of 16 experts, of which every token takes 2) learns WikiText-2 by bytes. Then a quarter,
half or three quarters of the experts of every layer go, by their scores on 16 batches of the training text:

saliency    squared change of the loss without an expert's share in a token, to first order
reap        mean over its tokens of gate times norm of its output (REAP, arXiv 2510.13999)
frequency   the share of choices that fall on it
fisher      squared gradients of its weights, the paper's score
magnitude   squared weights
random      a control

Loss on held-out text over that of the whole model, in nats per byte: at once, and after `--heal` steps of training.
Weights and rows are kept in `--runs`, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import statistics
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, machine
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops
from ecospa_fx.score.saliency import Saliency

tolerate_missing_torchvision_ops()

WAYS = {
    "saliency": "#000000", "reap": "#0072b2", "frequency": "#e69f00", "fisher": "#009e73", "magnitude": "#cc79a7",
    "random": "#7f7f7f",
}  # fmt: skip
SHARES = (0.25, 0.5, 0.75)
LAYERS, EXPERTS, BATCH, LENGTH, RATE, SEEN, HELD_OUT = 4, 16, 8, 128, 2e-3, 16, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext-2/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--heal", type=int, default=100)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="weights and rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    texts = {part: _bytes(options.data / "wikitext-2" / f"{part}.txt") for part in ("test", "valid")}
    rows = [row for seed in range(options.seeds) for row in strokes(texts["test"], texts["valid"], seed, options)]
    about = {"steps": options.steps, "heal": options.heal, "machine": machine(), "date": date.today().isoformat()}
    with (RESULTS / "experts.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    plot(rows)


def _bytes(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def make() -> Any:
    import transformers as hf

    model = hf.MixtralForCausalLM(
        hf.MixtralConfig(
            vocab_size=256,
            hidden_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=64,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            max_position_embeddings=LENGTH,
            router_aux_loss_coef=0.01,
            use_cache=False,
        )
    )
    model.set_experts_implementation("grouped_mm")
    return model


def batches(text: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield windows at random places, `[BATCH, LENGTH]`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
        yield torch.stack([text[start : start + LENGTH] for start in starts.tolist()]).long()


def loss_of(model: nn.Module, batch: Tensor, balance: bool = False) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch, **({"output_router_logits": True} if balance else {})).loss
    return loss


def train(model: nn.Module, text: Tensor, steps: int, seed: int, rate: float, balance: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.95), weight_decay=0.01)
    for step, batch in zip(range(steps), batches(text, seed)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (1.0 - 0.9 * step / steps)
        loss_of(model, batch, balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def trained(text: Tensor, seed: int, options: argparse.Namespace) -> nn.Module:
    """Return a model that has learned; its weights are kept in a file."""
    torch.manual_seed(seed)
    file = options.runs / f"experts_{options.steps}_{seed}.pt"
    if not file.exists():
        model, began = make(), time.perf_counter()
        train(model, text, options.steps, seed, RATE, balance=True)
        print(f"seed {seed}: trained in {time.perf_counter() - began:.0f} s", flush=True)
        torch.save(model.state_dict(), file)
    model = make()  # a new one: a call that asks for router logits leaves hooks on routers, which pin the experts' axis
    model.load_state_dict(torch.load(file))
    return model


def strokes(text: Tensor, held_out: Tensor, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Remove experts of copies of a trained model; a row for each way and share."""
    kept = options.runs / f"experts_{options.steps}_{options.heal}_{seed}.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    if len(rows) == len(WAYS) * len(SHARES):
        return rows
    model = trained(text, seed, options)
    judges = [batch for _, batch in zip(range(HELD_OUT), batches(held_out, 1000))]

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return sum(loss_of(model, batch).item() for batch in judges) / len(judges)

    whole = loss(model)
    sample = next(batches(text, 2000 + seed))
    ecospa_fx.compile(model, example_inputs=(), example_kwargs={"input_ids": sample, "labels": sample})
    scored = scores(model, text, seed)
    for share in SHARES:
        for way, entries in scored.items():
            if any((row["score"], row["removed"]) == (way, share) for row in rows):
                continue
            small = copy.deepcopy(model)
            named = {coupling.name: coupling for coupling in ecospa_fx.couplings(small)}
            count = round(EXPERTS * (1 - share))
            ecospa_fx.shrink(small, {named[n]: each.topk(count).indices.sort().values for n, each in entries.items()})
            at_once = loss(small)
            train(small, text, options.heal, 3000 + seed, RATE / 4, balance=False)
            row = {"seed": seed, "removed": share, "score": way, "dense": f"{whole:.4f}",
                   "over_dense": f"{at_once - whole:.4f}", "healed": f"{loss(small) - whole:.4f}"}  # fmt: skip
            rows.append(row)
            with kept.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    return rows


def scores(model: nn.Module, text: Tensor, seed: int) -> dict[str, dict[str, Tensor]]:
    """Return for each way the worth of the experts, by name of their coupling, on the same batches."""
    estimators = {"saliency": Saliency(model)} | {
        way: ecospa_fx.CoupledEstimator(model, way, seed=seed) for way in WAYS if way != "saliency"
    }
    for _, batch in zip(range(SEEN), batches(text, 2000 + seed)):
        loss_of(model, batch).backward()
        for estimator in estimators.values():
            estimator.accumulate()
        model.zero_grad()
    experts = [coupling for coupling in ecospa_fx.couplings(model) if coupling.kind == "experts"]
    assert len(experts) == LAYERS, str(ecospa_fx.explain(model))
    found = {way: {c.name: each.entries(c) for c in experts} for way, each in estimators.items()}
    for estimator in estimators.values():
        estimator.detach()
    return found


def plot(rows: list[dict[str, Any]]) -> None:
    """Loss over dense by the share of experts removed: at once, and after healing."""
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    seeds = len({row["seed"] for row in rows})
    for axis, (column, title) in zip(
        figure.subplots(1, 2), (("over_dense", "at once"), ("healed", "after some training")), strict=True
    ):
        for way, colour in WAYS.items():
            mine = [[float(r[column]) for r in rows if (r["score"], r["removed"]) == (way, s)] for s in SHARES]
            axis.plot(SHARES, [statistics.mean(each) for each in mine], color=colour, label=way, linewidth=2)
            for share, each in zip(SHARES, mine, strict=True):
                axis.plot([share] * len(each), each, "o", color=colour, alpha=0.5, markersize=4)
        axis.set(title=title, xlabel="share of experts removed", xticks=SHARES)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("loss over dense, nats per byte")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"Mixtral of {LAYERS} x {EXPERTS} experts, {seeds} seeds", fontsize=11)
    figure.savefig(RESULTS / "experts.png")


if __name__ == "__main__":
    main()
