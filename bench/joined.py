"""Time of the analysis of a LLaMA by blocks, and by blocks joined across their edges.

python bench/joined.py [--rounds 5]

Both take turns, and CPU seconds are compared. Equal blocks are captured once either way; joined, the embedding, the
last norm and the head are regions too, one forward more is followed, and one is run without the regions.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from machine import machine, write_csv

import ecospa_fx
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops


def llama(layers: int, width: int, device: str) -> torch.nn.Module:
    """Return a LLaMA; on the meta device it takes no memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 7 // 2, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 128), vocab_size=1000 if device == "cpu" else 128256, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config)


def main() -> None:
    """Print and write the times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    tolerate_missing_torchvision_ops()
    rows = []
    for name, layers, width, device in (("32 layers of 64", 32, 64, "cpu"), ("80 layers of 8192", 80, 8192, "meta")):
        seconds: dict[str, list[float]] = {"blocks": [], "joined": []}
        couplings: dict[str, int] = {}
        model = llama(layers, width, device)
        tokens = torch.zeros(2, 16, dtype=torch.long, device=device)
        ecospa_fx.explain(model, example_inputs=(tokens,), regions="blocks")  # imports, and torch's own caches
        for _ in range(rounds if device == "cpu" else 1):
            for how, times in seconds.items():
                start = time.process_time()
                explanation = ecospa_fx.explain(model, example_inputs=(tokens,), regions=how)
                times.append(time.process_time() - start)
                couplings[how] = len(explanation.couplings)
        blocks, joined = (median(times) for times in seconds.values())
        row: dict[str, object] = {
            "shape": name, "blocks_s": round(blocks, 2), "joined_s": round(joined, 2),
            "ratio": round(joined / blocks, 2), "couplings_blocks": couplings["blocks"],
            "couplings_joined": couplings["joined"],
        }  # fmt: skip
        print(row)
        rows.append(row)
    write_csv("joined", rows)
    print(machine())


if __name__ == "__main__":
    main()
