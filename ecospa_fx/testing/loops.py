"""Loops: random sequences of steps that people take with a model, each a line of code on a `Beside`."""

from __future__ import annotations

import random
from collections.abc import Callable

from .stateful import StatefulModule

BATCHES = (2, 3, 3, 3, 5)
LINES = 3000  # that a shrink of a small model runs, about
KINDS = {
    "train": 5.0, "call": 2.0, "mode": 1.5, "change": 4.0, "shrink": 2.0, "interrupted": 0.3, "save_and_load": 0.4,
    "state_dict": 0.5, "deepcopy": 0.5, "pickle": 0.5, "explain": 0.3, "verify": 0.5, "keep": 0.3,
}  # fmt: skip

ALWAYS = (
    "block.down.requires_grad_(False)", "block.down.requires_grad_(True)", "block.down.weight.data.mul_(0.9)",
    "block.flag = True",
)  # fmt: skip


def random_loop(rng: random.Random, module: StatefulModule, most: int = 9) -> tuple[str, ...]:
    """Draw a loop of up to `most` steps after `compile`, and a last one that trains."""
    changes = [change for part in module.parts for change in part.changes]
    changes = changes or [*ALWAYS]
    step: dict[str, Callable[[], str]] = {
        "train": lambda: f"train({rng.choice(BATCHES)})",
        "call": lambda: f"call({rng.choice(BATCHES)})",
        "mode": lambda: f"mode({rng.random() < 0.5})",
        "change": lambda: f"change({rng.choice(changes)!r}, {rng.randrange(module.blocks)})",
        "shrink": lambda: f"shrink({rng.randrange(1000)})",
        "interrupted": lambda: f"shrink({rng.randrange(1000)}, line={rng.randint(1, LINES)})",
        "keep": lambda: f"keep('block.down.weight', {rng.randrange(module.blocks)})",
    }
    weights = KINDS | ({"change": 0.5} if changes == [*ALWAYS] else {})
    steps = [before for before, share in (("explain()", 0.1), ("train(3)", 0.15), ("mode(False)", 0.2))
             if rng.random() < share]  # fmt: skip
    steps.append(f"compile({rng.choice(BATCHES)})" if rng.random() < 0.4 else "compile()")
    for kind in rng.choices([*weights], [*weights.values()], k=rng.randint(3, most)):
        steps.append(step[kind]() if kind in step else f"{kind}()")
    return (*steps, step["train"]())
