"""A trained model shrunk in fine-tuning: perplexity of SmolLM2-135M on WikiText-2, by rule.

python bench/real/training.py --model DIR --data DIR [--only finetune adaptive] [--steps 72] [--work DIR]

AdamW at 5e-5 on 2 x 256 tokens, four sparsification steps between a sixth and two thirds of the run, to 80% of all
parameters. `DIR` of the model is one that transformers loads, that of the data holds `valid.txt`, of which batches are
drawn, and `test.txt`. Perplexity is over the first 6 and the first 24 windows of 256 tokens. A run that is broken off
goes on where it was saved last; rows that are finished are not run again.
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from machine import kept_rows, machine, write_csv
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops

WINDOW, BATCH, RATE, EVERY = 256, 2, 5e-5, 12

PAPER: dict[str, Any] = {"policy": "paper", "top_k": 0.1, "theta": 0.95}
ROWS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "paper": {**PAPER, "score": "fisher", "index_score": "norms"},
    "taylor_squared": {**PAPER, "score": "taylor_squared", "index_score": "taylor_squared"},
    "taylor_positions": {**PAPER, "score": "taylor_positions", "index_score": "taylor_positions"},
    "finetune": {"preset": "finetune"},
    "finetune, cubic": {"preset": "finetune", "shape": "cubic"},
    "finetune, glu": {"preset": "finetune", "target": {"glu": 0.6624}},  # as many parameters
    "finetune, glu, cubic": {"preset": "finetune", "shape": "cubic", "target": {"glu": 0.6624}},
    "adaptive": {"policy": "adaptive"},
    "adaptive, removed": {"policy": "adaptive", "absorb": False, "rotate": False},
    "random": {**PAPER, "score": "random", "index_score": "random"},
}
"""Name of a row -> settings of its trainer."""


def tokens_of(options: argparse.Namespace, split: str) -> Tensor:
    kept = options.work / f"{split}.pt"
    if not kept.exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.model)
        text = (options.data / f"{split}.txt").read_text(encoding="utf-8")
        torch.save(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]), kept)
    tokens: Tensor = torch.load(kept)
    return tokens


def batch_of(tokens: Tensor, step: int) -> Tensor:
    """The batch of a step, the same in every row."""
    begins = torch.randint(len(tokens) - WINDOW, (BATCH,), generator=torch.Generator().manual_seed(1000 + step))
    return torch.stack([tokens[int(begin) : int(begin) + WINDOW] for begin in begins])


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, windows: int) -> float:
    model.eval()
    losses = [float(loss_of(model, tokens[i * WINDOW : (i + 1) * WINDOW][None])) for i in range(windows)]
    model.train()
    return math.exp(sum(losses) / len(losses))


def run(name: str, options: argparse.Namespace, train: Tensor, test: Tensor) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    settings, place = ROWS[name], options.work / name.replace(", ", "_")
    if (place / "measured.csv").exists():
        with (place / "measured.csv").open(newline="") as file:
            measured: list[dict[str, Any]] = list(csv.DictReader(file))
        model = ecospa_fx.load(place)
    else:
        measured = []
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        ecospa_fx.compile(model, example_kwargs={"input_ids": batch_of(train, 0), "use_cache": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    trainer = None
    if settings is not None:
        trainer = ecospa_fx.EcoSpaTrainer(
            model, optimizer, start=options.steps // 6, end=2 * options.steps // 3, shrinks=4,
            **{"target": options.target, **settings},
        )  # fmt: skip
    if measured:
        ecospa_fx.resume(place, model, optimizer=optimizer, trainer=trainer)
    whole = (
        sum(p.numel() for p in AutoModelForCausalLM.from_config(model.config).parameters()) if not measured else None
    )
    whole = whole or int(measured[0]["whole"])
    first = int(measured[-1]["step"]) if measured else 0
    if not first:
        measured.append(row(name, 0, model, test, whole, 0.0, 0.0, options))
    seconds: list[float] = []
    for step in range(first + 1, options.steps + 1):
        begin = time.process_time()
        loss = loss_of(model, batch_of(train, step))
        loss.backward()
        optimizer.step()
        taken, size = time.process_time() - begin, sum(p.numel() for p in model.parameters())
        begin, decided = time.process_time(), 0.0
        if trainer is not None:
            trainer.step(loss=loss)
            decided = time.process_time() - begin
        optimizer.zero_grad()
        seconds.append(taken)
        print(f"{name} {step}: loss {float(loss.detach()):.3f}, {taken:.1f} s, trainer {decided:.2f} s", flush=True)
        shrunk = sum(p.numel() for p in model.parameters()) < size
        if shrunk or step in (options.steps, options.steps // 6, options.steps // 3, 2 * options.steps // 3):
            typical = sorted(seconds)[len(seconds) // 2]
            measured.append(row(name, step, model, test, whole, decided, typical, options))
            print(measured[-1], flush=True)
        if step % EVERY == 0 and step < options.steps and step == measured[-1]["step"]:
            ecospa_fx.save(model, place, optimizer=optimizer, trainer=trainer)
            with (place / "measured.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(measured[0]))
                writer.writeheader()
                writer.writerows(measured)
    shutil.rmtree(place, ignore_errors=True)
    return measured


def row(
    name: str, step: int, model: nn.Module, test: Tensor, whole: int, decided: float, typical: float,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    left = sum(p.numel() for p in model.parameters()) / whole
    last = step in (0, options.steps)
    return {
        "row": name, "step": step, "left": f"{left:.4f}", "perplexity": f"{perplexity(model, test, 6):.2f}",
        "perplexity_24": f"{perplexity(model, test, 24):.2f}" if last else "", "decision_s": f"{decided:.2f}",
        "step_s": f"{typical:.2f}", "whole": whole,
    }  # fmt: skip


def main() -> None:
    tolerate_missing_torchvision_ops()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("real_training"), help="where runs that are under way lie")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=72)
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--again", action="store_true", help="run rows again that are finished")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    train, test = tokens_of(options, "valid"), tokens_of(options, "test")
    for name in options.only:
        rows: list[dict[str, Any]] = [*kept_rows("real_training")]
        if any(each["row"] == name for each in rows) and not options.again:
            continue
        torch.manual_seed(0)
        found = run(name, options, train, test)
        rows = [each for each in rows if each["row"] != name] + [{**each, "versions": versions()} for each in found]
        write_csv("real_training", rows)
    print(machine())


def versions() -> str:
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}"


if __name__ == "__main__":
    main()
