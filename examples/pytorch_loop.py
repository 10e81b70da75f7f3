"""Plain PyTorch: a model shrinks in a training loop, is saved in between, and continues in a new process.

    pip install ecospa-fx
    python examples/pytorch_loop.py

A transformer written here, with random weights, learns the source of Python's standard library as bytes; half of its
parameters are removed between steps 40 and 120. It saves every 40 steps. Stop it with Ctrl-C and run it
again with --resume.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import nn

import ecospa_fx


class Block(nn.Module):
    """Attention and an MLP, nothing in it that knows of shrinking."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, length, width]` to the same."""
        b, s, d = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, d))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Bytes(nn.Module):
    """A language model over bytes."""

    def __init__(self, width: int = 64, length: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[batch, length]` bytes to `[batch, length, 256]` logits."""
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def main() -> None:
    """Train, shrink, load again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/pytorch")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[: 160 * 8 * 65]
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, 65)
    shuffled = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))  # the same after a resume
    batches = windows[shuffled].view(-1, 8, 65)

    torch.manual_seed(0)
    model = ecospa_fx.load(options.out, Bytes) if options.resume else ecospa_fx.compile(Bytes())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 160)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5, start=40, interval=20, end=120)
    if options.resume:
        ecospa_fx.resume(options.out, model, optimizer=optimizer, trainer=trainer, scheduler=scheduler)

    for tokens in batches[trainer.steps :]:
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        trainer.step(loss=loss)  # after backward, before zero_grad
        optimizer.zero_grad()
        scheduler.step()
        if trainer.steps % 40 == 0:
            print(f"step {trainer.steps}: loss {loss:.3f}, {trainer.size:,} parameters")
            ecospa_fx.save(model, options.out, optimizer=optimizer, trainer=trainer, scheduler=scheduler)

    print(ecospa_fx.diff(model))
    loaded = ecospa_fx.load(options.out, Bytes)
    print(f"loaded again: {sum(p.numel() for p in loaded.parameters()):,} parameters")


if __name__ == "__main__":
    main()
