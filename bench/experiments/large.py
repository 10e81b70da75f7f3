"""GPT-2-Medium and LLaMA-1B while they lose half: step time, tokens a second and peak memory at every size, and loss.

PYTHONPATH=bench python -m experiments.large --model gpt2-medium --scale gpu [--minutes 12] [--steps 3000] [--data DIR]

gpt2-medium  24 blocks of 1,024 channels (355 million parameters), 8 windows of 1,024 tokens a step
llama-1b     16 blocks of 2,048 channels (1.2 billion), 4 windows of 1,024

From random weights, on the text of `language.py`; weights and AdamW in float32, products in bfloat16. By the paper's
rule couplings lose half of their entries in five shrinks between 25% and 65% of the run. With `--scale cpu` both are
tiny: that shows that all of it runs.

A run whose minutes are over saves what it has, and the same command goes on there, so that short loans of a GPU add
up. `results/large.csv` holds a row for every size that a model had; times are medians with quartiles, without the steps
that shrank and the one after each.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, kept_rows, write_csv
from rich.table import Table
from torch import nn

import ecospa_fx
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops
from experiments.language import VOCABULARY, Language
from experiments.results import arguments, show
from experiments.runs import clock, has_save

SIZES: dict[tuple[str, str], dict[str, Any]] = {
    ("gpt2-medium", "gpu"): {
        "width": 1024, "layers": 24, "context": 1024, "batch_size": 8, "rate": 3e-4, "vocabulary": 50_257,
    },
    ("gpt2-medium", "cpu"): {"width": 64, "layers": 2, "context": 32, "batch_size": 4},
    ("llama-1b", "gpu"): {
        "width": 2048, "layers": 16, "context": 1024, "batch_size": 4, "rate": 2e-4, "vocabulary": 128_256,
    },
    ("llama-1b", "cpu"): {"width": 64, "layers": 2, "context": 32, "batch_size": 4},
}  # fmt: skip
MODELS = tuple(dict.fromkeys(model for model, _ in SIZES))


@dataclass(frozen=True)
class Large(Language):
    """One of the two; heads of 64 channels.

    Attributes:
        vocabulary: rows of the embedding; those of the BPE's tokens are in use.
    """

    name: str = MODELS[0]
    vocabulary: int = VOCABULARY

    def model(self) -> nn.Module:
        tolerate_missing_torchvision_ops()
        import transformers as tf

        heads = max(2, self.width // 64)
        if self.name == "gpt2-medium":
            config = tf.GPT2Config(
                vocab_size=self.vocabulary, n_positions=self.context, n_embd=self.width, n_layer=self.layers,
                n_head=heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
                bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            return tf.GPT2LMHeadModel(config)
        return tf.LlamaForCausalLM(
            tf.LlamaConfig(
                vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=4 * self.width,
                num_hidden_layers=self.layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 4),
                max_position_embeddings=self.context, tie_word_embeddings=True, use_cache=False,
            )
        )  # fmt: skip


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: steps taken.
        sizes: by number of parameters what was seen at that size: `seconds` and `losses` of its steps, the seconds of
            the shrink that led there, the `peak` of a GPU's memory in bytes.
    """

    step: int = 0
    sizes: dict[int, dict[str, Any]] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "sizes": {str(size): each for size, each in self.sizes.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.sizes = {int(size): copy.deepcopy(dict(each)) for size, each in state["sizes"].items()}

    def at(self, size: int) -> dict[str, Any]:
        return self.sizes.setdefault(size, {"seconds": [], "losses": [], "shrink": 0.0, "peak": 0})


def main() -> None:
    options = arguments(
        __doc__, data=True, steps=300, seeds=1, workers=1,
        model={"choices": MODELS, "required": True}, minutes={"type": float, "default": 12.0},
    )  # fmt: skip
    outside = None if options.data is None else options.data / "wikitext-2" / "test.txt"
    task = Large(
        outside, options.runs / "language", name=options.model, windows=64, **SIZES[options.model, options.scale]
    )
    place = options.runs / f"large_{options.model}_{options.scale}_{options.steps}"
    progress, validated = go_on(task, options, place)
    rows = rows_of(options, task, progress, validated)
    others = [row for row in kept_rows("large") if (row["model"], row["scale"]) != (options.model, options.scale)]
    write_csv("large", [*others, *rows])
    columns = [name for name in rows[0] if name not in ("model", "scale", "of", "step_ms_low", "step_ms_high")]
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row[name]) for name in columns))
    show(f"{options.model}, {progress.step} of {options.steps} steps", table)
    if progress.step < options.steps:
        print(f"the {options.minutes:g} minutes are over; the same command goes on at step {progress.step + 1}")
    print(f"written to {RESULTS / 'large.csv'}")


def go_on(task: Large, options: argparse.Namespace, place: Path) -> tuple[Progress, dict[str, float]]:
    """Train until all steps are taken or the minutes are over; return where it is, and what the end validated."""
    until = time.monotonic() + 60 * options.minutes
    torch.manual_seed(0)
    model = task.model().to(options.device)
    first, _ = next(iter(task.batches(1, 0)))
    ecospa_fx.compile(model, example_inputs=(first.to(options.device),))
    optimizer = torch.optim.AdamW(model.parameters(), task.rate, (0.9, 0.95), fused=options.device != "cpu")
    trainer = ecospa_fx.EcoSpaTrainer(
        model, optimizer, target=0.5, among="prunable",
        start=round(0.25 * options.steps), interval=max(1, round(0.1 * options.steps)), end=round(0.65 * options.steps),
    )  # fmt: skip
    progress = Progress()
    also = {"progress": progress}
    if has_save(place):
        ecospa_fx.resume(place, model, optimizer=optimizer, trainer=trainer, also=also)
    for batch in itertools.islice(task.batches(options.steps, 0), progress.step, None):
        size = trainer.size
        began = clock(options.device)
        for group in optimizer.param_groups:
            group["lr"] = task.rate * min(1.0, (progress.step + 1) / (0.05 * options.steps))
        loss = task.loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        between = clock(options.device)
        trainer.step(loss=loss)
        ended = clock(options.device)
        optimizer.zero_grad()
        progress.step += 1
        here = progress.at(size)
        here["losses"].append(loss.item())
        if options.device != "cpu":
            here["peak"] = max(here["peak"], torch.cuda.max_memory_allocated())
        if trainer.size == size:
            here["seconds"].append(ended - began)
        else:
            progress.at(trainer.size)["shrink"] = ended - between
            if options.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
        if time.monotonic() > until:
            break
    validated: dict[str, float] = {}
    if progress.step == options.steps:
        with torch.no_grad():
            validated = task.validate(model.eval())
    ecospa_fx.save(model, place, optimizer=optimizer, trainer=trainer, also=also)
    return progress, validated


def rows_of(
    options: argparse.Namespace, task: Large, progress: Progress, validated: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for every size that the model had, the first one first."""
    rows, whole = [], max(progress.sizes)
    for size, seen in sorted(progress.sizes.items(), reverse=True):
        times = seen["seconds"][1:] or seen["seconds"]  # the first one may have captured, tuned or compiled
        low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times or [math.nan]) * 3
        last = seen["losses"][-max(1, len(seen["losses"]) // 10) :]
        rows.append(
            {
                "model": options.model, "scale": options.scale, "parameters": size, "share": f"{size / whole:.3f}",
                "steps": len(seen["losses"]), "of": options.steps, "step_ms": f"{1e3 * middle:.1f}",
                "step_ms_low": f"{1e3 * low:.1f}", "step_ms_high": f"{1e3 * high:.1f}",
                "tokens_per_second": round(task.batch_size * task.context / middle) if middle > 0 else "",
                "peak_gib": f"{seen['peak'] / 2**30:.2f}" if seen["peak"] else "",
                "shrink_s": f"{seen['shrink']:.2f}", "loss": f"{statistics.mean(last):.3f}" if last else "",
            }
            | dict.fromkeys(("valid", "valid_outside"), "")
        )  # fmt: skip
    if validated:
        rows[-1]["valid"] = f"{validated['loss']:.3f}"
        rows[-1]["valid_outside"] = f"{validated['loss_outside']:.3f}" if "loss_outside" in validated else ""
    return rows


if __name__ == "__main__":
    main()
