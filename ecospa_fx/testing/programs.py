"""Programs: random modules as a few lines of code that can be printed, run, and minimised.

A program is a list of statements on named values. `Writer` runs every statement while writing it, on small random
tensors, so it reads shapes off the results, and drops statements that do not run.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 1e3  # of any value: larger ones lose digits
MOST_ENTRIES = 4000

_NAME = re.compile(r"\bself\.(\w+)|\b([hx]\d+)\b")


class Dead(Exception):
    """A statement that does not run, or whose values are of no use."""


@dataclass(frozen=True)
class Statement:
    """The statement `targets = code`; the code reads values by name, and modules and parameters as `self.name`."""

    targets: tuple[str, ...]
    code: str

    def __str__(self) -> str:
        return f"{', '.join(self.targets)} = {self.code}"

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of values in the code, in order."""
        return tuple(value for _, value in _NAME.findall(self.code) if value)


@dataclass(frozen=True, repr=False)
class RandomProgram:
    """A module as code.

    Attributes:
        inputs: (name, code) of each argument.
        state: (name, code) of each module or parameter, in the order of `__init__`; the code of a tie is a statement.
        statements: the forward.
        outputs: names of the values that it returns.
    """

    inputs: tuple[tuple[str, str], ...]
    state: tuple[tuple[str, str], ...]
    statements: tuple[Statement, ...]
    outputs: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.statements)

    def __repr__(self) -> str:
        return self.source()

    def source(self) -> str:
        """Return runnable code: the class `Model`, a `model` and the `args` of a call."""
        inputs = self.inputs
        init = [code if " = " in code else f"self.{name} = {code}" for name, code in self.state]
        body = [*map(str, self.statements), f"return {', '.join(self.outputs)}"]
        args = ", ".join(code for _, code in inputs)
        norms = any("BatchNorm" in code for _, code in self.state)
        statistics = "for tensor in model.buffers():", "    tensor.data = tensor + torch.rand(tensor.shape)"
        buffers = statistics if norms else ()
        lines = [
            "import torch", "import torch.nn.functional as F", "from torch import nn", "", "",
            "class Model(nn.Module):",
            "    def __init__(self):", "        super().__init__()", *(f"        {line}" for line in init), "",
            f"    def forward(self, {', '.join(name for name, _ in inputs)}):", *(f"        {line}" for line in body),
            "", "", "torch.manual_seed(0)", "model = Model().double().eval()", "for tensor in model.parameters():",
            "    nn.init.normal_(tensor, std=0.4)", *buffers, f"args = ({args},)",
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Build the model and the arguments of a call, in float64 and eval mode."""
        scope: dict[str, Any] = {"__name__": "program"}
        with torch.random.fork_rng(devices=()):
            exec(compile(self.source(), "<program>", "exec"), scope)
        return scope["model"], scope["args"]

    def trimmed(self) -> RandomProgram:
        """Return the program without the parts that its outputs do not depend on."""
        wanted = set(self.outputs)
        code_of = {s.targets[0]: s.code for s in self.statements}
        statements = []
        for statement in reversed(self.statements):
            # A write in place changes every value that shares the memory.
            if wanted & set(statement.targets) or _writes(statement.code) & _aliases(wanted, code_of):
                statements.append(statement)
                wanted |= set(statement.reads)
        statements.reverse()
        used = {name for s in statements for name, _ in _NAME.findall(s.code) if name}
        for name, code in reversed(self.state):
            if name in used:
                used |= {other for other, _ in _NAME.findall(code) if other}
        read = {name for s in statements for name in s.reads} | set(self.outputs)
        inputs = tuple(each for each in self.inputs if each[0] in read) or self.inputs[:1]
        return RandomProgram(
            inputs, tuple(each for each in self.state if each[0] in used), tuple(statements), self.outputs
        )


def free_sizes(program: RandomProgram, sizes: Mapping[int, str]) -> RandomProgram:
    """Replace numbers in a program by sizes of its arguments: the numbers are primes that occur nowhere else."""

    def read(match: re.Match[str]) -> str:
        number, factors = int(match[0]), []
        for prime, code in sizes.items():
            while number and number % prime == 0:
                number //= prime
                factors.append(code)
        return " * ".join([*factors, *([str(number)] if number != 1 or not factors else [])])

    free = (replace(s, code=re.sub(r"(?<![\w.])\d+(?![\w.])", read, s.code)) for s in program.statements)
    return replace(program, statements=tuple(free))


def _writes(code: str) -> set[str]:
    """Find the values that a statement writes into, by methods whose names end with an underscore."""
    return {value for value, _ in re.findall(r"\b([hx]\d+)\b[^ ]*?\.(\w+_)\(", code)}


def _aliases(wanted: set[str], code_of: dict[str, str]) -> set[str]:
    """Return the wanted values and those they are computed from, all of which may be views."""
    aliases = set(wanted)
    waiting = list(wanted)
    while waiting:
        for _, value in _NAME.findall(code_of.get(waiting.pop(), "")):
            if value and value not in aliases:
                aliases.add(value)
                waiting.append(value)
    return aliases


def minimise(program: RandomProgram, fails: Callable[[RandomProgram], bool], patience: int = 2000) -> RandomProgram:
    """Find a smaller program that still fails.

    Args:
        program: a program for which `fails` is true.
        fails: returns True if a program shows the failure; must be False for one that does not run.
        patience: largest number of programs to try.
    """
    program, tries, seen = program.trimmed(), 0, set()
    shrinking = True
    while shrinking:
        shrinking = False
        for smaller in _smaller(program):
            source = smaller.source()
            if source in seen:
                continue
            seen.add(source)
            tries += 1
            if tries > patience:
                return program
            if fails(smaller):
                program, shrinking = smaller, True
                break
    return program


def _smaller(program: RandomProgram) -> Iterator[RandomProgram]:
    """Iterate over programs with one output, statement or bias less, the most promising first."""
    if len(program.outputs) > 1:
        for output in program.outputs:
            yield replace(program, outputs=(output,)).trimmed()
    before = [name for name, _ in program.inputs]
    earlier = [(before := [*before, *s.targets])[: -len(s.targets)] for s in program.statements]
    for i in reversed(range(len(program.statements))):
        statement = program.statements[i]
        # Replace the statement by one of its arguments, or else by an earlier value, the latest first.
        stand_ins = dict.fromkeys((*statement.reads, *reversed(earlier[i])))
        for value in list(stand_ins)[:6]:
            names = dict.fromkeys(statement.targets, value)
            rest = (*program.statements[:i], *(_renamed(s, names) for s in program.statements[i + 1 :]))
            outputs = tuple(dict.fromkeys(names.get(name, name) for name in program.outputs))
            yield replace(program, statements=rest, outputs=outputs).trimmed()
    for i, (name, code) in enumerate(program.state):
        if " = " in code:
            yield replace(program, state=(*program.state[:i], *program.state[i + 1 :]))
        elif "bias=False" not in code and code.startswith(("nn.Linear", "nn.Conv")):
            state = (*program.state[:i], (name, f"{code[:-1]}, bias=False)"), *program.state[i + 1 :])
            yield replace(program, state=state)


def _renamed(statement: Statement, names: dict[str, str]) -> Statement:
    code = re.sub(r"(?<!self\.)\b[hx]\d+\b", lambda match: names.get(match[0], match[0]), statement.code)
    return replace(statement, code=code)


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that a program has computed so far."""

    name: str
    shape: tuple[int, ...]
    floating: bool = True

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    def __str__(self) -> str:
        return self.name


class Writer:
    """A writer of a program, statement by statement, which runs each of them.

    Attributes:
        rng: the generator of every choice.
        sizes: possible sizes of dims; few of them make many dims equal.
        values: the values so far.
    """

    def __init__(self, rng: random.Random, sizes: Sequence[int], most_entries: int = MOST_ENTRIES) -> None:
        self.rng, self.sizes, self.most_entries = rng, tuple(sizes), most_entries
        self.values: list[Value] = []
        self.module = nn.Module()
        self._scope: dict[str, Any] = {"torch": torch, "F": F, "nn": nn, "self": self.module}
        self._inputs: list[tuple[str, str]] = []
        self._state: list[tuple[str, str]] = []
        self._statements: list[Statement] = []
        self._generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def size(self) -> int:
        """Draw a size for a new dim."""
        return self.rng.choice(self.sizes)

    def chance(self, probability: float) -> bool:
        """Return True with a probability."""
        return self.rng.random() < probability

    def input(self, code: str) -> Value:
        """Add an argument of the forward, made by `code`."""
        name = f"x{len(self._inputs)}"
        self._inputs.append((name, code))
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.rng.randrange(2**31))
            self._scope[name] = value = eval(code, dict(self._scope))
        self.values.append(Value(name, tuple(value.shape), value.is_floating_point()))
        return self.values[-1]

    def hold(self, code: str) -> str:
        """Add a module or parameter, and return the code by which the forward reads it."""
        name = f"m{len(self._state)}"
        try:
            with torch.random.fork_rng(devices=()):
                member = eval(code, self._scope)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise Dead(code) from error
        if isinstance(member, nn.Module):
            member = member.double().eval()
        setattr(self.module, name, member)
        for tensor in member.parameters() if isinstance(member, nn.Module) else (member,):
            tensor.data = torch.randn(tensor.shape, generator=self._generator, dtype=torch.float64) * 0.4
        self._state.append((name, code))
        return f"self.{name}"

    def linears(self) -> list[tuple[str, str]]:
        """List (name, code) of every nn.Linear so far."""
        return [(name, code) for name, code in self._state if code.startswith("nn.Linear")]

    def parameter(self, *shape: int) -> str:
        """Add a parameter of this shape."""
        return self.hold(f"nn.Parameter(torch.randn({', '.join(map(str, shape))}))")

    def tie(self, one: str, other: str) -> None:
        """Tie the weights of two modules."""
        first, second = one.removeprefix("self."), other.removeprefix("self.")
        getattr(self.module, first).weight = getattr(self.module, second).weight
        self._state.append((first, f"{one}.weight = {other}.weight"))

    def put(self, code: str) -> Value:
        """Add a statement that computes one value."""
        (value,) = self.put_all(code, 1)
        return value

    def put_all(self, code: str, count: int) -> tuple[Value, ...]:
        """Add a statement that computes `count` values.

        Raises:
            Dead: it does not run, or its values are too many, too large or not finite.
        """
        try:
            with torch.no_grad():
                result = eval(code, self._scope)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise Dead(code) from error
        results = (result,) if isinstance(result, Tensor) else tuple(result)
        if len(results) != count:
            raise Dead(f"{code} makes {len(results)} values")
        for result in results:
            if not result.numel() or result.numel() > self.most_entries or result.ndim > 6:
                raise Dead(f"{code} makes {tuple(result.shape)}")
            if result.is_floating_point() and not float(result.abs().max()) < LARGEST:
                raise Dead(f"{code} grows")
        names = tuple(f"h{sum(len(s.targets) for s in self._statements) + i}" for i in range(count))
        self._statements.append(Statement(names, code))
        self._scope.update(zip(names, results, strict=True))
        values = [Value(n, tuple(r.shape), r.is_floating_point()) for n, r in zip(names, results, strict=True)]
        self.values += values
        return tuple(values)

    def pick(self, least: int = 1, most: int = 6, fits: Callable[[Value], bool] | None = None) -> Value:
        """Draw a value with `least` to `most` dims, late ones more often.

        Raises:
            Dead: there is none.
        """
        candidates = [v for v in self.values if v.floating and least <= v.ndim <= most and (fits is None or fits(v))]
        if not candidates:
            raise Dead("no such value")
        age = 0
        while age < len(candidates) - 1 and self.chance(0.55):
            age += 1
        return candidates[-1 - age]

    def used(self) -> set[str]:
        """Return the names of values that a statement reads."""
        return {name for s in self._statements for name in s.reads}

    def finish(self) -> RandomProgram:
        """Return the program so far, whose outputs are the last unused values."""
        used = self.used()
        unused = [v for v in self.values if v.name not in used and v.floating and not v.name.startswith("x")]
        outputs = [v.name for v in unused[-3:]] or [self.values[-1].name]
        program = RandomProgram(tuple(self._inputs), tuple(self._state), tuple(self._statements), tuple(outputs))
        return program.trimmed()
