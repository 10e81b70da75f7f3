"""CIFAR-10, learned by a small ResNet or a small vision transformer."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops
from experiments.tasks import Batch, placed

SIDE, BORDER = 32, 4
"""Pixels of an image, and how far it may shift."""


class Block(nn.Module):
    """Two convolutions and what goes past them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        whole = before == after and stride == 1
        past = (nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.past = nn.Identity() if whole else nn.Sequential(*past)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.past(x) + self.norm2(self.conv2(inner)))


class ResNet(nn.Module):
    """ResNet-18 with a stem for small images: 3 x 3, no stride, no pooling."""

    def __init__(self, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU())
        widths = [width * 2**stage for stage, count in enumerate(blocks) for _ in range(count)]
        self.blocks = nn.Sequential(
            *(Block(a, b, 1 if a == b else 2) for a, b in itertools.pairwise([width, *widths]))
        )  # fmt: skip
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Stem(nn.Module):
    """Patches of 4 x 4 pixels by three convolutions, in the place of timm's one."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        self.patch_size, self.grid_size = (patch_size, patch_size), (img_size // patch_size,) * 2
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        widths = (in_chans, embed_dim // 4, embed_dim // 2, embed_dim)
        layers: list[nn.Module] = []
        for (before, after), stride in zip(itertools.pairwise(widths), (1, 2, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(2).transpose(1, 2)  # [n, patches, width]


@dataclass(frozen=True)
class Images:
    """CIFAR-10; each image flipped and shifted at random, products in bfloat16.

    Attributes:
        source: folder with `train.npz` and `test.npz`: `jpeg` (all files end to end), `offset`, `label`.
        arch: `"resnet"` or `"vit"`.
        width: channels of the ResNet's first stage, or of the transformer.
        blocks: of the ResNet's stages; those of the transformer are their sum.
    """

    source: Path
    arch: str
    width: int
    blocks: tuple[int, ...]
    batch_size: int = 64
    rate: float = 2e-3

    def model(self) -> nn.Module:
        if self.arch == "resnet":
            return ResNet(self.width, self.blocks).to(memory_format=torch.channels_last)
        tolerate_missing_torchvision_ops()
        from timm.models.vision_transformer import VisionTransformer

        sizes: dict[str, Any] = {"embed_dim": self.width, "depth": sum(self.blocks), "num_heads": self.width // 32}
        model = VisionTransformer(
            img_size=SIDE, patch_size=4, num_classes=10, embed_layer=Stem, global_pool="avg", class_token=False, **sizes
        )
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # in bfloat16 slower on a CPU than its parts
        return model

    def batches(self, steps: int, seed: int) -> Sequence[Batch]:
        return Augmented(*_decoded(self.source / "train.npz"), steps, self.batch_size, seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(_logits(model, batch[0]), *placed(model, batch[1]))

    def validate(self, model: nn.Module) -> dict[str, float]:
        images, labels = _decoded(self.source / "test.npz")
        logits = torch.cat([_logits(model, _normal(part.float())).cpu() for part in images.split(250)])
        right = (logits.argmax(1) == labels).float().mean().item()
        return {"loss": cross_entropy(logits, labels).item(), "accuracy": right}


class Augmented(Sequence[Batch]):
    """Batches that are made when they are taken; every image once in an epoch."""

    def __init__(self, images: Tensor, labels: Tensor, steps: int, batch_size: int, seed: int) -> None:
        self.images, self.labels, self.steps, self.batch_size, self.seed = images, labels, steps, batch_size, seed
        self.in_epoch = len(images) // batch_size

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:  # type: ignore[override]
        if not 0 <= step < self.steps:
            raise IndexError(step)
        epoch, place = divmod(step, self.in_epoch)
        order = torch.randperm(len(self.images), generator=_generator(self.seed, epoch, 0))
        chosen = order[place * self.batch_size :][: self.batch_size]
        draw = _generator(self.seed, epoch, 1 + place)
        count = len(chosen)
        x = pad(self.images[chosen].float(), (BORDER,) * 4)
        rows, columns = torch.randint(2 * BORDER + 1, (2, count, 1), generator=draw) + torch.arange(SIDE)
        x = x[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [n, 32, 32, 3]
        flip = torch.rand(count, generator=draw) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(2), x)
        return _normal(x).permute(0, 3, 1, 2), self.labels[chosen]


def _generator(seed: int, epoch: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 10_000 + epoch) * 100_000 + place)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    (x,) = placed(model, x)
    with torch.autocast(x.device.type, torch.bfloat16):
        return model(x.contiguous(memory_format=torch.channels_last)).float()


@cache
def _decoded(path: Path) -> Batch:
    """Images `[n, 3, 32, 32]`, uint8, and labels `[n]`."""
    from PIL import Image

    held = np.load(path)
    data, offset = held["jpeg"].tobytes(), held["offset"]
    files = (data[a:b] for a, b in itertools.pairwise(offset))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(held["label"].astype(np.int64))


def _normal(pixels: Tensor) -> Tensor:
    return pixels / 64 - 2
