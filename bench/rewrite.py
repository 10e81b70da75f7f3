"""Cost of rewritten graphs relative to their models: steps side by side, capture times, a shrink in training steps.

python bench/rewrite.py [--sizes tiny 25M 125M] [--rounds 40] [--blocks 2 8 32 128]

Every round runs one call of the plain model and one of the compiled copy, in turns, and a ratio is taken within the
round, so that other load of the machine affects both. Medians, and the middle half of the rounds.
"""

import argparse
import copy
import statistics
import time

import torch
from machine import machine, write_csv
from rich.console import Console
from rich.table import Table
from torch import nn

import ecospa_fx
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops

# GPT-2-shaped: width, layers, heads, vocabulary, tokens of a call. 25M are 25 million in the blocks, 125M is GPT-2.
SIZES = {
    "tiny": (64, 4, 4, 256, (2, 16)),
    "25M": (512, 8, 8, 256, (2, 64)),
    "125M": (768, 12, 12, 50257, (1, 64)),
}
COLUMNS = ("measure", "size", "regions", "state", "parameters")


def gpt2(width, layers, heads, vocabulary):
    tolerate_missing_torchvision_ops()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_positions=128, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=0,
            eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )
    )  # fmt: skip


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def halves(model: nn.Module) -> dict:
    """Every matrix of every block at half its size: half of each Q/K, V/O and feed-forward axis."""
    return {c: torch.arange(0, c.size, 2) for c in ecospa_fx.couplings(model) if c.kind in ("qk", "vo", "ffn")}


def calls(model: nn.Module, x: torch.Tensor):
    def forward() -> None:
        with torch.no_grad():
            model(x)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(x, labels=x).loss.backward()

    return {"forward": forward, "forward + backward": step}


def ratios(mine, plain, rounds: int) -> tuple[float, float, float]:
    """Time of `mine` over time of `plain`, round by round: lower quartile, median, upper quartile."""
    for _ in range(3):
        mine(), plain()
    found = []
    for i in range(rounds):
        seconds = {}
        for name, call in (("mine", mine), ("plain", plain))[:: 1 if i % 2 else -1]:
            began = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - began
        found.append(seconds["mine"] / seconds["plain"])
    low, median, high = statistics.quantiles(found, n=4, method="inclusive")
    return low, median, high


def row(measure: str, size: str, regions: str, state: str, parameters: int, unit: str, low, median, high, rounds: int):
    return {
        "measure": measure, "size": size, "regions": regions, "state": state, "parameters": parameters, "unit": unit,
        "low": round(low, 4), "median": round(median, 4), "high": round(high, 4), "rounds": rounds,
    }  # fmt: skip


def speed(size: str, rounds: int):
    *shape, tokens = SIZES[size]
    plain = gpt2(*shape)
    x = torch.randint(0, shape[-1], tokens)
    for regions in ("root", "blocks"):
        model = ecospa_fx.compile(
            copy.deepcopy(plain), example_inputs=(x,), example_kwargs={"labels": x}, regions=regions
        )
        for state in ("whole", "blocks halved"):
            if state != "whole":
                model.zero_grad(set_to_none=True)
                ecospa_fx.shrink(model, halves(model))
            for measure, mine in calls(model, x).items():
                yield row(
                    measure, size, regions, state, count(model), "x eager dense",
                    *ratios(mine, calls(plain, x)[measure], rounds), rounds,
                )  # fmt: skip


def shrink_cost(size: str, repeats: int):
    """A shrink of every block to half, weights, gradients and AdamW's state, in training steps of the dense model."""
    *shape, tokens = SIZES[size]
    model = gpt2(*shape)
    x = torch.randint(0, shape[-1], tokens)
    ecospa_fx.compile(model, example_inputs=(x,), example_kwargs={"labels": x})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step = calls(model, x)["forward + backward"]
    found = []
    for i in range(repeats):
        # From whole to three quarters to 9/16 and so on: each shrink rewrites and slices everything.
        for _ in range(2):
            step()
            optimizer.step()
        began = time.perf_counter()
        step()
        optimizer.step()
        stepped = time.perf_counter()
        keeps = {c: torch.arange(c.size - c.size // 4) for c in halves(model)}
        chosen = time.perf_counter()
        ecospa_fx.shrink(model, keeps, optimizer=optimizer)
        found.append((time.perf_counter() - chosen) / (stepped - began))
        if i == 0:
            parameters = count(model)
    low, median, high = statistics.quantiles(found, n=4, method="inclusive")
    yield row("shrink", size, "blocks", "25% fewer", parameters, "training steps", low, median, high, repeats)


def capture_time(layers: int):
    x = torch.randint(0, 256, (2, 16))
    for regions in ("blocks", "root"):
        if regions == "root" and layers > 32:
            continue  # grows with depth; blocks are what such a model gets by default
        model = gpt2(64, layers, 4, 256)
        began = time.perf_counter()
        ecospa_fx.compile(model, example_inputs=(x,), regions=regions)
        took = time.perf_counter() - began
        yield row("capture", f"{layers} blocks", regions, "", count(model), "s", took, took, took, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--blocks", nargs="*", type=int, default=[2, 8, 32, 128])
    parser.add_argument("--rounds", type=int, default=40, help="of the tiny model; larger ones get fewer")
    options = parser.parse_args()
    console, rows = Console(), []

    def take(found):
        for each in found:
            rows.append(each)
            console.print(" ".join(str(value) for value in each.values()))

    for layers in options.blocks:
        take(capture_time(layers))
    for size in options.sizes:
        take(speed(size, {"tiny": 5 * options.rounds, "25M": options.rounds}.get(size, max(8, options.rounds // 3))))
    if options.sizes:
        take(shrink_cost(options.sizes[-1], 3))
    table = Table(title="rewritten graphs beside eager, median (middle half)")
    for name in COLUMNS:
        table.add_column(name)
    table.add_column("median", justify="right")
    for each in rows:
        cells = [f"{each[name]:,}" if name == "parameters" else str(each[name]) for name in COLUMNS]
        table.add_row(*cells, f"{each['median']:.3f} {each['unit']} ({each['low']:.3f} to {each['high']:.3f})")
    console.print(table)
    console.print(machine())
    write_csv("rewrite", rows)
    console.print("written to bench/results/rewrite.csv")


if __name__ == "__main__":
    main()
