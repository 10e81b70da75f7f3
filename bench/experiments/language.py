"""All text at hand, cut into tokens by a BPE trained on it, and a GPT-2 that learns it."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ecospa_fx.demo.corpus import SKIPPED_FOLDERS
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops
from experiments.tasks import Batch, placed

PACKAGES = ("torch", "transformers", "sympy")
"""Packages whose sources are read, as far as there is room."""

PROSE = ("*.md", "*.rst", "*.txt", "METADATA", "LICENSE*", "COPYING*", "NOTICE*")
"""Names of the documentation and the licences that installed packages ship."""

LIMIT, LARGEST = 36_000_000, 300_000
"""Bytes in all, and of one file: larger ones are mostly tables that a program wrote."""

HELD_OUT = 6
"""Of 256 files, by a hash of their names."""

VOCABULARY, END = 4096, "<|end|>"


@dataclass(frozen=True)
class Language:
    """Next tokens of source text and documentation, by a GPT-2; products in bfloat16.

    Attributes:
        outside: a text of another kind that is measured on as well (WikiText-2), or None.
        kept: folder where tokens and tokenizer are kept, so that a run that goes on sees the same ones.
    """

    outside: Path | None
    kept: Path
    width: int = 352
    layers: int = 6
    context: int = 128
    batch_size: int = 16
    rate: float = 1.5e-3
    windows: int = 128

    def model(self) -> nn.Module:
        tolerate_missing_torchvision_ops()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=self.context, n_embd=self.width, n_layer=self.layers,
            n_head=self.width // 32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            activation_function="gelu_pytorch_tanh",  # the same function as GPT-2's, in one op
            attn_implementation="eager",  # in bfloat16 faster on a CPU than the fused one
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return GPT2LMHeadModel(config)

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        tokens = self._tokens()["train"]
        draw = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield self._windows(tokens, torch.randint(len(tokens) - self.context, (self.batch_size,), generator=draw))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y = placed(model, *batch)
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = model(x).logits
        return cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    def validate(self, model: nn.Module) -> dict[str, float]:
        parts = {"loss": "valid", "loss_outside": "outside"}
        return {name: self._loss(model, self._tokens()[part]) for name, part in parts.items() if part in self._tokens()}

    def _loss(self, model: nn.Module, tokens: Tensor) -> float:
        starts = torch.linspace(0, len(tokens) - self.context - 1, self.windows).long()
        batches = [self._windows(tokens, chunk) for chunk in starts.split(self.batch_size)]
        return sum(self.loss(model, batch).item() for batch in batches) / len(batches)

    def _windows(self, tokens: Tensor, starts: Tensor) -> Batch:
        windows = tokens[starts[:, None] + torch.arange(self.context + 1)].long()
        return windows[:, :-1], windows[:, 1:]

    def _tokens(self) -> dict[str, Tensor]:
        return _tokens(self.outside, self.kept)


@cache
def _tokens(outside: Path | None, kept: Path) -> dict[str, Tensor]:
    """Tokens of each part, `[n]`, int16: `train`, `valid`, and `outside` if there is such a text."""
    file = kept / "tokens.pt"
    if not file.exists():
        parts = {"train": list(texts(held_out=False)), "valid": list(texts(held_out=True))}
        random.Random(0).shuffle(parts["valid"])
        if outside is not None:
            parts["outside"] = [outside.read_text(encoding="utf-8")]
        tokenizer = trained_on(parts["train"])
        kept.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(kept / "tokenizer.json"))
        end = tokenizer.token_to_id(END)
        found = {}
        for name, each in parts.items():
            ids = [token for encoded in tokenizer.encode_batch(each) for token in (*encoded.ids, end)]
            found[name] = torch.tensor(ids, dtype=torch.int16)
            count = sum(len(text.encode()) for text in each)
            print(f"  {name}: {count:,} bytes, {len(ids):,} tokens of {count / len(ids):.2f} bytes", flush=True)
        torch.save(found, file)
    tokens: dict[str, Tensor] = torch.load(file)
    return tokens


def trained_on(text: list[str]) -> Any:
    """Train a BPE on bytes."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text, VOCABULARY, special_tokens=[END], show_progress=False)
    return tokenizer


def texts(*, held_out: bool) -> Iterator[str]:
    """The standard library, documentation and licences of installed packages, and sources of some, each text once.

    Files are in the order of a hash of their names, so that those without room are spread over all folders.
    """
    seen, room = set(), LIMIT
    for root, patterns in _places():
        files = {path for pattern in patterns for path in root.rglob(pattern) if path.is_file()}
        named = sorted((hashlib.sha256(path.relative_to(root).as_posix().encode()).digest(), path) for path in files)
        for digest, path in named:
            if SKIPPED_FOLDERS & {*path.relative_to(root).parts} or path.stat().st_size > min(LARGEST, room):
                continue
            content = path.read_bytes()
            known = hashlib.sha256(content).digest()
            if known in seen:
                continue
            seen.add(known)
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:
                continue
            room -= len(content)
            if (digest[0] < HELD_OUT) == held_out:
                yield text


def _places() -> Iterator[tuple[Path, tuple[str, ...]]]:
    yield Path(sysconfig.get_path("stdlib")), ("*.py",)
    yield Path(sysconfig.get_path("purelib")), PROSE
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).parent, ("*.py",)
