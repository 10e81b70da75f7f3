"""Share of parameters on couplings, by the default regions and by the root, on small models of public libraries.

PYTHONPATH=bench python bench/coverage.py [--only NAME ...]

The models are those of which repeated blocks hold only a part: convolutions around transformers, U-Nets, networks that
work on conditions, detectors. Libraries that are not installed are named and left out.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from machine import machine, write_csv
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import ecospa_fx
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops
from ecospa_fx.errors import EcoSpaError

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size)


def timm_model(name: str, size: int, **options: Any) -> Callable[[], Case]:
    def build() -> Case:
        import timm

        return timm.create_model(name, **options), (images(size),), {}

    return build


def open_clip_resnet() -> Case:
    from open_clip.modified_resnet import ModifiedResNet

    return ModifiedResNet([1, 2, 1, 1], output_dim=64, heads=4, image_size=64, width=16), (images(64),), {}


def hunyuan_dit() -> Case:
    from diffusers import HunyuanDiT2DModel

    model = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8, hidden_size=32,
        num_layers=4, mlp_ratio=2.0, cross_attention_dim=32, cross_attention_dim_t5=24, pooled_projection_dim=16,
        text_len=5, text_len_t5=6, activation_fn="gelu-approximate", norm_type="layer_norm",
    )  # fmt: skip
    x = torch.randn(2, 4, 8, 8)
    kwargs = {
        "encoder_hidden_states": torch.randn(2, 5, 32), "text_embedding_mask": torch.ones(2, 5),
        "encoder_hidden_states_t5": torch.randn(2, 6, 24), "text_embedding_mask_t5": torch.ones(2, 6),
        "image_meta_size": torch.tensor([[8, 8, 8, 8, 0, 0]] * 2), "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": (torch.randn(16, 16), torch.randn(16, 16)), "return_dict": False,
    }  # fmt: skip
    return model, (x, torch.tensor([1.0, 2.0])), kwargs


def unetr() -> Case:
    from monai.networks.nets import UNETR

    model = UNETR(1, 2, (32, 32, 32), feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4, proj_type="conv")
    return model, (torch.randn(1, 1, 32, 32, 32),), {}


def shufflenet() -> Case:
    from torchvision.models import ShuffleNetV2

    return ShuffleNetV2([2, 3, 2], [16, 24, 48, 96, 128], num_classes=10), (images(64),), {}


def _unet_options() -> dict[str, Any]:
    return {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16}


def unet_2d() -> Case:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, **_unet_options(),
    )  # fmt: skip
    return model, (images(16), torch.tensor([3, 4])), {"return_dict": False}


def _conditions() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 16, 16), torch.tensor([3, 4]), torch.randn(2, 5, 24)


def unet_2d_condition() -> Case:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=4, **_unet_options(),
    )  # fmt: skip
    return model, _conditions(), {"return_dict": False}


def controlnet() -> Case:
    from diffusers import ControlNetModel

    options = _unet_options()
    del options["sample_size"]
    model = ControlNetModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=24, attention_head_dim=4,
        conditioning_embedding_out_channels=(8, 16), **options,
    )  # fmt: skip
    kwargs = {"controlnet_cond": images(32), "return_dict": False}
    return model, _conditions(), kwargs


def dit() -> Case:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=3, patch_size=2,
        sample_size=8, norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    kwargs = {"timestep": torch.tensor([1, 2]), "class_labels": torch.tensor([3, 4]), "return_dict": False}
    return model, (torch.randn(2, 4, 8, 8),), kwargs


class Conv(nn.Sequential):
    def __init__(self, c: int, d: int, k: int = 1, s: int = 1) -> None:
        super().__init__(nn.Conv2d(c, d, k, s, k // 2, bias=False), nn.BatchNorm2d(d), nn.SiLU())


class Bottleneck(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = Conv(c, c, 3), Conv(c, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))


class Split(nn.Module):
    """Half of the channels go through bottlenecks, and all that come out are joined."""

    def __init__(self, c: int, n: int = 1) -> None:
        super().__init__()
        self.first, self.last = Conv(c, c), Conv(c * (n + 2) // 2, c)
        self.blocks = nn.ModuleList(Bottleneck(c // 2) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Pyramid(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.last = Conv(c, c // 2), Conv(c * 2, c)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.last(torch.cat(parts, 1))


class Detector(nn.Module):
    """A detector with a backbone, a path down and two heads, in the manner of YOLOv8."""

    def __init__(self, c: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv(3, c, 3, 2), Conv(c, 2 * c, 3, 2), Split(2 * c))
        self.middle = nn.Sequential(Conv(2 * c, 4 * c, 3, 2), Split(4 * c, 2))
        self.deep = nn.Sequential(Conv(4 * c, 8 * c, 3, 2), Split(8 * c), Pyramid(8 * c))
        self.join = Split(12 * c)
        self.heads = nn.ModuleList(
            nn.Sequential(Conv(d * c, 2 * c, 3), Conv(2 * c, 2 * c, 3), nn.Conv2d(2 * c, classes + 4, 1))
            for d in (12, 8)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        middle = self.middle(self.stem(x))
        deep = self.deep(middle)
        joined = self.join(torch.cat([F.interpolate(deep, scale_factor=2), middle], 1))
        return tuple(head(level) for head, level in zip(self.heads, (joined, deep), strict=True))


CASES: dict[str, Callable[[], Case]] = {
    "MobileViT (timm)": timm_model("mobilevit_xxs", 64, num_classes=10),
    "ResNet (open_clip)": open_clip_resnet,
    "HunyuanDiT (diffusers)": hunyuan_dit,
    "UNETR (monai)": unetr,
    "LeViT (timm)": timm_model("levit_128s", 224, num_classes=10),
    "ShuffleNetV2 (torchvision)": shufflenet,
    "ControlNet (diffusers)": controlnet,
    "UNet2D (diffusers)": unet_2d,
    "UNet2DCondition (diffusers)": unet_2d_condition,
    "DiT (diffusers)": dit,
    "YOLOv8-like (here)": lambda: (Detector(), (images(64),), {}),
    "ViT (timm)": timm_model("vit_tiny_patch16_224", 224, num_classes=10, depth=4),
    "ResNet-18 (torchvision)": lambda: (torchvision_resnet(), (images(64),), {}),
}


def torchvision_resnet() -> nn.Module:
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=10)
    return model


def share_on_couplings(model: nn.Module, explanation: ecospa_fx.Explanation) -> float:
    """The entries of parameters on at least one coupling, of all."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    on = {member.parameter for coupling in explanation.couplings for member in coupling.members}
    return sum(sizes.get(name, 0) for name in on) / sum(sizes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="words in the names of the models to measure")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tolerate_missing_torchvision_ops()
    rows: list[dict[str, object]] = []
    for name, build in CASES.items():
        if options.only and not any(word.lower() in name.lower() for word in options.only):
            continue
        torch.manual_seed(0)
        try:
            model, args, kwargs = build()
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        model.train()
        row: dict[str, object] = {"model": name, "parameters": sum(p.numel() for p in model.parameters())}
        for regions in ("auto", "blocks", "root"):
            start = time.thread_time()
            try:
                found = ecospa_fx.explain(model, example_inputs=args, example_kwargs=kwargs, regions=regions)
                row[f"{regions}_share"] = round(share_on_couplings(model, found), 3)
                row[f"{regions}_regions"] = "root" if found.regions == ("",) else len(found.regions)
                row[f"{regions}_couplings"] = len(found.couplings)
                if regions == "auto":
                    row["auto_outside"] = round(found.snapshot.share_outside, 3)
            except EcoSpaError as error:
                row[f"{regions}_share"], row[f"{regions}_regions"], row[f"{regions}_couplings"] = (
                    0.0,
                    str(error)[:80],
                    0,
                )
            row[f"{regions}_s"] = round(time.thread_time() - start, 2)
        rows.append(row)
        print(row, flush=True)
    table = Table(title="share of parameters on couplings (CPU seconds of explain)")
    for column in ("model", "auto", "blocks", "root", "regions by default", "outside of them"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        cells = [f"{row[f'{regions}_share']} ({row[f'{regions}_s']})" for regions in ("auto", "blocks", "root")]
        table.add_row(str(row["model"]), *cells, str(row["auto_regions"]), str(row.get("auto_outside", "")))
    console = Console(width=110)
    console.print(table)
    console.print(machine())
    if not options.only:
        write_csv("coverage", rows)
        console.print("written to bench/results/coverage.csv")


if __name__ == "__main__":
    main()
