"""A trained model made small and healed: SmolLM2-135M on WikiText-2, by what it learns from.

PYTHONPATH=bench:bench/real python bench/real/healing.py --model DIR --data DIR [--only 50%] [--steps 200] [--work DIR]

dense        fine-tuned on the task; the teacher of the others, as Minitron (arXiv 2407.14679) corrects its teachers
task         after `compress`, fine-tuned as the dense one was
distilled    after `compress`, the loss of the task and the divergence from the teacher (`Distiller`)

AdamW at 5e-5 (1e-4 for small models) on 2 x 256 tokens, falling to a tenth of that; `compress` sees 32 calls of 512
tokens of the same text. Perplexity is over the first 6 windows of 256 tokens, at both ends over 24. Rows that are
finished are not run again.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from machine import kept_rows, write_csv
from torch import Tensor, nn
from training import batch_of, loss_of, perplexity, tokens_of, versions

import ecospa_fx
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops

SHARES = {"70%": 0.7, "50%": 0.5}
ROWS = ["dense", *(f"{share}, {how}" for share in SHARES for how in ("task", "distilled"))]
RATE, SMALL_RATE, EVERY = 5e-5, 1e-4, 25
CALLS, LENGTH = 32, 512


def dense(options: argparse.Namespace) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)


def student_of(share: str, options: argparse.Namespace, train: Tensor) -> nn.Module:
    """Compress the model, or take what an earlier row has compressed."""
    place = options.work / f"small_{share.rstrip('%')}"
    if place.exists():
        return ecospa_fx.load(place)
    model = dense(options).eval()
    begins = torch.randint(len(train) - LENGTH, (CALLS,), generator=torch.Generator().manual_seed(7))
    calls = [{"input_ids": train[int(at) : int(at) + LENGTH][None], "use_cache": False} for at in begins]
    calls = [{**call, "labels": call["input_ids"]} for call in calls]
    print(ecospa_fx.compress(model, calls, target=SHARES[share]), flush=True)
    ecospa_fx.save(model, place)
    return model


def run(name: str, options: argparse.Namespace, train: Tensor, test: Tensor) -> list[dict[str, Any]]:
    share, _, how = name.partition(", ")
    tuned = options.work / "dense.pt"
    whole = dense(options)
    size = sum(p.numel() for p in whole.parameters())
    model = copy.deepcopy(whole) if name == "dense" else student_of(share, options, train)
    distiller = None
    if how == "distilled":
        whole.load_state_dict(torch.load(tuned))
        distiller = ecospa_fx.Distiller(model, whole)
    rate = RATE if name == "dense" else SMALL_RATE
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / options.steps)))
    )
    left = sum(p.numel() for p in model.parameters()) / size
    rows: list[dict[str, Any]] = []
    seconds: list[float] = []

    def measure(step: int) -> None:
        last = step in (0, options.steps)
        rows.append(
            {
                "row": name, "step": step, "left": f"{left:.4f}", "perplexity": f"{perplexity(model, test, 6):.2f}",
                "perplexity_24": f"{perplexity(model, test, 24):.2f}" if last else "",
                "step_s": f"{sorted(seconds)[len(seconds) // 2]:.2f}" if seconds else "", "versions": versions(),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)

    measure(0)
    model.train()
    for step in range(1, options.steps + 1):
        begin = time.process_time()
        loss = loss_of(model, batch_of(train, step))
        if distiller is not None:
            loss = distiller.loss(loss)
        loss.backward()
        optimizer.step()
        falling.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - begin)
        if step % EVERY == 0 or step == options.steps:
            measure(step)
    if name == "dense":
        torch.save(model.state_dict(), tuned)
    return rows


def main() -> None:
    tolerate_missing_torchvision_ops()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("real_healing"), help="where models that are shared lie")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--again", action="store_true", help="run rows again that are finished")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    train, test = tokens_of(options, "valid"), tokens_of(options, "test")
    for name in options.only:
        if any(row["row"] == name for row in kept_rows("real_healing")) and not options.again:
            continue
        torch.manual_seed(0)
        found = run(name, options, train, test)
        write_csv("real_healing", [*(row for row in kept_rows("real_healing") if row["row"] != name), *found])


if __name__ == "__main__":
    main()
