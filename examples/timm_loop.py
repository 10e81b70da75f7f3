"""Training loop of timm: a vision transformer shrinks with timm's optimizer, schedule, mixup, loss scaler and EMA.

    pip install 'ecospa-fx[timm]'
    python examples/timm_loop.py

A small ViT with random weights learns synthetic images of the size of CIFAR's; half of its parameters are removed
between steps 20 and 120. The averaged model shrinks in the same steps and is the one that is evaluated and saved.
"""

import argparse

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler

import ecospa_fx


def make_model() -> torch.nn.Module:
    """A ViT for images of 32 x 32."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4, num_classes=10
    )


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[count, 3, 32, 32]` images and their classes: each class a texture, shifted at random, in noise."""
    textures = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 4, 4)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    shifts = torch.randint(0, 32, (count, 2), generator=generator).tolist()
    clean = torch.stack([textures[c].roll(s, (1, 2)) for c, s in zip(labels.tolist(), shifts, strict=True)])
    return clean + torch.randn(clean.shape, generator=generator), labels


def main() -> None:
    """Train, shrink, load again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/timm")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.utils.data.TensorDataset(*images(1280, seed=1))
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True, drop_last=True)
    model = ecospa_fx.compile(make_model().to(device))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=options.epochs, warmup_epochs=1, warmup_lr=1e-4, step_on_epochs=False,
        updates_per_epoch=len(loader),
    )  # fmt: skip
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
    ema = ModelEmaV3(model, decay=0.98)
    scaler, loss_of = NativeScaler(device=device), SoftTargetCrossEntropy()
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5, start=20, interval=20, end=120, also=[ema])

    updates = 0
    for epoch in range(epochs):
        model.train()
        for x, labels in loader:
            x, targets = mixup(x.to(device), labels.to(device))
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(model(x), targets)
            scaler(loss, optimizer, clip_grad=1.0, clip_mode="norm", parameters=model.parameters())
            trainer.step()  # after the optimizer's step, before zero_grad
            optimizer.zero_grad()
            updates += 1
            ema.update(model, step=updates)
            scheduler.step_update(num_updates=updates)
        x, labels = images(400, seed=2)
        with torch.no_grad():
            right = (ema(x.to(device)).argmax(-1).cpu() == labels).float().mean()
        print(f"epoch {epoch}: {right:.1%} right with averaged weights, {trainer.size:,} parameters")

    print(ecospa_fx.diff(ema.module))
    ecospa_fx.save(ema.module, options.out)
    loaded = ecospa_fx.load(options.out, make_model)
    print(f"loaded again: {sum(p.numel() for p in loaded.parameters()):,} parameters")


if __name__ == "__main__":
    main()
