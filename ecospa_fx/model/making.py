"""Making: the numbers from which a class makes a model at the sizes that a shrunk one has.

    Wanted      shapes of tensors, and integers that modules hold, under a plan
    Maker       a configuration or the arguments of a constructor: numbers -> a model
    solve       -> the numbers at which the model that is made is as wanted

Numbers are found by trial, on the meta device, and never by name: a number may count entries of an axis if it changes
in proportion to it and the model that is made with it is nearer to what is wanted.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ecospa_fx.passes.follow.attributes import Attribute, Value
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.passes.rewrite.replay import replay
from ecospa_fx.plan import Plan

from .compiled import CompiledModel

Number = int | float
Where = tuple[str | int, ...]  # attributes and positions that lead to a number
Fact = tuple[str, int | str]
Facts = dict[Fact, int]

MOST_MADE = 1500  # models that one search makes


@dataclass(frozen=True, eq=False)
class Wanted:
    """The sizes that a model must have.

    Attributes:
        facts: (parameter or buffer name, dim) -> size; (path of an integer that a module holds, "") -> its value.
        attributes: those integers.
    """

    facts: Facts
    attributes: tuple[Attribute, ...]

    def wrong(self, made: nn.Module | None) -> set[Fact]:
        """Return the facts that are not so in a model; all of them where none could be made."""
        now = self.in_model(made)
        return {key for key in self.facts.keys() | now.keys() if self.facts.get(key) != now.get(key)}

    def in_model(self, made: nn.Module | None) -> Facts:
        """Return what these facts are in a model."""
        return {} if made is None else _sizes(named_tensors(made)) | _integers(made, self.attributes)


def wanted_under(model: nn.Module, compiled: CompiledModel, plan: Plan | None) -> Wanted:
    """Return the sizes that a compiled model has under a plan; None: those before any shrink."""
    facts: Facts = {}
    shapes = (plan or compiled.plan).original_shapes
    names = {id(t): name for name, t in named_tensors(model).items() if name in shapes}
    for name, tensor in named_tensors(model).items():
        planned = names.get(id(tensor))
        shape = tuple(tensor.shape)
        if planned is not None:
            shape = shapes[planned] if plan is None else plan.shape(planned)
        facts |= {(name, dim): size for dim, size in enumerate(shape)}
    integers: dict[Attribute, Value] = {}
    for region in compiled.regions.values():
        if region.python_support is not None and region.specializations:
            kept = {} if plan is None else replay(region.naming_graph.axis_facts, plan)
            integers |= {a.within(region.name): value for a, value in region.python_support.values(kept).items()}
    # After a load the regions are not known before a call, but the integers that have changed are.
    for attribute, (before, now) in compiled.attributes.items():
        integers.setdefault(attribute, before if plan is None else now)
    return Wanted(facts | {(str(a), ""): _number(value) for a, value in integers.items()}, tuple(integers))


def _sizes(tensors: Mapping[str, Tensor]) -> Facts:
    return {(name, dim): int(size) for name, t in tensors.items() for dim, size in enumerate(t.shape)}


def _integers(made: nn.Module, attributes: Sequence[Attribute]) -> Facts:
    values: Facts = {}
    for attribute in attributes:
        try:
            values[str(attribute), ""] = _number(attribute.read(made))
        except AttributeError:
            continue
    return values


def _number(value: Value) -> int:
    """Return an integer; of a given tensor, the number of entries that are taken."""
    return value if isinstance(value, int) else len(value)


@dataclass(eq=False)
class Maker:
    """A function that makes a model from numbers.

    Attributes:
        numbers: the numbers that it takes, by the way to each, as they were for the original.
        make: changed numbers -> a model. It may raise anything.
        unset: numbers that the original was made without, and that it could be made with.
        made: models made so far.
        place: where the first one could be made: on the meta device, or in memory that is never touched.
    """

    numbers: Mapping[Where, Number]
    make: Callable[[Mapping[Where, Number]], nn.Module]
    unset: Sequence[Where] = ()
    made: int = 0
    place: str | None = None

    def on_meta(self, changes: Mapping[Where, Number]) -> nn.Module | None:
        """Make a model without values; None where the numbers are refused."""
        self.made += 1
        places = ("meta", "cpu") if self.place is None else (self.place,)
        for place in places:
            try:
                with torch.device(place), _Uninitialised(), unheard():
                    made = self.make(changes)
            except Exception:  # it may refuse its numbers in any way, and some constructors read values
                continue
            self.place = place
            return made
        return None

    def in_memory(self, changes: Mapping[Where, Number], device: torch.device) -> nn.Module:
        """Make a model whose buffers have values and whose parameters have none yet."""
        with torch.device(device), _Uninitialised(), unheard():
            return self.make(changes)


@contextmanager
def unheard() -> Iterator[None]:
    """Keep quiet what a class says of models that are made to be looked at: warnings, and those that it logs."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Uninitialised(TorchFunctionMode):
    """A context in which parameters are not filled, so that their memory is never touched."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        fills = name.endswith("_") and name[:2] != "__" and name != "requires_grad_"
        if fills and args and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Solution:
    """The result of a search for numbers.

    Attributes:
        changes: the numbers that must change, as near to what is wanted as was found.
        wrong: the facts that are not as wanted with them; none where the search succeeded.
    """

    changes: dict[Where, Number]
    wrong: frozenset[Fact]


def solve(maker: Maker, wanted: Wanted) -> Solution:
    """Find the numbers from which the model that is made is as wanted."""
    base = wanted.in_model(maker.on_meta({}))
    before = {key: base.get(key, new) for key, new in wanted.facts.items()}
    changed = {Fraction(new, before[key]): None for key, new in wanted.facts.items() if before[key] not in (new, 0)}
    found = _search(maker, wanted, {}, maker.numbers, tuple(changed))
    if not found.wrong or not maker.unset:
        return found
    neutral = neutral_numbers(maker, replace(wanted, facts=base), dict.fromkeys(maker.unset))
    if neutral:
        found = _search(maker, wanted, neutral, {**maker.numbers, **neutral}, tuple(changed))
    for where in neutral:  # those that are not needed
        fewer = {key: value for key, value in found.changes.items() if key != where}
        if not found.wrong and not wanted.wrong(maker.on_meta(fewer)):
            found = Solution(fewer, found.wrong)
    return found


def _search(
    maker: Maker,
    wanted: Wanted,
    start: Mapping[Where, Number],
    numbers: Mapping[Where, Number],
    proportions: Sequence[Fraction],
) -> Solution:
    """Change one number after another, or two or three at once where no single one helps.

    A change helps if more facts are right, and none that was is wrong: half as many dims in each head give a projection
    as many rows as half as many heads do, and other rotary tables.
    """
    changes = dict(start)
    wrong = wanted.wrong(maker.on_meta(changes))
    proposals = [(where, new) for where, value in numbers.items() for new in _proposed(value, proportions)]
    limit = maker.made + MOST_MADE
    while wrong and maker.made < limit:
        outcomes: dict[tuple[Where, Number], set[Fact]] = {}
        for where, new in proposals:
            if changes.get(where, numbers[where]) != new:
                outcomes[where, new] = wanted.wrong(maker.on_meta({**changes, where: new}))
        helping = [key for key, now in outcomes.items() if now < wrong]
        step: Mapping[Where, Number] | None = None
        if helping:
            step = dict([min(helping, key=lambda key: len(outcomes[key]))])
        else:
            moving = [key for key, now in outcomes.items() if now != wrong]
            several = _several(moving, limit - maker.made)
            step = next((each for each in several if wanted.wrong(maker.on_meta({**changes, **each})) < wrong), None)
        if step is None:
            break
        changes |= step
        wrong = wanted.wrong(maker.on_meta(changes))
    return Solution(changes, frozenset(wrong))


def _several(moving: Sequence[tuple[Where, Number]], most: int) -> Iterator[Mapping[Where, Number]]:
    """Yield pairs and triples of changes of different numbers."""
    combinations = itertools.chain(itertools.combinations(moving, 2), itertools.combinations(moving, 3))
    different = (dict(each) for each in combinations if len(dict(each)) == len(each))
    yield from itertools.islice(different, max(0, most))


def _proposed(value: Number, proportions: Sequence[Fraction]) -> list[Number]:
    """Return what a number may have become that is in proportion to an axis."""
    if type(value) is float:
        return [float(value * share) * nudge for share in proportions for nudge in (1.0, 1 + 1e-9)]  # int() cuts off
    whole = (Fraction(value) * share for share in proportions)
    return list(dict.fromkeys(int(new) for new in whole if new.denominator == 1 and new > 0 and new != value))


def neutral_numbers(maker: Maker, base: Wanted, defaults: Mapping[Where, Number | None]) -> dict[Where, Number]:
    """Find values of numbers that were not given at which nothing changes, and next to which something does.

    Args:
        maker: makes models.
        base: the sizes that it makes with no number changed.
        defaults: the numbers, with a value that may be that, or None.
    """
    sizes = {int(size) for size in base.facts.values()} | {int(v) for v in maker.numbers.values()}
    sizes = {size for size in sizes if size > 0}
    values = sorted({a // b for a in sizes for b in sizes if a % b == 0 and a // b > 1})
    neutral: dict[Where, Number] = {}
    for where, default in defaults.items():
        kind = type(default) if default is not None else int
        top: Number = kind(2 * values[-1]) if default is None and values else 2 * (default or 1)
        probes = [base.wrong(maker.on_meta({where: value})) for value in (top, 2 * top)]
        if not any(probes) or all(len(wrong) == len(base.facts) for wrong in probes):
            continue  # it makes no difference, or is none that a model can be made with
        if default is not None and not base.wrong(maker.on_meta({where: default})):
            neutral[where] = default
            continue
        candidates: Iterable[Number] = values
        if kind is float:
            whole = {v for v in (*maker.numbers.values(), *neutral.values()) if type(v) is int}
            candidates = sorted({a / b for a in sizes for b in whole})
        fits = (value for value in candidates if not base.wrong(maker.on_meta({where: kind(value)})))
        first, second = next(fits, None), None if kind is float else next(fits, None)
        if first is not None and second is None:
            neutral[where] = first
    return neutral
