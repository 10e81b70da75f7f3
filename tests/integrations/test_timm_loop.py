"""The training loop of timm: its optimizers, schedules, mixup, loss scaler and averages, and going on from a save."""

import pytest
import torch
from timm.data import Mixup
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler

import ecospa_fx

set_fused_attn(True)
X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4


def make_model():
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
    return VisionTransformer(**sizes, drop_path_rate=0.1)


class Loop:
    def __init__(self, model, opt="adamw", sched="cosine", layer_decay=None, **average):
        self.model = model
        self.optimizer = create_optimizer_v2(model, opt=opt, lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched=sched, num_epochs=4, decay_milestones=[2], warmup_epochs=1, step_on_epochs=False,
            updates_per_epoch=4,
        )  # fmt: skip
        self.ema, self.scaler = ModelEmaV3(model, decay=0.8, **average), NativeScaler(device="cpu")
        self.mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=4)
        settings = {"target": 0.5, "start": 2, "interval": 3, "end": 12, "also": [self.ema]}
        self.trainer = ecospa_fx.EcoSpaTrainer(model, self.optimizer, **settings)

    def train(self, steps):
        self.model.train()
        for _ in range(steps):
            x, targets = self.mixup(X.clone(), LABELS)
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(self.model(x).float(), targets)
            self.scaler(loss, self.optimizer, clip_grad=1.0, parameters=self.model.parameters())
            self.trainer.step()
            self.optimizer.zero_grad()
            self.ema.update(self.model, step=self.trainer.steps)
            self.scheduler.step_update(num_updates=self.trainer.steps)

    @property
    def rest(self):
        also = {"ema": self.ema}
        parts = {"optimizer": self.optimizer, "trainer": self.trainer, "scheduler": self.scheduler}
        return {**parts, "scaler": self.scaler, "also": also}


@pytest.mark.parametrize(
    ("opt", "sched", "layer_decay", "average"),
    [
        ("adamw", "cosine", 0.75, {}),
        ("lamb", "multistep", None, {"exclude_buffers": True}),
        ("nadamw", "poly", None, {"foreach": False, "use_warmup": True}),
        ("lion", "tanh", None, {"dtype": torch.bfloat16}),
    ],
)
def test_the_average_shrinks_with_the_model_and_the_run_ends_at_its_target(opt, sched, layer_decay, average):
    torch.manual_seed(0)
    model = ecospa_fx.compile(make_model())
    dense = sum(p.numel() for p in model.parameters())
    loop = Loop(model, opt, sched, layer_decay, **average)
    loop.train(14)
    assert loop.trainer.done and len(loop.trainer.history) > 2
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.5 * dense, rel=0.02)
    assert [p.shape for p in loop.ema.parameters()] == [p.shape for p in model.parameters()]
    assert ecospa_fx.plan(loop.ema.module) == ecospa_fx.plan(model)
    # The average follows: it meets a model that stands still.
    for step in range(20, 220):
        loop.ema.update(model, step=step)
    close = {"rtol": 0.1, "atol": 0.05} if "dtype" in average else {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        dtype = average.get("dtype", torch.float32)
        torch.testing.assert_close(loop.ema(X.to(dtype)).float(), model.eval()(X), **close)


def test_a_run_that_is_interrupted_goes_on_to_the_bit(tmp_path):
    torch.manual_seed(0)
    loop = Loop(ecospa_fx.compile(make_model()))
    loop.train(7)
    ecospa_fx.save(loop.model, tmp_path / "run", **loop.rest)
    loop.train(7)
    model = ecospa_fx.load(tmp_path / "run", make_model)
    again = Loop(model)
    ecospa_fx.resume(tmp_path / "run", model, **again.rest)
    again.train(7)
    assert again.trainer.done and again.trainer.history == loop.trainer.history
    for mine, theirs in ((model, loop.model), (again.ema, loop.ema)):
        for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q), name
