"""Patterns: the language in which a rule relates the dims of an op's tensors, and its parser.

    "b m k, b k n -> b m n"

A pattern names the dims of each operand and, behind `->`, of the output. Dims of one name are one axis. One output
stands for all that the op has, or each is named.

    pattern := operand "," operand "," ... "->" output "," output "," ...
    operand := ["+"] dim dim ...
    dim     := marked  |  "(" marked marked ... ")"  |  "..."
    marked  := name ["!" | "~"]

- `k`      one dim. A name that the output lacks is summed over; one that only the output has is a new axis.
- `k!`     its entries mix, so the axis must stay at its full size. One mark is enough, wherever the name occurs.
- `k~`     its entries are reduced together (an average, a norm); the op takes what is left, those that go are absent.
- `(h g)`  one dim that is a product of axes, row by row, the last one running fastest.
- `...`    any number of dims that broadcast; where an operand has fewer dims than names, the leftmost are missing.
- `+n`     an operand that is only added: it takes no part in the product. At the end it may be left out.

An operand without dims is a number: `"k, k ->"`. docs/patterns.md has a rule of the library for each of these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NoReturn, TypeAlias

from ecospa_fx.errors import PatternError
from ecospa_fx.passes.axes.algebra import Mismatch, Size, in_words

DOTS = "."  # the key of `...`; the dims it stands for are `.1`, `.2`, ..., counted from the right
DimKey: TypeAlias = "str | tuple[str, ...]"  # of one dim: a name, or the names of a product


@dataclass(frozen=True, slots=True)
class Name:
    """One name.

    Attributes:
        text: the name.
        mark: `!` where it is pinned, `~` where the op takes what is left.
        at: its position in the pattern.
    """

    text: str
    mark: str = ""
    at: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return self.text + self.mark


@dataclass(frozen=True, slots=True)
class Group:
    """One dim that is a product of axes."""

    names: tuple[Name, ...]

    def __str__(self) -> str:
        return f"({' '.join(map(str, self.names))})"


@dataclass(frozen=True, slots=True)
class Dots:
    """Any number of dims."""

    def __str__(self) -> str:
        return "..."


@dataclass(frozen=True)
class TensorDims:
    """The dims of one tensor.

    Attributes:
        dims: what is named, from left to right.
        added: the operand is only added.
        names: every name, those in groups included, in order.
        keys: the same as plain strings, with `DOTS` for `...`.
    """

    dims: tuple[Name | Group | Dots, ...]
    added: bool = False
    names: tuple[Name, ...] = field(init=False, compare=False)
    keys: frozenset[str] = field(init=False, compare=False)
    _dim_keys: tuple[DimKey, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        def key(dim: Name | Group | Dots) -> DimKey:
            return dim.text if isinstance(dim, Name) else tuple(name.text for name in _names(dim)) or DOTS

        names = tuple(name for dim in self.dims for name in _names(dim))
        dim_keys = tuple(map(key, self.dims))
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "keys", frozenset({name.text for name in names} | ({DOTS} & set(dim_keys))))
        object.__setattr__(self, "_dim_keys", dim_keys)

    def __str__(self) -> str:
        return "+" * self.added + " ".join(map(str, self.dims))

    def keys_of(self, shape: Sequence[Size]) -> Sequence[DimKey]:
        """Return the key of each dim of a tensor.

        Raises:
            Mismatch: the tensor has another number of dims.
        """
        keys = self._dim_keys
        if DOTS not in keys:
            if len(keys) != len(shape):
                raise Mismatch(
                    f"the rule names {len(keys)} dims, `{self}`, of a tensor with {len(shape)}, {in_words(shape)}"
                )
            return keys
        at, hidden = keys.index(DOTS), len(shape) - (len(keys) - 1)
        return [*keys[:at], *(f"{DOTS}{i}" for i in range(hidden, 0, -1)), *keys[at + 1 :]][max(0, -hidden) :]


@dataclass(frozen=True)
class ParsedPattern:
    """A pattern after parsing; its text is the pattern in canonical spacing.

    Attributes:
        operands: the dims of each operand.
        outputs: the dims of each output, or those that all of them have.
        kept: the keys of all outputs; names that are not among them are summed over.
        pinned: the names that are marked with `!` anywhere, in order.
        absent: those that are marked with `~`.
    """

    operands: tuple[TensorDims, ...]
    outputs: tuple[TensorDims, ...]
    kept: frozenset[str] = field(init=False, compare=False)
    pinned: tuple[str, ...] = field(init=False, compare=False)
    absent: tuple[str, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        names = [name for term in (*self.operands, *self.outputs) for name in term.names]
        for field_name, mark in (("pinned", "!"), ("absent", "~")):
            marked = tuple(dict.fromkeys(name.text for name in names if name.mark == mark))
            object.__setattr__(self, field_name, marked)
        object.__setattr__(self, "kept", frozenset().union(*(term.keys for term in self.outputs)))

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.operands))} -> {', '.join(map(str, self.outputs))}".strip()


def _names(dim: Name | Group | Dots) -> tuple[Name, ...]:
    return (dim,) if isinstance(dim, Name) else dim.names if isinstance(dim, Group) else ()


@lru_cache(maxsize=1 << 12)
def parse(pattern: str) -> ParsedPattern:
    """Parse a pattern.

    Raises:
        PatternError: it is malformed. The error shows the pattern, marks the place and says what was expected.
    """
    return _Parser(pattern).pattern()


@lru_cache(maxsize=1 << 12)
def bind(pattern: str, operands: int, sizes: tuple[str, ...] = ()) -> ParsedPattern:
    """Parse a pattern and compare it with the tensors of its op.

    Args:
        pattern: the pattern.
        operands: number of tensors among the arguments of the op.
        sizes: names whose sizes the rule tells.

    Returns:
        The parsed pattern, without the operands that the op was not given.

    Raises:
        PatternError: it is malformed, or does not fit.
    """
    parsed = parse(pattern)
    terms = parsed.operands
    if operands == 0 and not any(term.dims or term.added for term in terms):
        terms = ()  # nothing before `->` is a number, or no operand
    required = max((i + 1 for i, term in enumerate(terms) if not term.added), default=0)
    if not required <= operands <= len(terms):
        number = f"{len(terms)}" if required == len(terms) else f"{required} to {len(terms)}"
        width = len(pattern[: pattern.index("->")].rstrip())
        _fail(pattern, 0, f"the pattern names {number} operands; expected {operands}, the tensors of the op", width)
    bound = replace(parsed, operands=terms[:operands])
    used = {name.text for term in (*terms, *parsed.outputs) for name in term.names}
    for size in sizes:
        if size not in used:
            _fail(pattern, 0, f"`sizes` tells the size of `{size}`; expected a name of the pattern", len(pattern))
    _check_groups(pattern, bound, sizes)
    return bound


def _check_groups(pattern: str, bound: ParsedPattern, sizes: tuple[str, ...]) -> None:
    """Check that the size of every name in a group follows from the operands, in the order in which they are read."""
    dims = [dim for term in bound.operands for dim in term.dims]
    settled = {*sizes, *(dim.text for dim in dims if isinstance(dim, Name))}
    for group in (dim for dim in dims if isinstance(dim, Group)):
        unknown = [name for name in group.names if name.text not in settled]
        if len(unknown) > 1:
            first, second = unknown[:2]
            _fail(
                pattern, second.at, f"neither `{first.text}` nor `{second.text}` of a group has a size; expected all "
                "but one to be dims of an operand, or in `sizes`", len(second.text),
            )  # fmt: skip
        settled.update(name.text for name in group.names)
    for group in (dim for term in bound.outputs for dim in term.dims if isinstance(dim, Group)):
        for name in group.names:
            if name.text not in settled:
                _fail(
                    pattern, name.at, f"`{name.text}` in a group of the output has no size; expected a name of an "
                    "operand, or of `sizes`", len(name.text),
                )  # fmt: skip


def _fail(pattern: str, at: int, problem: str, width: int = 1) -> NoReturn:
    """Raise the error that shows `pattern` and marks `width` characters at `at`."""
    shown = "".join(character if character.isprintable() else " " for character in pattern)
    raise PatternError(f"{problem}\n    {shown}\n    {' ' * at}{'^' * max(1, width)}")


_TOKEN = re.compile(r" *(?P<text>->|\.\.\.|[A-Za-z_][A-Za-z0-9_]*|[!~+,()]|\Z)")
_WRONG = re.compile(r" *(?P<text>\.+|\d\w*|.)", re.DOTALL)


class _Parser:
    """Reads a pattern from left to right, one token ahead."""

    def __init__(self, pattern: str) -> None:
        self.text = pattern
        self.token, self.at, self.stop = "", 0, 0  # the token to be read, its position, the position behind it
        self.before = ""  # the last token that was read
        self.advance()

    def fail(self, problem: str, at: int | None = None, width: int | None = None) -> NoReturn:
        _fail(self.text, self.at if at is None else at, problem, len(self.token) if width is None else width)

    def advance(self) -> None:
        self.before = self.token
        match = _TOKEN.match(self.text, self.stop)
        if match is None:
            self.fail_at_character()
        self.token, self.at, self.stop = match["text"], match.start("text"), match.end()

    def fail_at_character(self) -> NoReturn:
        match = _WRONG.match(self.text, self.stop)
        assert match is not None
        text, at = match["text"], match.start("text")
        if text[0] == ".":
            problem = f"`{text}`; expected three dots, `...`"
        elif text[0].isdigit():
            problem = f"`{text}`; expected a name, which starts with a letter"
        elif text == "-":
            problem = "`-` without `>`; expected `->`"
        else:
            problem = f"unknown character {text!r}; expected a name, `...`, `(`, `)`, `!`, `~`, `+`, `,` or `->`"
        self.fail(problem, at, len(text))

    def pattern(self) -> ParsedPattern:
        operands = [self.term()]
        while self.token == ",":
            self.advance()
            operands.append(self.term())
        if self.token != "->":
            self.fail("no `->`; expected it behind the operands, before the dims of the output")
        self.advance()
        outputs = [self.output()]
        while self.token == ",":
            self.advance()
            outputs.append(self.output())
        if self.token == "->":
            self.fail("a second `->`; expected one, between operands and output")
        return ParsedPattern(tuple(operands), tuple(outputs))

    def output(self) -> TensorDims:
        if self.token == "+":
            self.fail("`+` on the output; expected it before an operand")
        output = self.term()
        self.check_distinct(output.names, "twice in the output; expected each name once")
        return output

    def term(self) -> TensorDims:
        added = self.token == "+"
        if added:
            self.advance()
        dims: list[Name | Group | Dots] = []
        while self.token not in ("", ",", "->"):
            if self.token == "(":
                dims.append(self.group())
            elif self.token == "...":
                if Dots() in dims:
                    self.fail("`...` twice in one tensor; expected it once")
                dims.append(Dots())
                self.advance()
            elif self.token == ")":
                self.fail("`)` without `(`; expected a name or `,` or `->`")
            else:
                dims.append(self.name())
        return TensorDims(tuple(dims), added)

    def group(self) -> Group:
        start = self.at
        self.advance()
        names: list[Name] = []
        while self.token != ")":
            if self.token in ("", ",", "->"):
                ahead = f"`{self.token}`" if self.token else "the end"
                self.fail(f"`(` is not closed; expected `)` before {ahead}", start, 1)
            if self.token == "(":
                self.fail("`(` inside a group; expected a name or `)`, a product of products is one product")
            if self.token == "...":
                self.fail("`...` inside a group; expected a name or `)`")
            names.append(self.name())
        if not names:
            self.fail("an empty group; expected at least one name", start, self.stop - start)
        self.check_distinct(names, "twice in one group; expected each name once")
        self.advance()
        return Group(tuple(names))

    def name(self) -> Name:
        if self.token in ("!", "~"):
            mark, does = self.token, "is pinned" if self.token == "!" else "is reduced"
            if self.before in ("!", "~"):
                self.fail(f"`{mark}` behind `{self.before}`; expected one mark" if mark != self.before else
                          f"`{mark}` twice; expected it once")  # fmt: skip
            if self.before == ")":
                self.fail(f"`{mark}` behind a group; expected it behind each name that {does}, `(h{mark} g{mark})`")
            if self.before == "...":
                self.fail(f"`{mark}` behind `...`; expected it behind a name")
            self.fail(f"`{mark}` without a name; expected it right behind the name that {does}, `k{mark}`")
        if self.token == "+":
            self.fail("`+` inside an operand; expected it before the first dim, it speaks of the whole operand")
        text, at, stop = self.token, self.at, self.stop
        self.advance()
        mark = self.token if self.token in ("!", "~") and self.at == stop else ""
        if mark:
            self.advance()
        return Name(text, mark, at)

    def check_distinct(self, names: Sequence[Name], problem: str) -> None:
        texts: set[str] = set()
        for name in names:
            if name.text in texts:
                self.fail(f"`{name.text}` {problem}", name.at, len(name.text))
            texts.add(name.text)
