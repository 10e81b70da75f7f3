"""Programs: random modules as a few lines of code that can be printed, run, and made shorter.

A program is a list of statements on named values. `Writer` runs every statement as it writes it, on small random
tensors: so shapes need no arithmetic of their own, and what does not run is not written.
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

LARGEST = 1e3  # of any value: what grows further loses its digits
MOST_ENTRIES = 4000

_NAME = re.compile(r"\bself\.(\w+)|\b([hx]\d+)\b")


class Dead(Exception):
    """A statement that does not run, or makes what nobody wants to go on with."""


@dataclass(frozen=True)
class Statement:
    """`targets = code`; the code reads values by name and what the module holds as `self.name`."""

    targets: tuple[str, ...]
    code: str

    def __str__(self) -> str:
        return f"{', '.join(self.targets)} = {self.code}"

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of values in the code, in order."""
        return tuple(value for _, value in _NAME.findall(self.code) if value)


@dataclass(frozen=True, repr=False)
class RandomProgram:
    """A module as code.

    Attributes:
        inputs: (name, code that makes one) of each argument.
        held: (name, code) of each module or parameter, in the order of `__init__`; the code of a tie is a statement.
        statements: the forward.
        outputs: what it returns.
    """

    inputs: tuple[tuple[str, str], ...]
    held: tuple[tuple[str, str], ...]
    statements: tuple[Statement, ...]
    outputs: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.statements)

    def __repr__(self) -> str:
        return self.source()

    def source(self) -> str:
        """Code that can be run: the class `Model`, a `model` and the `args` of a call."""
        inputs = self.inputs
        init = [code if " = " in code else f"self.{name} = {code}" for name, code in self.held]
        body = [*map(str, self.statements), f"return {', '.join(self.outputs)}"]
        made = ", ".join(code for _, code in inputs)
        norms = any("BatchNorm" in code for _, code in self.held)
        statistics = "for tensor in model.buffers():", "    tensor.data = tensor + torch.rand(tensor.shape)"
        buffers = statistics if norms else ()
        lines = [
            "import torch", "import torch.nn.functional as F", "from torch import nn", "", "",
            "class Model(nn.Module):",
            "    def __init__(self):", "        super().__init__()", *(f"        {line}" for line in init), "",
            f"    def forward(self, {', '.join(name for name, _ in inputs)}):", *(f"        {line}" for line in body),
            "", "", "torch.manual_seed(0)", "model = Model().double().eval()", "for tensor in model.parameters():",
            "    nn.init.normal_(tensor, std=0.4)", *buffers, f"args = ({made},)",
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model and the arguments of a call, in float64 and eval mode."""
        scope: dict[str, Any] = {"__name__": "program"}
        with torch.random.fork_rng(devices=()):
            exec(compile(self.source(), "<program>", "exec"), scope)
        return scope["model"], scope["args"]

    def trimmed(self) -> RandomProgram:
        """The same without what its outputs do not depend on."""
        wanted = set(self.outputs)
        written = {s.targets[0]: s.code for s in self.statements}
        statements = []
        for statement in reversed(self.statements):
            # What is written in place is seen by all who hold the same memory.
            if wanted & set(statement.targets) or _writes(statement.code) & _aliases(wanted, written):
                statements.append(statement)
                wanted |= set(statement.reads)
        statements.reverse()
        used = {name for s in statements for name, _ in _NAME.findall(s.code) if name}
        for name, code in reversed(self.held):
            if name in used:
                used |= {other for other, _ in _NAME.findall(code) if other}
        read = {name for s in statements for name in s.reads} | set(self.outputs)
        inputs = tuple(each for each in self.inputs if each[0] in read) or self.inputs[:1]
        return RandomProgram(inputs, tuple(h for h in self.held if h[0] in used), tuple(statements), self.outputs)


def freed(program: RandomProgram, sizes: Mapping[int, str]) -> RandomProgram:
    """The program with sizes read off its arguments where it has numbers: primes that occur nowhere else."""

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
    """Values that a statement writes into: it calls a method whose name ends with an underscore on them."""
    return {value for value, _ in re.findall(r"\b([hx]\d+)\b[^ ]*?\.(\w+_)\(", code)}


def _aliases(wanted: set[str], written: dict[str, str]) -> set[str]:
    """The wanted values and what they are made of: any of it may be a view."""
    found = set(wanted)
    waiting = list(wanted)
    while waiting:
        for _, value in _NAME.findall(written.get(waiting.pop(), "")):
            if value and value not in found:
                found.add(value)
                waiting.append(value)
    return found


def minimised(program: RandomProgram, fails: Callable[[RandomProgram], bool], patience: int = 2000) -> RandomProgram:
    """A smaller program that still fails.

    Args:
        program: one for which `fails` is true.
        fails: whether a program shows the failure; must be false for one that does not run.
        patience: most programs to try.
    """
    program, tried, seen = program.trimmed(), 0, set()
    shrinking = True
    while shrinking:
        shrinking = False
        for smaller in _smaller(program):
            source = smaller.source()
            if source in seen:
                continue
            seen.add(source)
            tried += 1
            if tried > patience:
                return program
            if fails(smaller):
                program, shrinking = smaller, True
                break
    return program


def _smaller(program: RandomProgram) -> Iterator[RandomProgram]:
    """Programs with an output or a statement less, or a number smaller, the most promising first."""
    if len(program.outputs) > 1:
        for output in program.outputs:
            yield replace(program, outputs=(output,)).trimmed()
    before = [name for name, _ in program.inputs]
    made = [(before := [*before, *s.targets])[: -len(s.targets)] for s in program.statements]
    for i in reversed(range(len(program.statements))):
        statement = program.statements[i]
        # Rather an argument of the statement than any earlier value; later than that, whatever has been made before.
        stands_in = dict.fromkeys((*statement.reads, *reversed(made[i])))
        for value in list(stands_in)[:6]:
            names = dict.fromkeys(statement.targets, value)
            rest = (*program.statements[:i], *(_renamed(s, names) for s in program.statements[i + 1 :]))
            outputs = tuple(dict.fromkeys(names.get(name, name) for name in program.outputs))
            yield replace(program, statements=rest, outputs=outputs).trimmed()
    for i, (name, code) in enumerate(program.held):
        if " = " in code:
            yield replace(program, held=(*program.held[:i], *program.held[i + 1 :]))
        elif "bias=False" not in code and code.startswith(("nn.Linear", "nn.Conv")):
            held = (*program.held[:i], (name, f"{code[:-1]}, bias=False)"), *program.held[i + 1 :])
            yield replace(program, held=held)


def _renamed(statement: Statement, names: dict[str, str]) -> Statement:
    code = re.sub(r"(?<!self\.)\b[hx]\d+\b", lambda match: names.get(match[0], match[0]), statement.code)
    return replace(statement, code=code)


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that a program has made so far."""

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
    """Writes a program, statement by statement, and runs it along.

    Attributes:
        rng: where every choice comes from.
        sizes: sizes that dims may have; few of them make many dims equal.
        values: what has been made so far.
    """

    def __init__(self, rng: random.Random, sizes: Sequence[int], most_entries: int = MOST_ENTRIES) -> None:
        self.rng, self.sizes, self.most_entries = rng, tuple(sizes), most_entries
        self.values: list[Value] = []
        self.module = nn.Module()
        self._scope: dict[str, Any] = {"torch": torch, "F": F, "nn": nn, "self": self.module}
        self._inputs: list[tuple[str, str]] = []
        self._held: list[tuple[str, str]] = []
        self._statements: list[Statement] = []
        self._generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def size(self) -> int:
        """A size for a new dim."""
        return self.rng.choice(self.sizes)

    def chance(self, probability: float) -> bool:
        """True that often."""
        return self.rng.random() < probability

    def input(self, code: str) -> Value:
        """A new argument of the forward, made by `code`."""
        name = f"x{len(self._inputs)}"
        self._inputs.append((name, code))
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.rng.randrange(2**31))
            self._scope[name] = value = eval(code, dict(self._scope))
        self.values.append(Value(name, tuple(value.shape), value.is_floating_point()))
        return self.values[-1]

    def hold(self, code: str) -> str:
        """A new module or parameter; returns how the forward reads it."""
        name = f"m{len(self._held)}"
        try:
            with torch.random.fork_rng(devices=()):
                held = eval(code, self._scope)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise Dead(code) from error
        if isinstance(held, nn.Module):
            held = held.double().eval()
        setattr(self.module, name, held)
        for tensor in held.parameters() if isinstance(held, nn.Module) else (held,):
            tensor.data = torch.randn(tensor.shape, generator=self._generator, dtype=torch.float64) * 0.4
        self._held.append((name, code))
        return f"self.{name}"

    def linears(self) -> list[tuple[str, str]]:
        """(name, code) of every nn.Linear held so far."""
        return [(name, code) for name, code in self._held if code.startswith("nn.Linear")]

    def parameter(self, *shape: int) -> str:
        """A new parameter of this shape."""
        return self.hold(f"nn.Parameter(torch.randn({', '.join(map(str, shape))}))")

    def tie(self, one: str, other: str) -> None:
        """Give two held modules one weight."""
        first, second = one.removeprefix("self."), other.removeprefix("self.")
        getattr(self.module, first).weight = getattr(self.module, second).weight
        self._held.append((first, f"{one}.weight = {other}.weight"))

    def put(self, code: str) -> Value:
        """A statement that makes one value."""
        (value,) = self.put_all(code, 1)
        return value

    def put_all(self, code: str, count: int) -> tuple[Value, ...]:
        """A statement that makes `count` values.

        Raises:
            Dead: it does not run, or its values are too many, too large or not finite.
        """
        try:
            with torch.no_grad():
                made = eval(code, self._scope)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise Dead(code) from error
        results = (made,) if isinstance(made, Tensor) else tuple(made)
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
        """A value with so many dims, rather a late one.

        Raises:
            Dead: there is none.
        """
        among = [v for v in self.values if v.floating and least <= v.ndim <= most and (fits is None or fits(v))]
        if not among:
            raise Dead("no such value")
        age = 0
        while age < len(among) - 1 and self.chance(0.55):
            age += 1
        return among[-1 - age]

    def used(self) -> set[str]:
        """Names of values that a statement reads."""
        return {name for s in self._statements for name in s.reads}

    def finish(self) -> RandomProgram:
        """The program so far; it returns the last of what nothing has used."""
        used = self.used()
        loose = [v for v in self.values if v.name not in used and v.floating and not v.name.startswith("x")]
        outputs = [v.name for v in loose[-3:]] or [self.values[-1].name]
        program = RandomProgram(tuple(self._inputs), tuple(self._held), tuple(self._statements), tuple(outputs))
        return program.trimmed()
