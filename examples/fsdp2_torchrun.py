"""Many ranks: a model is sharded by FSDP2, shrinks while it trains, is saved by all ranks and goes on with others.

    pip install ecospa-fx
    torchrun --standalone --nproc-per-node 2 examples/fsdp2_torchrun.py --steps 40
    torchrun --standalone --nproc-per-node 3 examples/fsdp2_torchrun.py --resume

The recipe of today's large runs, small enough for two cores of a CPU: shards per block, activation checkpointing,
mixed precision in bfloat16, gradient accumulation, clipping. The weights are made on the meta device, so that no rank
ever holds all of them. A transformer learns the source of Python's standard library as bytes, and loses half of its
parameters between steps 20 and 60. On GPUs the same script runs with NCCL. `--torch-compile` compiles each block, too.
"""

import argparse
import os
import sysconfig
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import ecospa_fx

MICRO, BATCH, LENGTH = 2, 4, 64


class Block(nn.Module):
    """Attention and a gated MLP, nothing in it that knows of shrinking."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, length, width]` to the same."""
        y = self.norms[0](x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Bytes(nn.Module):
    """A language model over bytes, whose blocks are computed again in the backward pass."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[batch, length]` bytes to `[batch, length, 256]` logits."""
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


def sharded(model: Bytes, device: torch.device, compiles: bool) -> Bytes:
    """Shard a model on the meta device per block, and give it memory."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        if compiles:
            block.compile()
        fully_shard(block, mp_policy=half)
    fully_shard(model, mp_policy=half)
    return model.to_empty(device=device)


def main() -> None:
    """Train, shrink, save, go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/fsdp2")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--torch-compile", action="store_true")
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if gpu else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    windows = windows[: len(windows) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)

    with torch.device("meta"):
        example = torch.zeros(BATCH, LENGTH, dtype=torch.long)
        if options.resume:
            model = ecospa_fx.load(options.out, Bytes, device="meta")  # at the sizes of the save, without values
        else:
            model = ecospa_fx.compile(Bytes(), example_inputs=(example,))  # before it is sharded
    sharded(model, device, options.torch_compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5, start=20, interval=10, end=60)
    if options.resume:
        ecospa_fx.resume(options.out, model, optimizer=optimizer, trainer=trainer)
    else:
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            nn.init.ones_(parameter) if "norm" in name else nn.init.normal_(parameter, std=0.05)

    first = trainer.steps
    while trainer.steps < options.steps:
        step = trainer.steps
        # The first call in bfloat16 is captured, which compiled code under checkpointing cannot wait for.
        torch.compiler.set_stance("force_eager" if step == first else "default")
        for micro in range(MICRO):
            model.set_requires_gradient_sync(micro == MICRO - 1)  # gradients are reduced once per step
            row = ((step * MICRO + micro) * world + rank) * BATCH % (len(windows) - BATCH)
            tokens = windows[row : row + BATCH].to(device)
            logits = model(tokens[:, :-1]).float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / MICRO
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        trainer.step(loss=loss * MICRO)  # after the optimizer's step, before zero_grad
        optimizer.zero_grad()
        if trainer.steps % 40 == 0:
            ecospa_fx.save(model, options.out, optimizer=optimizer, trainer=trainer)  # all ranks together
            if rank == 0:
                print(f"step {trainer.steps}: loss {loss * MICRO:.3f}, {trainer.size:,} parameters", flush=True)

    change = ecospa_fx.diff(model)
    if rank == 0:
        print(change)
        alone = ecospa_fx.load(options.out, Bytes)  # one process reads what all have written
        print(f"loaded again: {sum(p.numel() for p in alone.parameters()):,} parameters")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
