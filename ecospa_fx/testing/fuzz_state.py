"""Fuzzing of state: random stateful modules in random loops, compiled beside plain.

    python -m ecospa_fx.testing.fuzz_state 1000 --seed 0
    python -m ecospa_fx.testing.fuzz_state 200 --ranks 2     under DistributedDataParallel

It prints the smallest program of each kind of failure as runnable code, and exits with 1 if there is any.
"""

from __future__ import annotations

import random
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import torch

from ecospa_fx.model.execution import Execution

from . import stateful_parts  # noqa: F401  (it registers parts)
from .beside import Beside, Ended
from .beside_ranks import BesideRanks, RankCrew, any_rank
from .fuzz import parser_of
from .loops import random_loop
from .sandbox import Differs
from .stateful import StatefulModule, Weight, random_module


@dataclass(frozen=True)
class StateProgram:
    """A module and a loop.

    Attributes:
        module: the module.
        steps: calls of `Beside`, in order.
        execution: as for `compile`.
        regions: as for `compile`.
    """

    module: StatefulModule
    steps: tuple[str, ...]
    execution: Execution
    regions: str

    def __len__(self) -> int:
        return len(self.steps) + 3 * len(self.module.parts) + self.module.blocks

    def source(self) -> str:
        """Return runnable code, which raises at the first difference."""
        options = f"execution={self.execution!r}, regions={self.regions!r}"
        options += ", sized=True" if self.module.sized else ""
        options += ", tokens=True" if self.module.tokens else ""
        return (
            f"{self.module.source()}\n\n"
            'if __name__ == "__main__":\n'
            "    from pathlib import Path\n\n"
            "    from ecospa_fx.testing.beside import Beside\n\n"
            f"    both = Beside(Path(__file__).read_text(), {options})\n"
            + "".join(f"    both.{step}\n" for step in self.steps)
            + '    print("PASS")\n'
        )


Check: TypeAlias = "Callable[[StateProgram, StateTally | None], StateFailure | None]"
EXECUTIONS: tuple[Execution, ...] = ("graph", "graph", "module")


def program_number(seed: int, number: int) -> StateProgram:
    """Make a program, which is the same for the same two numbers."""
    rng = random.Random(f"{seed}/{number}")
    module = random_module(rng)
    regions = rng.choice(("auto", "root", "blocks") if module.blocks > 1 else ("auto", "root"))
    return StateProgram(module, random_loop(rng, module), rng.choice(EXECUTIONS), regions)


@dataclass(frozen=True)
class StateFailure:
    """A difference that a program shows.

    Attributes:
        kind: the difference, without numbers.
        what: the difference.
        step: number of the step.
    """

    kind: str
    what: str
    step: int


@dataclass
class StateTally:
    """Counts of the programs so far."""

    programs: int = 0
    compiled: int = 0
    shrunk: int = 0
    steps: int = 0
    refusals: Counter[str] = field(default_factory=Counter)

    def add(self, other: StateTally) -> None:
        """Add the counts of other programs."""
        self.programs += other.programs
        self.compiled += other.compiled
        self.shrunk += other.shrunk
        self.steps += other.steps
        self.refusals.update(other.refusals)

    def __str__(self) -> str:
        refusals = "".join(f"\n{count:6} {text}" for text, count in self.refusals.most_common(30))
        return (
            f"{self.programs} programs with {self.steps} steps, {self.compiled} compiled at the end, {self.shrunk} "
            f"shrunk; refusals:{refusals or ' none'}"
        )


def check(
    program: StateProgram,
    tally: StateTally | None = None,
    beside: type[Beside] = Beside,
    stops: Callable[[bool], bool] = bool,
) -> StateFailure | None:
    """Return the first failure of a program, or None.

    Args:
        program: the program.
        tally: counts it.
        beside: what its steps are called on.
        stops: called after each step with whether it has failed or ended; returns whether the program ends there.
    """
    tally = StateTally() if tally is None else tally
    tally.programs += 1
    module, taken = program.module, 0
    try:
        both = beside(module.source(), program.execution, program.regions, module.sized, module.tokens)
        for step in program.steps:
            try:
                exec(f"both.{step}", {"both": both})
            except Exception:
                stops(True)
                raise
            taken += 1
            if stops(False):
                break
    except Ended:
        pass
    except Differs as error:
        return StateFailure(_kind(str(error)), str(error), taken)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/ecospa_fx/" in f.filename]
        own = [f for f in frames if "/testing/" not in f.filename]
        at = f"{own[-1].filename.split('/ecospa_fx/')[-1]}:{own[-1].lineno}" if own else "a call"
        kind = _kind(f"{type(error).__name__} at {at}")
        return StateFailure(kind, f"{type(error).__name__} at {at}: {str(error)[:300]}", taken)
    tally.steps += taken
    tally.compiled += both.compiled
    tally.shrunk += both.shrinks > 0
    tally.refusals.update(_kind(each)[:150] for each in both.refusals)
    return None


def check_on_rank(program: StateProgram) -> tuple[tuple[StateFailure | None, StateTally], bool]:
    """Check a program on one of several ranks: the failure and the counts, and whether the group is as before."""
    tally = StateTally()
    failure = check(program, tally, BesideRanks, any_rank)
    return (failure, tally), failure is None or not failure.kind.startswith("RuntimeError")


def check_on_ranks(crew: RankCrew, program: StateProgram, tally: StateTally | None = None) -> StateFailure | None:
    """Return the first failure of a program on several ranks, or None; the first rank is counted."""
    found = crew.results(program)
    if tally is not None:
        tally.add(found[0][1] if isinstance(found[0], tuple) else StateTally(1))
    texts = [each for each in found if isinstance(each, str)]
    if texts:
        return StateFailure(texts[0].strip().split("\n")[-1], texts[0], len(program.steps) - 1)
    return next((failure for failure, _ in found if failure is not None), None)


def _kind(text: str) -> str:
    """Return the step and the sort of thing that differs, without names and numbers."""
    text = re.sub(r" (is|has|expected|differs) .*", "", text.split("\n")[0])
    text = re.sub(r"\((\w* ?\d*[^ )]*|tuple|list|deque|keys|Model)\)|\d+", "", text)
    return re.sub(r"\b(attribute|buffer|parameter|gradient|global|memory|optimizer) .*", r"\1", text)


@dataclass(frozen=True)
class Found:
    """A program that failed, with the seed and number that make it again."""

    seed: int
    number: int
    program: StateProgram
    failure: StateFailure

    def __str__(self) -> str:
        what = f"# program {self.number} of seed {self.seed}, minimised: {self.failure.what}"
        return "{}\n{}".format(what.replace("\n", "\n# "), self.program.source())


def smallest(found: Found, check: Check = check) -> Found:
    """Find the same failure in a program that is as small as possible."""
    program, failure = found.program, found.failure
    program = replace(program, steps=program.steps[: failure.step + 1])

    def fails(smaller: StateProgram) -> bool:
        again = check(smaller, None)
        return again is not None and again.kind == failure.kind

    going = True
    while going:
        going = False
        for smaller in _smaller(program):
            if fails(smaller):
                program, going = smaller, True
                break
    return Found(found.seed, found.number, program, check(program, None) or failure)


def _smaller(program: StateProgram) -> Iterator[StateProgram]:
    module = program.module
    for i in range(len(module.parts)):
        yield replace(program, module=replace(module, parts=module.parts[:i] + module.parts[i + 1 :]))
    for i in range(len(program.steps)):
        yield replace(program, steps=program.steps[:i] + program.steps[i + 1 :])
    if module.weight.name != "plain":
        yield replace(program, module=replace(module, weight=Weight()))
    if module.blocks > 1 and not any(", 1)" in step for step in program.steps):
        yield replace(program, module=replace(module, blocks=1))
    if module.tokens and not any(
        "(0, 1)" in line or "transpose" in line for part in module.parts for line in part.forward
    ):
        yield replace(program, module=replace(module, tokens=False))
    if program.regions != "root":
        yield replace(program, regions="root")


def fuzz(numbers: Sequence[int], seed: int, tally: StateTally, check: Check = check) -> Iterator[Found]:
    """Iterate over the failures among the programs of a seed."""
    for number in numbers:
        program = program_number(seed, number)
        failure = check(program, tally)
        if failure is not None:
            yield Found(seed, number, program, failure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz from the command line, and return 0 if everything is exact, else 1."""
    parser = parser_of("python -m ecospa_fx.testing.fuzz_state", __doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=1, help="processes that train each program together by DDP (1)")
    parser.add_argument("--show", type=int, default=5, help="failures that are minimised and printed (5)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tally, start = StateTally(), time.perf_counter()
    failures: dict[str, list[Found]] = {}
    with RankCrew(options.ranks, check_on_rank) as crew:
        chosen: Check = check if options.ranks == 1 else partial(check_on_ranks, crew)
        for found in fuzz(range(options.start, options.start + options.programs), options.seed, tally, chosen):
            failures.setdefault(found.failure.kind, []).append(found)
            print(f"program {found.number}: {found.failure.what[:300]}", flush=True)
        count = sum(map(len, failures.values()))
        print(f"seed {options.seed}: {time.perf_counter() - start:.0f} s, {count} failed; {tally}")
        for same in sorted(failures.values(), key=lambda same: -len(same))[: options.show]:
            least = smallest(min(same, key=lambda found: len(found.program)), chosen)
            print(f"\n# {len(same)} like this\n{least}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
