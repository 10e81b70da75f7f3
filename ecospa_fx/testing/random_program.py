"""random_program: a random module, as code."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress

from . import attention, blocks, mixing, rearranging  # noqa: F401  (they register their moves)
from .moves import MOVES, Move
from .programs import Dead, RandomProgram, Value, Writer, freed

# Few sizes make many dims equal, and axes must meet by position all the same; with ones among them, dims may vanish.
SIZES = ((4,), (2, 4), (3, 4, 5, 6, 7), (2, 3, 4, 6, 8), (6, 8, 12), (1, 2, 3, 6))


# Where a program begins: tokens, token numbers, rows, images, or tokens and a memory of another length.
INPUTS = {"tokens": 5.0, "words": 1.0, "rows": 1.0, "images": 1.5, "two": 1.0}
BATCH, LENGTH = 53, 59  # primes that no other size of a program is a multiple of
KINDS = tuple(sorted({kind for _, _, kind in MOVES}))


def random_program(
    rng: random.Random, kinds: Sequence[str] = (), most: int = 10, inputs: Sequence[str] = tuple(INPUTS)
) -> RandomProgram:
    """A program of up to `most` random moves, all of which run.

    Args:
        rng: where every choice comes from; the same state makes the same program.
        kinds: the kinds of moves to draw from, of `KINDS`; by default all.
        most: most moves; a block such as an attention is one.
        inputs: how it may begin, of `INPUTS`.
    """
    w = Writer(rng, rng.choice(SIZES))
    _begin(w, rng.choices(inputs, [INPUTS[kind] for kind in inputs])[0])
    _draw(w, kinds, most)
    return w.finish()


def free_program(rng: random.Random, kinds: Sequence[str] = (), most: int = 4) -> RandomProgram:
    """A program of tokens `[b, s, d]` that takes them in any number `b` and of any length `s`, as far as it can.

    Some read a length off a parameter; call one in two ways to know.
    """
    w = Writer(rng, rng.choice(SIZES[1:5]), most_entries=2**21)
    w.input(f"torch.randn({BATCH}, {LENGTH}, {w.size()}, dtype=torch.float64)")
    _draw(w, kinds, most)
    return freed(w.finish(), {BATCH: "x0.shape[0]", LENGTH: "x0.shape[1]"})


def _draw(w: Writer, kinds: Sequence[str], most: int) -> None:
    table = [(step, weight) for step, weight, kind in MOVES if not kinds or kind in kinds]
    for _ in range(w.rng.randint(1, most)):
        (step,) = w.rng.choices([step for step, _ in table], [weight for _, weight in table])
        _try(w, step)
    while len(w.values) < 3:
        _try(w, blocks.mlp)
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


def _try(w: Writer, step: Move) -> None:
    with suppress(Dead):
        step(w)


def _end(w: Writer) -> None:
    """Weights that take up what is loose, so that what made it meets something."""
    for value in _loose(w)[-3:]:
        try:
            for _ in range(w.rng.randint(0, 2)):
                value = w.put(f"{w.hold(f'nn.Linear({value.shape[-1]}, {w.size()})')}({value})")
            if w.chance(0.15):
                w.put(f"{value}.sum({w.rng.randrange(value.ndim)})")
        except Dead:
            continue


def _loose(w: Writer) -> list[Value]:
    used = w.used()
    return [v for v in w.values if v.floating and v.ndim and v.name not in used and not v.name.startswith("x")]
