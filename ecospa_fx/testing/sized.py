"""Sized programs: random programs that can be written once more at smaller sizes, like one class at two configs.

Every width of such a program is a prime, or a multiple of one, that no other number in it is a multiple of. A smaller
program has another number in its place, wherever it occurs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from . import attention, blocks, mixing, rearranging  # noqa: F401  (these modules register moves)
from .moves import MOVES, project
from .programs import Dead, RandomProgram, Writer
from .random_program import attempt, unused

WIDTHS = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)
ENTERING = (3, 4, 5, 6, 8, 9, 10)  # sizes of arguments, which cannot shrink
INPUTS = (
    "torch.randn({b}, {s}, {d}, dtype=torch.float64)", "torch.randn({b}, {s}, {d}, dtype=torch.float64)",
    "torch.randn({b}, {d}, dtype=torch.float64)", "torch.randn({b}, {d}, {s}, 4, dtype=torch.float64)",
    "torch.randint(6, ({b}, {s}))",
)  # fmt: skip
OFTEN = {"reduction": 4.0, "norm": 4.0, "residual": 2.0}  # moves that are drawn so much more often

# Moves that write numbers which are no sizes: weights by position, places at which a dim is cut, the scale of scores.
_WITH_NUMBERS = ("masked", "moved", "sliced", "parts", "torch_attention")
_NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")


class _Widths(Writer):
    """A writer of a program whose layers mostly have widths of their own."""

    def size(self) -> int:
        """Draw a size for a new dim, mostly one that no other has."""
        if len(self.sizes) < len(WIDTHS) and self.chance(0.85):
            self.sizes += (self.rng.choice([p for p in WIDTHS if p not in self.sizes]),)
            return self.sizes[-1]
        return super().size()


def sized_program(rng: random.Random, most: int = 8) -> RandomProgram:
    """Make a program of up to `most` random moves; equal states of the generator make equal programs."""
    w = _Widths(rng, (rng.choice(WIDTHS),))
    sizes = {"b": rng.choice((1, 2, 4)), "s": rng.choice((3, 4, 5, 6)), "d": rng.choice(ENTERING)}
    x = w.input(rng.choice(INPUTS).format(**sizes))
    with suppress(Dead):  # a large prime makes too many entries
        if not x.floating:
            w.put(f"{w.hold(f'nn.Embedding(6, {w.size()})')}({x})")
        elif x.ndim == 4:
            w.put(f"{w.hold(f'nn.Conv2d({x.shape[1]}, {w.size()}, 1)')}({x})")
        elif w.chance(0.8):
            project(w, x, w.size())
    table = [
        (step, weight * OFTEN.get(kind, 1.0)) for step, weight, kind in MOVES if step.__name__ not in _WITH_NUMBERS
    ]
    for step, _ in rng.choices(table, [weight for _, weight in table], k=rng.randint(2, most)):
        attempt(w, step)
    for value in unused(w)[-3:]:
        with suppress(Dead):
            for _ in range(rng.randint(1, 2)):
                value = project(w, value, w.size())
    return w.finish()


def widths_of(program: RandomProgram) -> list[int]:
    """Return the primes of a program that may become smaller: those of no argument, and of no table."""
    entering = {int(n) for _, code in program.inputs for n in _NUMBER.findall(code)}
    written = {int(n) for _, code in program.state for n in _NUMBER.findall(code)}
    code = program.source()
    return [
        p for p in WIDTHS if not _multiples(entering, p) and _multiples(written, p) and not _counted_by_hand(code, p)
    ]


def _counted_by_hand(code: str, prime: int) -> bool:
    """Return whether code counts a width in a table of positions or a slice, which no smaller weights make smaller."""
    return re.search(rf"arange\({prime}\b|:{prime}\b", code) is not None


def _multiples(numbers: set[int], prime: int) -> bool:
    return any(number and number % prime == 0 for number in numbers)


def resized(program: RandomProgram, sizes: Mapping[int, int]) -> RandomProgram:
    """Write a program with other numbers in place of primes."""

    def read(match: re.Match[str]) -> str:
        number = int(match[0])
        for prime, size in sizes.items():
            powers = 0
            while number and number % prime ** (powers + 1) == 0:
                powers += 1
            number = number // prime**powers * size**powers
        return str(number)

    return replace(
        program,
        state=tuple((name, code if " = " in code else _NUMBER.sub(read, code)) for name, code in program.state),
        statements=tuple(replace(s, code=_NUMBER.sub(read, s.code)) for s in program.statements),
    )
