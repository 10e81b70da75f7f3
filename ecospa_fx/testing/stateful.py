"""Stateful modules: random modules that keep and change state as people's do, as a few lines of code.

A block is a residual perceptron; parts are put into it: `Piece`s, each with lines of `__init__`, of `forward`, of the
class and of the file around it, and statements by which a training loop changes its state between two calls.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

IN, STREAM, HIDDEN, OUT = 3, 4, 6, 2  # sizes: of the arguments, between blocks, inside of one, of the results

IMPORTS = """import collections
import copy
import dataclasses
import random
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass
class Config:
    a: object
"""


@dataclass(frozen=True)
class Piece:
    """A part of a block, as code.

    Attributes:
        name: its kind.
        place: the value that it reads and may change: `x` before, `h` inside, `y` after the perceptron of the block.
        forward: lines on that value.
        init: lines of the block's `__init__`.
        body: lines of the block's class.
        file: lines of the file.
        names: globals that the forward assigns to.
        changes: statements of a loop, on `block` and `world`, the module that the file is.
        sized: True if it draws random tensors whose sizes shrink with the model.
        wide: True if it holds a tensor of the value's width outside of buffers.
    """

    name: str
    place: str
    forward: tuple[str, ...]
    init: tuple[str, ...] = ()
    body: tuple[str, ...] = ()
    file: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    sized: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Weight:
    """A weight of a block: the code of the tensor that is multiplied, made of the parameter `self.w`."""

    name: str = "plain"
    code: str = ""
    init: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class StatefulModule:
    """A module as code.

    Attributes:
        parts: the parts of its blocks.
        weight: the weight that makes the hidden values.
        blocks: number of its blocks.
        tokens: whether arguments are `[batch, token, entry]`, else `[batch, entry]`.
        act: the function of the hidden values.
    """

    parts: tuple[Piece, ...]
    weight: Weight = Weight()
    blocks: int = 1
    tokens: bool = False
    act: str = "F.gelu"

    @property
    def sized(self) -> bool:
        """True if it draws random tensors whose sizes shrink with the model."""
        return any(part.sized for part in self.parts)

    def source(self) -> str:
        """Return the code of a file with the class `Model`."""
        own, parts = self.weight, self.parts
        if own.name == "plain":
            init, up = [f"self.up = nn.Linear({STREAM}, {HIDDEN})"], "self.up(x)"
        else:
            init = [f"self.w = nn.Parameter(torch.randn({HIDDEN}, {STREAM}) * 0.5)", *own.init]
            up = f"F.linear(x, {own.code})"
        init += [f"self.down = nn.Linear({HIDDEN}, {STREAM})", *(line for part in parts for line in part.init)]
        lines = {place: [line for part in parts if part.place == place for line in part.forward] for place in "xhy"}
        names = sorted({name for part in parts for name in part.names})
        forward = [
            *([f"global {', '.join(names)}"] if names else []),
            *lines["x"], f"h = {self.act}({up})", *lines["h"], "y = self.down(h)", *lines["y"], "return x + y",
        ]  # fmt: skip
        body = [line for part in parts for line in part.body]
        file = [line for part in parts for line in part.file]
        return "\n".join([
            IMPORTS, *file, "" if not file else "\n", "class Block(nn.Module):", *_indented(body, 1),
            "    def __init__(self):", "        super().__init__()", *_indented(init, 2), "",
            "    def forward(self, x):", *_indented(forward, 2), "", "",
            "class Model(nn.Module):", "    def __init__(self):", "        super().__init__()",
            f"        self.stem = nn.Linear({IN}, {STREAM})",
            f"        self.blocks = nn.ModuleList(Block() for _ in range({self.blocks}))",
            f"        self.head = nn.Linear({STREAM}, {OUT})", "",
            "    def forward(self, x):", "        x = self.stem(x)", "        for block in self.blocks:",
            "            x = block(x)", "        return self.head(x)",
        ]) + "\n"  # fmt: skip


def _indented(lines: Sequence[str], depth: int) -> list[str]:
    return [f"{'    ' * depth}{line}" for line in lines]


@dataclass
class Draw:
    """The choices for one part: a generator, the value that it reads, and the number that its names carry."""

    rng: random.Random
    place: str
    number: int
    tokens: bool
    width: int = field(init=False)

    def __post_init__(self) -> None:
        """Look the size of the value up."""
        self.width = HIDDEN if self.place == "h" else STREAM

    @property
    def mean(self) -> str:
        """Code of the mean over batch and tokens."""
        return f"{self.place}.detach().mean({'(0, 1)' if self.tokens else '0'})"

    def pick(self, *choices: str) -> str:
        """Draw one of some codes."""
        return self.rng.choice(choices)

    def chance(self, probability: float) -> bool:
        """Return True with a probability."""
        return self.rng.random() < probability


@dataclass(frozen=True)
class Holder:
    """A place where a module finds something: an attribute, an entry of a list, a global.

    Attributes:
        read: code of it in a method.
        outside: code of it in a loop, on `block` and `world`.
        init: the lines that put a value there, in `__init__`; then those of the class, and those of the file.
    """

    name: str
    read: str
    outside: str
    init: tuple[str, ...] = ()
    body: tuple[str, ...] = ()
    file: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def holders(i: int, value: str, tensor: bool) -> list[Holder]:
    """Return the places where a value may be held."""
    own = [
        Holder("attribute", f"self.s{i}", f"block.s{i}", (f"self.s{i} = {value}",)),
        Holder("list", f"self.s{i}[0]", f"block.s{i}[0]", (f"self.s{i} = [{value}]",)),
        Holder("dict", f'self.s{i}["a"]', f'block.s{i}["a"]', (f'self.s{i} = {{"a": {value}}}',)),
        Holder("object", f"self.s{i}.a", f"block.s{i}.a", (f"self.s{i} = types.SimpleNamespace(a={value})",)),
        Holder("child", f"self.c{i}.s", f"block.c{i}.s", (f"self.c{i} = nn.Module()", f"self.c{i}.s = {value}")),
        Holder("nested list", f"self.s{i}[0][0]", f"block.s{i}[0][0]", (f"self.s{i} = [[{value}]]",)),
        Holder("dataclass", f"self.s{i}.a", f"block.s{i}.a", (f"self.s{i} = Config({value})",)),
        Holder("function", f"FN{i}.a", f"world.FN{i}.a", file=(f"def FN{i}():", "    pass", "", f"FN{i}.a = {value}")),
        Holder("global", f"S{i}", f"world.S{i}", file=(f"S{i} = {value}",), names=(f"S{i}",)),
        Holder("global object", f"CFG{i}.a", f"world.CFG{i}.a", file=(f"CFG{i} = types.SimpleNamespace(a={value})",)),
        Holder("class", f"Block.S{i}", f"world.Block.S{i}", body=(f"S{i} = {value}",)),
        Holder("own class", f"type(self).S{i}", f"world.Block.S{i}", body=(f"S{i} = {value}",)),
    ]
    if tensor:
        own += 3 * [Holder("buffer", f"self.s{i}", f"block.s{i}", (f'self.register_buffer("s{i}", {value})',))]
        kept = f'self.register_buffer("s{i}", {value}, persistent=False)'
        own += [Holder("buffer that is not saved", f"self.s{i}", f"block.s{i}", (kept,))]
        child = f'self.c{i}.register_buffer("s", {value})'
        own += [Holder("buffer of a child", f"self.c{i}.s", f"block.c{i}.s", (f"self.c{i} = nn.Module()", child))]
    return own


def held(
    draw: Draw, kind: str, place: Holder, forward: Sequence[str], changes: Sequence[str] = (), wide: bool = False
) -> Piece:
    """Return the part whose state lies in a holder."""
    return Piece(
        f"{kind} in {place.name}", draw.place, tuple(forward), place.init, place.body, place.file, place.names,
        tuple(changes), wide=wide and "buffer" not in place.name,
    )  # fmt: skip


MakePiece = Callable[[Draw], Piece]
PARTS: list[tuple[MakePiece, float]] = []


def part(weight: float) -> Callable[[MakePiece], MakePiece]:
    """Register a kind of part, drawn that often."""

    def register(make: MakePiece) -> MakePiece:
        PARTS.append((make, weight))
        return make

    return register


def random_module(rng: random.Random, most: int = 3) -> StatefulModule:
    """Draw a module with up to `most` parts."""
    tokens, blocks = rng.random() < 0.4, rng.choice((1, 1, 2))
    parts = []
    for number in range(rng.choice([*range(1, most + 1), 1])):
        (make,) = rng.choices([make for make, _ in PARTS], [weight for _, weight in PARTS])
        parts.append(make(Draw(rng, rng.choice("xhhy"), number, tokens)))
    if any(part.sized for part in parts):  # the plain model will be made smaller, which keeps no such state
        parts = [part for part in parts if not part.wide]
    weight = rng.choice(WEIGHTS) if rng.random() < 0.3 else Weight()
    return StatefulModule(tuple(parts), weight, blocks, tokens, rng.choice(("F.gelu", "F.relu", "torch.tanh")))


WEIGHTS = (
    Weight("scaled", "self.w * 0.5"),
    Weight(
        "masked", "self.w * self.mask", (f'self.register_buffer("mask", (torch.rand({HIDDEN}, {STREAM}) > 0.3) * 1.0)',)
    ),
    Weight("squashed", "torch.tanh(self.w)"),
    Weight("plus zero", "self.w + 0"),
    Weight("straight through", "self.w + (self.w.round(decimals=1) - self.w).detach()"),
    Weight("rows of length one", "self.w / (1 + self.w.norm(dim=1, keepdim=True))"),
    Weight("standardised", "(self.w - self.w.mean(1, keepdim=True)) / (1 + self.w.std(1, keepdim=True))"),
)
