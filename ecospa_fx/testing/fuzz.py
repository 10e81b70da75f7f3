"""Fuzzing: thousands of random programs, with everything found in them checked against masking.

Beside each of them goes a sized one, which is checked against the same program at smaller sizes.

    python -m ecospa_fx.testing.fuzz 10000 --seed 0

It prints the smallest program of each kind of failure as runnable code, and exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ecospa_fx.errors import CaptureError, NoCouplingError, VerificationError

from .check import Failure, Tally, check
from .exact import assert_exact
from .programs import RandomProgram, minimise
from .random_program import random_program
from .sized import sized_program
from .smaller import check_smaller

EXPORTED = "exported"
ROUND = 500  # programs between two progress lines
MOST_SHOWN = 5  # failures that are minimised and printed


@dataclass(frozen=True)
class FuzzFailure:
    """A program that failed, with the seed and number that make it again."""

    seed: int
    number: int
    program: RandomProgram
    failure: Failure
    sized: bool = False

    def __str__(self) -> str:
        return f"# program {self.number} of seed {self.seed}, minimised: {self.failure}\n{self.source()}"

    def source(self) -> str:
        """Return the program, and the code that shows its failure."""
        if self.sized:
            return self.program.source()  # the failure says which number is which in the smaller one
        if self.failure.kind == EXPORTED:
            test = 'from ecospa_fx.testing import assert_exact\n\nassert_exact(model, args, regions="root")'
        else:
            imported = "from ecospa_fx.testing.check import check_model"
            test = f"{imported}\n\nfailure = check_model(model, args, seed={self.number})\nprint(failure)"
        return f"{self.program.source()}\n{test}\n"


def program_number(seed: int, number: int) -> RandomProgram:
    """Make a program, which is the same for the same two numbers."""
    return random_program(random.Random(f"{seed}/{number}"))


def sized_number(seed: int, number: int) -> RandomProgram:
    """Make a sized program, which is the same for the same two numbers."""
    return sized_program(random.Random(f"{seed}/{number}"))


def check_exported(program: RandomProgram) -> Failure | None:
    """Return the first failure of a program captured like a user's model; None if torch.export does not capture it."""
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


def fuzz(numbers: Sequence[int], seed: int, tally: Tally, every: int = 0) -> Iterator[FuzzFailure]:
    """Iterate over the failures among the programs of a seed.

    Args:
        numbers: numbers of the programs.
        seed: seed of the programs.
        tally: counts of the checks, updated here.
        every: capture one in this many programs by torch.export as well; 0: none.
    """
    for number in numbers:
        program = program_number(seed, number)
        failure = check(program, tally, seed=number)
        if failure is None and every and number % every == 0:
            tally.exported += 1
            failure = check_exported(program)
        if failure is not None:
            yield FuzzFailure(seed, number, program, failure)
        program = sized_number(seed, number)
        failure = check_smaller(program, tally, seed=number)
        if failure is not None:
            yield FuzzFailure(seed, number, program, failure, sized=True)


def smallest(failed: FuzzFailure) -> FuzzFailure:
    """Find the same failure in a program that is as small as possible."""

    def fails(program: RandomProgram) -> bool:
        failure = check_again(program)
        return failure is not None and failure.kind == failed.failure.kind

    def check_again(program: RandomProgram) -> Failure | None:
        if failed.sized:
            return check_smaller(program, seed=failed.number)
        return check_exported(program) if failed.failure.kind == EXPORTED else check(program, seed=failed.number)

    program = minimise(failed.program, fails, patience=100 if failed.failure.kind == EXPORTED else 1000)
    return replace(failed, program=program, failure=check_again(program) or failed.failure)


def parser_of(prog: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a command that runs numbered programs of a seed."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("programs", type=int, nargs="?", default=1000, metavar="N", help="number of programs (1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the programs (0)")
    parser.add_argument("--start", type=int, default=0, help="number of the first (0)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz from the command line, and return 0 if everything is exact, else 1."""
    parser = parser_of("python -m ecospa_fx.testing.fuzz", "Check random programs.")
    parser.add_argument("--every", type=int, default=20, help="one in this many goes through torch.export too (20)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tally, start = Tally(), time.perf_counter()
    numbers = range(options.start, options.start + options.programs)
    failures = []
    for first in range(numbers.start, numbers.stop, ROUND):
        for failed in fuzz(numbers[first - numbers.start :][:ROUND], options.seed, tally, options.every):
            failures.append(failed)
            print(f"program {failed.number}: {failed.failure}", flush=True)
        print(f"{tally.programs} checked, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    print(f"seed {options.seed}: {tally} in {seconds:.0f} s, {len(failures)} failed")
    by_kind: dict[str, FuzzFailure] = {}
    for failed in sorted(failures, key=lambda each: len(each.program)):
        by_kind.setdefault(failed.failure.kind, failed)
    for failed in list(by_kind.values())[:MOST_SHOWN]:
        print(f"\n{smallest(failed)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
