"""Bytes that each of 2 to 8 ranks sends at a sparsification step under FSDP2, counted, beside the formula.

python bench/ranks.py

A small LLaMA is sharded per block and trains with AdamW; every collective that c10d is asked for is counted where torch
dispatches it. A rank sends of an all-reduce of `b` bytes `2 b (n - 1) / n`, as in a ring, of an all-gather `b (n - 1)`
of its `b`, of an all-to-all what is not its own. The formula then gives LLaMA-70B on 512 ranks.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import machine, write_csv
from rich.console import Console
from rich.table import Table
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode

import ecospa_fx

WEIGHT, MOMENTS, GRADIENT = 4, 8, 4  # bytes in float32


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA, from which a formula knows what is sent."""

    width: int
    hidden: int
    layers: int
    heads: int
    key_heads: int

    @property
    def scored(self) -> int:
        """Rows and columns that are scored: of gate, up and down, and of q, k, v and o."""
        head = self.width // self.heads
        return self.layers * (3 * self.hidden + 2 * self.width + 2 * self.key_heads * head)

    @property
    def cut_along_rows(self) -> int:
        """Parameters of matrices that lose rows, which FSDP2 shards: gate, up, q, k and v."""
        head = self.width // self.heads
        return self.layers * self.width * (2 * self.hidden + self.width + 2 * self.key_heads * head)

    def all_reduced(self) -> int:
        """Bytes of the all-reduce of scores, and likewise of that of norms."""
        return 4 * self.scored

    def moved_at_most(self, ranks: int, each: int) -> int:
        """Bytes that a rank sends at most at a shrink: its shard of what loses rows, with `each` bytes a parameter."""
        return -(-self.cut_along_rows * each // ranks)

    def gathered(self, ranks: int, each: int) -> int:
        """Bytes that a rank would get, and send in a ring, if all matrices that lose rows were gathered."""
        return self.cut_along_rows * each * (ranks - 1) // ranks


Count = tuple[dict[str, int], dict[str, float], dict[str, int]]
"""By kind of collective: calls, bytes sent, bytes of the largest."""

TINY = Shape(width=64, hidden=176, layers=4, heads=4, key_heads=2)
SEVENTY = Shape(width=8192, hidden=28672, layers=80, heads=64, key_heads=8)


class Block(nn.Module):
    """Attention of grouped heads and a gated MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, self.head = shape.width, shape.width // shape.heads
        keys = shape.key_heads * self.head
        self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(d, n, bias=False) for n in (d, keys, keys))
        self.o, self.gate, self.up, self.down = (
            nn.Linear(a, b, bias=False) for a, b in ((d, d), (d, shape.hidden), (d, shape.hidden), (shape.hidden, d))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, length, width]` to the same."""
        y = self.norms[0](x)
        q, k, v = (f(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Counted(TorchDispatchMode):
    """Counts calls and bytes sent of each kind of collective, on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.bytes: dict[str, float] = {}
        self.largest: dict[str, int] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an op of c10d."""
        if op.namespace == "c10d":
            name, ranks = op._schema.name.removeprefix("c10d::").strip("_"), distributed.get_world_size()
            tensors = [t for each in args[:2] for t in (each if isinstance(each, list) else [each])]
            size = max((t.nbytes for t in tensors if isinstance(t, torch.Tensor)), default=0)
            sent = {"allreduce": 2 * size * (ranks - 1) / ranks}.get(name, float(size))
            if name.startswith("alltoall"):
                into, given = args[0], args[1]
                parts = args[4] or [given.numel() // ranks] * ranks
                sent = float((sum(parts) - parts[distributed.get_rank()]) * given.element_size())
                size = into.nbytes
            self.calls[name] = self.calls.get(name, 0) + 1
            self.bytes[name] = self.bytes.get(name, 0.0) + sent
            self.largest[name] = max(self.largest.get(name, 0), size)
        return op(*args, **(kwargs or {}))


def sharded(rank: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    """Make the model, the same on each rank, and the batch of this one."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, TINY.width, generator=torch.Generator().manual_seed(rank))
    blocks = nn.Sequential(*(Block(TINY) for _ in range(TINY.layers)))
    model = ecospa_fx.compile(blocks, example_inputs=(x,), regions="blocks")
    for block in model:
        fully_shard(block)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), x


def one_run(rank: int, ranks: int, port: int, out: str) -> None:
    """Train for some steps on one rank, count at each step, and write down what was counted."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    model, optimizer, x = sharded(rank)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5, start=3, interval=50, end=4, theta=1.0)
    found = {}
    for step in range(3):
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        with Counted() as found[f"step {step}"]:
            trainer.step()  # gradients are still there, and are cut too
        optimizer.zero_grad()
    assert len(trainer.history) == 1
    # The entries of the first half stay, all of which lie on half of the ranks.
    model, optimizer, x = sharded(rank)
    (model(x) - x.flip(-1)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    halves = {c: torch.arange(c.size // 2) for c in ecospa_fx.couplings(model)}
    with Counted() as found["halves"]:
        ecospa_fx.shrink(model, halves, optimizer=optimizer)
    torch.save({name: (each.calls, each.bytes, each.largest) for name, each in found.items()}, f"{out}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def measured(ranks: int) -> list[dict[str, Count]]:
    """Return by rank what was counted in each step."""
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        port = each.getsockname()[1]
    with tempfile.TemporaryDirectory() as out:
        start_processes(one_run, (ranks, port, out), nprocs=ranks, start_method="fork")
        return [torch.load(Path(out) / f"{rank}.pt") for rank in range(ranks)]


def row_of(shape: Shape, ranks: int, found: list[dict[str, Count]] | None) -> dict[str, object]:
    """Return the bytes of a rank, of those that send most, beside the formula."""
    state = WEIGHT + MOMENTS
    row: dict[str, object] = {"ranks": ranks, "layers": shape.layers, "width": shape.width}
    if found is not None:
        steps = [each[f"step {n}"] for each in found for n in (0, 1)]
        shrinks, halves = ([each[name] for each in found] for name in ("step 2", "halves"))
        row |= {
            "calls_between": sum(sum(calls.values()) for calls, _, _ in steps),
            "calls": max(sum(calls.values()) for calls, _, _ in shrinks),
            "largest_all_reduce": max(largest["allreduce"] for _, _, largest in shrinks),
        }
    row["scores"] = shape.all_reduced()
    if found is not None:
        row |= {
            "sent": round(max(sent["alltoall_base"] for _, sent, _ in shrinks)),
            "at_most": shape.moved_at_most(ranks, state + GRADIENT),
            "sent_halves": round(max(sent["alltoall_base"] for _, sent, _ in halves)),
        }
    row |= {"at_most_halves": shape.moved_at_most(ranks, state), "by_gather": shape.gathered(ranks, state)}
    return row


def main() -> None:
    """Count, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=8, help="ranks at most")
    options = parser.parse_args()
    rows = [row_of(TINY, ranks, measured(ranks)) for ranks in range(2, options.most + 1)]
    rows.append(row_of(SEVENTY, 512, None))
    columns = dict.fromkeys(column for row in rows for column in row)
    rows = [{column: row.get(column, "") for column in columns} for row in rows]
    table = Table(title="bytes per rank")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    Console(width=200).print(table)
    print(f"written {write_csv('ranks', rows)}; {machine()}")


if __name__ == "__main__":
    main()
