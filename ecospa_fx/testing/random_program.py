"""Random programs: random modules as code."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress

from . import attention, blocks, mixing, rearranging  # noqa: F401  (these modules register moves)
from .moves import MOVES, Move
from .programs import Dead, RandomProgram, Value, Writer, free_sizes

# Few sizes make many dims equal, so axes must be told apart by position; with size 1, dims may be squeezed.
SIZES = ((4,), (2, 4), (3, 4, 5, 6, 7), (2, 3, 4, 6, 8), (6, 8, 12), (1, 2, 3, 6))


# Inputs and their weights: tokens, token numbers, rows, images, or tokens and a memory of another length.
INPUTS = {"tokens": 5.0, "words": 1.0, "rows": 1.0, "images": 1.5, "two": 1.0}
BATCH, LENGTH = 53, 59  # primes, of which no other size in a program is a multiple
KINDS = tuple(sorted({kind for _, _, kind in MOVES}))


def random_program(
    rng: random.Random, kinds: Sequence[str] = (), most: int = 10, inputs: Sequence[str] = tuple(INPUTS)
) -> RandomProgram:
    """Make a program of up to `most` random moves, all of which run.

    Args:
        rng: the generator of every choice; equal states make equal programs.
        kinds: kinds of moves to draw from, of `KINDS`; by default all.
        most: largest number of moves; a block such as an attention is one.
        inputs: possible inputs, of `INPUTS`.
    """
    w = Writer(rng, rng.choice(SIZES))
    _begin(w, rng.choices(inputs, [INPUTS[kind] for kind in inputs])[0])
    _draw(w, kinds, most)
    return w.finish()


def free_program(rng: random.Random, kinds: Sequence[str] = (), most: int = 4) -> RandomProgram:
    """Make a program of tokens `[b, s, d]` that takes any batch size `b` and any length `s`, as far as it can.

    Some programs have a length in a parameter; calling one with two sizes shows it.
    """
    w = Writer(rng, rng.choice(SIZES[1:5]), most_entries=2**21)
    w.input(f"torch.randn({BATCH}, {LENGTH}, {w.size()}, dtype=torch.float64)")
    _draw(w, kinds, most)
    return free_sizes(w.finish(), {BATCH: "x0.shape[0]", LENGTH: "x0.shape[1]"})


def _draw(w: Writer, kinds: Sequence[str], most: int) -> None:
    table = [(step, weight) for step, weight, kind in MOVES if not kinds or kind in kinds]
    for _ in range(w.rng.randint(1, most)):
        (step,) = w.rng.choices([step for step, _ in table], [weight for _, weight in table])
        attempt(w, step)
    while len(w.values) < 3:
        attempt(w, blocks.mlp)
    _end(w)


def _begin(w: Writer, kind: str) -> None:
    batch, sequence = w.rng.choice(((2, 5), (2, 4), (1, 3), (w.size(), w.size())))
    if kind == "words":
        entries = 7
        words = w.input(f"torch.randint({entries}, ({batch}, {sequence}))")
        w.put(f"{w.hold(f'nn.Embedding({entries}, {w.size()})')}({words})")
        return
    shape = {
        "rows": (batch, w.size()),
        "images": (batch, w.size(), *w.rng.choice(((4, 4), (3, 5), (4, 6)))),
    }.get(kind, (batch, sequence, w.size()))
    w.input(f"torch.randn({', '.join(map(str, shape))}, dtype=torch.float64)")
    if kind == "two":
        w.input(f"torch.randn({batch}, {sequence + 1}, {w.size()}, dtype=torch.float64)")


def attempt(w: Writer, step: Move) -> None:
    """Write a move, if a value fits it."""
    with suppress(Dead):
        step(w)


def _end(w: Writer) -> None:
    """Add weights after unused values, so that the weights before these have a partner."""
    for value in unused(w)[-3:]:
        try:
            for _ in range(w.rng.randint(0, 2)):
                value = w.put(f"{w.hold(f'nn.Linear({value.shape[-1]}, {w.size()})')}({value})")
            if w.chance(0.15):
                w.put(f"{value}.sum({w.rng.randrange(value.ndim)})")
        except Dead:
            continue


def unused(w: Writer) -> list[Value]:
    """List values that no statement reads."""
    used = w.used()
    return [v for v in w.values if v.floating and v.ndim and v.name not in used and not v.name.startswith("x")]
