"""Corpus of real text without a download: files read as bytes, split into training and held-out parts."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .options import OptionError

LIMIT = 4_000_000
"""Largest number of bytes read: several times the training text of the demo, and quick to read."""

HELD_OUT = 0.1
"""Fraction of the bytes kept for validation."""

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})
"""Folders outside of the standard library proper, which some installations have and others do not."""


@dataclass(frozen=True)
class Corpus:
    """Bytes for training and bytes for validation.

    Attributes:
        train: training bytes, `[n]`, uint8.
        valid: held-out bytes, `[m]`, uint8.
        source: description of their origin.
    """

    train: Tensor
    valid: Tensor
    source: str


def read_corpus(text: Path | None, least: int) -> Corpus:
    """Read the corpus of a demo.

    Args:
        text: file or folder, or None for the interpreter's standard library (its `*.py`).
        least: smallest number of bytes that fits the batch size and context.

    Raises:
        OptionError: there is no text, or less than `least` bytes.
    """
    if text is None:
        root, pattern = Path(sysconfig.get_path("stdlib")), "*.py"
        source = f"Python {platform.python_version()} standard library"
    else:
        root, pattern, source = text, "*", text.name or "text"
    try:
        train, valid = split_by_position(root) if root.is_file() else split_by_file(root, pattern)
    except OSError as error:
        raise OptionError(f"--text {text}: {error.strerror or error}") from error
    if len(train) + len(valid) < least:
        where = "the standard library" if text is None else f"--text {text}"
        raise OptionError(
            f"{where} holds {len(train) + len(valid):,} bytes of text; this batch size and context need {least:,}"
        )
    if not train or not valid:
        raise OptionError(f"--text {text} holds a single file of text; name that file itself: its end is held out then")
    return Corpus(_tensor(train), _tensor(valid), source)


def split_by_position(file: Path) -> tuple[bytes, bytes]:
    """Divide one file into its training bytes and, from its end, its held-out bytes."""
    content = file.read_bytes()[:LIMIT]
    cut = len(content) - round(HELD_OUT * len(content))
    return content[:cut], content[cut:]


def split_by_file(root: Path, pattern: str = "*") -> tuple[bytes, bytes]:
    """Divide the text files of a folder into training and held-out bytes; no file is in both.

    Files are ordered by a hash of their path inside the folder: the same order on every machine, and mixed, so that
    neither the held-out part nor the first `LIMIT` bytes are one corner of the tree.

    Returns:
        Training bytes and held-out bytes.
    """
    files = [path for path in root.rglob(pattern) if path.is_file() and not _skipped(path.relative_to(root))]
    names = {path: path.relative_to(root).as_posix() for path in files}
    files.sort(key=lambda path: (hashlib.sha256(names[path].encode()).digest(), names[path]))
    contents: list[bytes] = []
    total = 0
    for path in files:
        if total >= LIMIT:
            break
        content = path.read_bytes()[: LIMIT - total]
        if content and b"\0" not in content[:4096]:  # a NUL early on marks a binary file
            contents.append(content)
            total += len(content)
    train: list[bytes] = []
    valid: list[bytes] = []
    budget = HELD_OUT * total
    for content in contents:
        if len(content) <= budget:
            budget -= len(content)
            valid.append(content)
        else:
            train.append(content)
    if not valid and len(train) > 1:  # every file is larger than the share to hold out
        valid.append(train.pop())
    return b"".join(train), b"".join(valid)


def training_batches(
    corpus: Corpus, steps: int, batch_size: int, context: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw the windows of a run; equal seeds give equal windows in the same order.

    Yields:
        Bytes and the bytes that follow them, both `[batch_size, context]`, int64.
    """
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(corpus.train) - context, (batch_size,), generator=draw)
        yield _windows(corpus.train, starts, context)


def validation_batches(corpus: Corpus, count: int, batch_size: int, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut `count` batches of evenly spaced windows from the held-out bytes; the same ones at every call.

    Yields:
        Bytes and the bytes that follow them, both `[batch_size, context]`, int64.
    """
    starts = torch.linspace(0, len(corpus.valid) - context - 1, count * batch_size).long()
    for chunk in starts.split(batch_size):
        yield _windows(corpus.valid, chunk, context)


def _windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    windows = text[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _skipped(relative: Path) -> bool:
    return any(part in SKIPPED_FOLDERS or part.startswith(".") for part in relative.parts)
