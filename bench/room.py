"""Room and time of a shrink: the memory that it takes for a moment, and what is left afterwards.

PYTHONPATH=bench python bench/room.py

38 million parameters with gradients and the state of AdamW lose a tenth of every coupling, three times in a row. Memory
is the resident set of the process, peaks since its start; seconds are of CPU, one thread.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch
from machine import write_csv
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ecospa_fx

MEGA = 2**20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(512, 2048) for _ in range(18))
        self.downs = nn.ModuleList(nn.Linear(2048, 512) for _ in range(18))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(up(x).relu())
        return x


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MEGA


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    tensors = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t is not None]
    return sum(t.untyped_storage().nbytes() for t in tensors) / MEGA


def main() -> None:
    torch.set_num_threads(1)
    model = ecospa_fx.compile(Net(), example_inputs=(torch.randn(2, 512),))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model(torch.randn(2, 512)).sum().backward()
    optimizer.step()
    table, rows = Table("shrink", "held, MB", "resident, MB", "peak", "after", "held after", "CPU s"), []
    for number in range(1, 4):
        keeps = {each: torch.arange(each.size // 10, each.size) for each in ecospa_fx.couplings(model)}
        before, memory, start = held(model, optimizer), resident(), time.process_time()
        ecospa_fx.shrink(model, keeps, optimizer=optimizer)
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        figures = [before, memory, peak, resident(), held(model, optimizer)]
        table.add_row(str(number), *(f"{each:.0f}" for each in figures), f"{seconds:.2f}")
        names = ("held_mb", "resident_mb", "peak_mb", "resident_after_mb", "held_after_mb")
        rounded = {name: round(each) for name, each in zip(names, figures, strict=True)}
        rows.append({"shrink": number, **rounded, "cpu_seconds": round(seconds, 2)})
    Console().print(table)
    write_csv("room", rows)


if __name__ == "__main__":
    main()
