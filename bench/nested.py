"""Three sizes of one run beside three runs of one size each, at equal total steps.

PYTHONPATH=bench python bench/nested.py [--steps 300] [--seeds 0 1 2]

A small LLaMA on bytes of Python's standard library is trained whole for `--steps` steps. From there: one run of as many
steps in which every step is taken by all sizes in turn, which share their weights; and a run of as many steps for each
size alone, its entries chosen in the same way. So both take three forwards and backwards per step, at the same sizes.
Loss in nats per byte on held-out text.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from machine import write_csv
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ecospa_fx
from ecospa_fx.demo.corpus import read_corpus
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops

tolerate_missing_torchvision_ops()

TARGETS = (0.7, 0.5, 0.35)
BATCH, LENGTH, RATE = 8, 64, 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in options.seeds:
        rows += measure(seed, options.steps)
        write_csv("nested", rows)


def measure(seed: int, steps: int) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    corpus = read_corpus(None, 100_000)
    model = make()
    data = windows(corpus.train, seed)
    train(model, torch.optim.AdamW(model.parameters(), lr=RATE), data, steps)
    valid = list(take(windows(corpus.valid, 100), 20))
    dense = loss_on(model, valid)
    judges = list(take(windows(corpus.train, 1000 + seed), 8))
    rows, began = [], time.perf_counter()
    whole = copy.deepcopy(model)
    sizes, optimizer = nested(model, TARGETS, judges)
    batches = windows(corpus.train, 7 + seed)
    for _ in range(steps):
        batch = next(batches)
        sizes.backward(lambda m, batch=batch: loss_of(m, batch))
        optimizer.step()
        optimizer.zero_grad()
    together = {}
    for number, size in enumerate(sizes.sizes):
        with sizes.at(number):
            together[size.target] = loss_on(sizes.model, valid)
    seconds = time.perf_counter() - began
    for target in TARGETS:
        began = time.perf_counter()
        alone, optimizer = nested(copy.deepcopy(whole), [target], judges)
        before = loss_on(alone.model, valid)
        train(alone.model, optimizer, windows(corpus.train, 7 + seed), steps)
        row = {
            "seed": seed, "steps": steps, "target": target, "dense": f"{dense:.4f}", "untrained": f"{before:.4f}",
            "nested": f"{together[target]:.4f}", "alone": f"{loss_on(alone.model, valid):.4f}",
            "parameters": alone.sizes[0].parameters, "seconds_nested": f"{seconds:.0f}",
            "seconds_alone": f"{time.perf_counter() - began:.0f}",
        }  # fmt: skip
        print(row, flush=True)
        rows.append(row)
    return rows


def make() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=256, use_cache=False, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def nested(model: nn.Module, targets: Any, judges: list[Tensor]) -> tuple[ecospa_fx.NestedSizes, torch.optim.Optimizer]:
    """Choose the sizes of a model, and make an optimizer."""
    ecospa_fx.compile(model, example_kwargs={"input_ids": judges[0]})
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE / 2)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=min(targets))
    calls = [{"input_ids": batch, "labels": batch} for batch in judges]
    return trainer.nested(calls, targets=list(targets)), optimizer


def windows(text: Tensor, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=generator)
        yield torch.stack([text[s : s + LENGTH] for s in starts]).long()


def take(batches: Any, count: int) -> Any:
    return (next(batches) for _ in range(count))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def loss_on(model: nn.Module, batches: list[Tensor]) -> float:
    return sum(float(loss_of(model, batch)) for batch in batches) / len(batches)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any, steps: int) -> None:
    for _ in range(steps):
        loss_of(model, next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
