"""Fuzzing: random programs by the thousand, everything found in them checked against masking.

    python -m ecospa_fx.testing.fuzz 10000 --seed 0

Prints the smallest program of each kind of failure as code that can be run; exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ecospa_fx.errors import CaptureError, NoCouplingError, VerificationError

from .check import Failure, Tally, check
from .exact import assert_exact
from .programs import RandomProgram, minimised
from .random_program import random_program

EXPORTED = "exported"
ROUND = 500  # programs between two signs of life
MOST_SHOWN = 5  # failures that are made smaller and printed


@dataclass(frozen=True)
class FuzzCounts:
    """A program that failed, and how to make it again."""

    seed: int
    number: int
    program: RandomProgram
    failure: Failure

    def __str__(self) -> str:
        return f"# program {self.number} of seed {self.seed}, made smaller: {self.failure}\n{self.source()}"

    def source(self) -> str:
        """The program and what shows its failure."""
        if self.failure.kind == EXPORTED:
            shows = 'from ecospa_fx.testing import assert_exact\n\nassert_exact(model, args, regions="root")'
        else:
            imported = "from ecospa_fx.testing.check import check_model"
            shows = f"{imported}\n\nfailure = check_model(model, args, seed={self.number})\nprint(failure)"
        return f"{self.program.source()}\n{shows}\n"


def program_number(seed: int, number: int) -> RandomProgram:
    """The same program for the same two numbers."""
    return random_program(random.Random(f"{seed}/{number}"))


def check_exported(program: RandomProgram) -> Failure | None:
    """The first failure of a program captured as a user's model is. What torch.export does not capture has none."""
    try:
        model, args = program.build()
        assert_exact(model, args, regions="root")
    except (NoCouplingError, CaptureError):
        return None
    except VerificationError as error:
        return Failure(EXPORTED, str(error))
    except Exception as error:
        return Failure(EXPORTED, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return None


def fuzz(numbers: Sequence[int], seed: int, tally: Tally, every: int = 0) -> Iterator[FuzzCounts]:
    """The failures among programs of a seed.

    Args:
        numbers: which programs.
        seed: makes them others.
        tally: counts what is checked.
        every: how many programs there are to one that is captured by torch.export as well; 0 for none.
    """
    for number in numbers:
        program = program_number(seed, number)
        failure = check(program, tally, seed=number)
        if failure is None and every and number % every == 0:
            tally.exported += 1
            failure = check_exported(program)
        if failure is not None:
            yield FuzzCounts(seed, number, program, failure)


def smallest(found: FuzzCounts) -> FuzzCounts:
    """The same failure in as small a program as can be found."""

    def fails(program: RandomProgram) -> bool:
        failure = check_exported(program) if found.failure.kind == EXPORTED else check(program, seed=found.number)
        return failure is not None and failure.kind == found.failure.kind

    program = minimised(found.program, fails, patience=100 if found.failure.kind == EXPORTED else 1000)
    failure = check_exported(program) if found.failure.kind == EXPORTED else check(program, seed=found.number)
    return FuzzCounts(found.seed, found.number, program, failure or found.failure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz from the command line; 0 if all is exact, else 1."""
    parser = argparse.ArgumentParser(prog="python -m ecospa_fx.testing.fuzz", description="Check random programs.")
    parser.add_argument("programs", type=int, nargs="?", default=1000, metavar="N", help="how many (1000)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (0)")
    parser.add_argument("--start", type=int, default=0, help="number of the first (0)")
    parser.add_argument("--every", type=int, default=20, help="one in so many goes through torch.export too (20)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tally, start = Tally(), time.perf_counter()
    numbers = range(options.start, options.start + options.programs)
    failures = []
    for first in range(numbers.start, numbers.stop, ROUND):
        for found in fuzz(numbers[first - numbers.start :][:ROUND], options.seed, tally, options.every):
            failures.append(found)
            print(f"program {found.number}: {found.failure}", flush=True)
        print(f"{tally.programs} checked, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    print(f"seed {options.seed}: {tally} in {seconds:.0f} s, {len(failures)} failed")
    by_kind: dict[str, FuzzCounts] = {}
    for found in sorted(failures, key=lambda found: len(found.program)):
        by_kind.setdefault(found.failure.kind, found)
    for found in list(by_kind.values())[:MOST_SHOWN]:
        print(f"\n{smallest(found)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
