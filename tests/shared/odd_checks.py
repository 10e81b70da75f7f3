"""Checks of odd calls: one call, several in a row, every odd value in every place."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from odd_calls import CALLS, LATE, NAMES, STATES, THEIRS, Call, World, odd_value

from ecospa_fx.errors import ArgumentError, EcoSpaError
from ecospa_fx.model.compiled import MODEL


@dataclass(frozen=True)
class Case:
    """One call: of which function, on a model in which state, with which arguments replaced by which odd values."""

    function: str
    state: str
    odd: tuple[tuple[Any, str], ...]

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.odd) or "as it should be"
        return f"{self.function} of a {self.state} model with {given}"


class Checked:
    """A world that calls are made in until one of them changes it.

    Args:
        state: that of its model.
        fresh: begin anew after a call that changes something.

    Attributes:
        error: what the last call raised.
    """

    def __init__(self, state: str, fresh: bool = True) -> None:
        self.state, self._renews = state, fresh
        self.error: Exception | None = None
        self._fresh()

    def _fresh(self) -> None:
        self.world = World(self.state)
        self._before, self._outputs = self.world.snapshot(), self.world.outputs()

    def check(self, case: Case, quick: bool = False) -> str | None:
        """Make a call; say what is wrong about how it ends, None where nothing is.

        Args:
            case: the call.
            quick: do not run the model where an argument is refused for its kind.
        """
        self.error, call = None, CALLS[case.function]
        try:
            function, arguments = call.make(self.world)
        except EcoSpaError as error:  # the call itself is of something that this state does not have
            self.error = error
            return None
        odd = {place: odd_value(name, self.world) for place, name in case.odd}
        before = self.world.snapshot()
        kept = before == self._before
        if not kept:  # a step has been made, or something is attached
            self._before, self._outputs = before, self.world.outputs()
        compiled = self.world.model.__dict__.get(MODEL)
        waits = compiled is not None and not compiled.captured  # also after `rewire`, say
        theirs = any((case.function, place) in THEIRS and callable(value) for place, value in odd.items())
        late = any((case.function, place) in LATE and callable(value) for place, value in odd.items())
        wrong = self._call(function, arguments | odd, theirs or late)
        wrong = wrong or (None if late and self.error else self._left(call, quick, waits))
        if self._renews and (not kept or wrong or call.trains or self.world.snapshot() != before):
            self._fresh()
        return wrong

    def _call(self, function: Callable[..., Any], arguments: dict[Any, Any], theirs: bool) -> str | None:
        """Make a call, and say what is wrong about what it raises."""
        positional = [arguments.pop(place) for place in sorted(p for p in arguments if isinstance(p, int))]
        try:
            with contextlib.chdir(self.world.directory):
                function(*positional, **arguments)
        except EcoSpaError as error:
            self.error = error
            return None if str(error).strip() else "the error says nothing"
        except Exception as error:
            self.error = error
            return None if theirs else f"raised {type(error).__name__}: {str(error)[:200]}"
        return None

    def _left(self, call: Call, quick: bool, waits: bool) -> str | None:
        """Say what a call has left changed, of what it must leave as it is."""
        if self.error is not None and call.trains:
            return None
        if self.error is None and (waits or not call.looks):  # its first call is captured
            return None
        after, when = self.world.snapshot(), "after an error" if self.error else "it only looks, but"
        for key, value in self._before.items():
            if after[key] != value and (self.error or key != "observers"):  # what looks may go on looking
                return f"{when} {key} differ"
        if quick and isinstance(self.error, ArgumentError):
            return None
        return None if self.world.outputs() == self._outputs else f"{when} outputs differ"


def check(case: Case) -> str | None:
    """Make a call; say what is wrong about how it ends, None where nothing is."""
    return Checked(case.state).check(case)


def places_of(function: str, world: World) -> list[Any]:
    """Return the arguments of a call, none where a model in this state has nothing to call it of."""
    try:
        return list(CALLS[function].make(world)[1])
    except EcoSpaError:
        return []


def wrong_of(function: str, states: Iterable[str] = STATES) -> Iterator[str]:
    """Yield what is wrong with a function as it should be called and with every odd value in every place.

    A kind of argument that is refused is so before the model is looked at, whatever its state: such a value is tried
    in one state, and all others in all.
    """
    refused: set[tuple[Any, str]] = set()
    for state in states:
        checked = Checked(state)
        odd = [((place, name),) for place in places_of(function, World(state)) for name in NAMES]
        for case in (Case(function, state, each) for each in ((), *odd)):
            if case.odd and case.odd[0] in refused:
                continue
            wrong = checked.check(case, quick=True)
            if wrong:
                yield f"{case}: {wrong}"
            elif isinstance(checked.error, ArgumentError):
                refused |= {*case.odd}


def random_case(generator: random.Random, state: str = "", odd: float = 1.0) -> Case:
    """A case with one or two odd values."""
    while True:
        function, of = generator.choice(sorted(CALLS)), state or generator.choice(STATES)
        places = places_of(function, World(of))
        if not places:
            continue
        count = generator.choice((1, 1, 2)) if generator.random() < odd else 0
        chosen = generator.sample(places, min(len(places), count))
        return Case(function, of, tuple((place, generator.choice(NAMES)) for place in chosen))


def check_sequence(generator: random.Random, length: int = 6) -> str | None:
    """Make several calls of one model, right ones and odd ones; say which of them ends wrongly."""
    state = generator.choice(STATES)
    checked, said = Checked(state, fresh=False), []
    for _ in range(length):
        case = random_case(generator, state, odd=0.4)
        said.append(str(case))
        wrong = checked.check(case)
        if wrong is not None:
            return f"{'; '.join(said)}: {wrong}"
    return None
