"""Data sets of `ecospa-fx train`: text read as bytes, or a folder of images with one folder per class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ecospa_fx.demo.corpus import Corpus, read_corpus, training_batches, validation_batches
from ecospa_fx.demo.options import OptionError

from .console import CommandError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
HELD_OUT = 10
"""One image in this many is held out."""


@dataclass(frozen=True)
class Text:
    """A text, cut into windows.

    Attributes:
        corpus: the bytes.
        batch_size: windows per step.
        context: bytes per window.
    """

    corpus: Corpus
    batch_size: int
    context: int

    classes = 256

    def training(self, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw batches of bytes `[batch, context]` and the bytes that follow them."""
        return training_batches(self.corpus, steps, self.batch_size, self.context, seed)

    def validation(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over held-out batches, the same ones at every call."""
        return validation_batches(self.corpus, count, self.batch_size, self.context)


@dataclass(frozen=True)
class Images:
    """Images by class.

    Attributes:
        train: files and their classes.
        valid: held-out files and their classes.
        names: names of the classes.
        size: channels, height, width.
        batch_size: images per step.
        mean: mean of each channel, for normalisation.
        std: standard deviation of each channel, for normalisation.
    """

    train: list[tuple[Path, int]]
    valid: list[tuple[Path, int]]
    names: list[str]
    size: tuple[int, int, int]
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    def training(self, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw batches of images `[batch, channels, height, width]` and their classes."""
        draw = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(self.train), (self.batch_size,), generator=draw).tolist()
            yield self._batch([self.train[i] for i in chosen])

    def validation(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over held-out batches, the same ones at every call."""
        for start in range(0, min(len(self.valid), count * self.batch_size), self.batch_size):
            yield self._batch(self.valid[start : start + self.batch_size])

    def _batch(self, files: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
        return torch.stack([self._read(path) for path, _ in files]), torch.tensor([label for _, label in files])

    def _read(self, path: Path) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        channels, height, width = self.size
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB" if channels == 3 else "L").resize((width, height)).tobytes()
        except (UnidentifiedImageError, OSError) as error:
            raise CommandError(f"{path} cannot be read as an image: {error}") from None
        tensor = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(height, width, channels).permute(2, 0, 1)
        shape = (-1, 1, 1)
        return (tensor / 255 - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(shape)


def read_text(path: Path | None, batch_size: int, context: int) -> Text:
    """Read a file or folder of text, or Python's standard library.

    Raises:
        CommandError: the path does not exist, or holds too little text.
    """
    if path is not None and not path.exists():
        raise CommandError(f"--text {path}: no such file or folder")
    try:
        return Text(read_corpus(path, 20 * batch_size * context), batch_size, context)
    except OptionError as error:
        raise CommandError(str(error)) from None


def read_images(
    folder: Path, batch_size: int, size: tuple[int, int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> Images:
    """List the images of a folder that holds one folder per class.

    Raises:
        CommandError: there are fewer than two classes, or too few images.
    """
    if not folder.is_dir():
        raise CommandError(f"--images {folder}: no such folder")
    names = sorted(child.name for child in folder.iterdir() if child.is_dir())
    files = [
        (path, label) for label, name in enumerate(names)
        for path in sorted((folder / name).rglob("*")) if path.suffix.lower() in SUFFIXES
    ]  # fmt: skip
    if len(names) < 2 or len(files) < 2 * HELD_OUT:
        raise CommandError(
            f"--images {folder} holds {len(files)} images in {len(names)} folders; it needs one folder per class, "
            f"at least 2 of them, and {2 * HELD_OUT} images"
        )
    valid = files[::HELD_OUT]
    train = [file for i, file in enumerate(files) if i % HELD_OUT]
    return Images(train, valid, names, size, batch_size, mean, std)


def channels(values: tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return one value per channel: those given, or their mean if the number differs."""
    return values if len(values) == count else tuple([sum(values) / len(values)] * count)
