"""Observers: several that look at the values inside a region, served by one program.

observe(region, observer)   region.watcher -> Observers -> one program with all their nodes among its outputs
                                                        -> each observer sees the values it asked for
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, fx, nn

from ecospa_fx.errors import EcoSpaError
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.rewrite.watch import Watched, watch

if TYPE_CHECKING:
    from .region import Region


class Observer(Protocol):
    """Looks at values inside regions."""

    def looks(self, module: nn.Module) -> bool:
        """Whether it wants to see the call of a region that is about to be made."""

    def places(self, region: Region, program: Program) -> tuple[Sequence[fx.Node], Any]:
        """The nodes of a program's graph whose values it wants to see, and what it wants to know them by."""

    def see(self, known: Any, values: Sequence[Tensor]) -> None:
        """The values of these nodes in one call, detached."""


@dataclass(frozen=True, eq=False)
class _Look:
    """A program generated once more, with what some observers want to see among its outputs."""

    program: Program
    call: Watched
    shown: tuple[tuple[Observer, Any, tuple[int, ...]], ...]


class Observers:
    """The watcher of a region: passes what is computed in it on to observers."""

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        self._looks: dict[tuple[int, ...], _Look] = {}

    def __call__(self, region: Region, program: Program, module: nn.Module, inputs: Sequence[Tensor]) -> Any:
        """Run one call of the region."""
        observers = [observer for observer in self.observers if observer.looks(module)]
        if not observers:
            return program(module, inputs)
        key = (id(program), *map(id, observers))
        look = self._looks.get(key)
        if look is None or look.program is not program:
            alive = {id(each) for each in region.programs}
            self._looks = {key: value for key, value in self._looks.items() if key[0] in alive}
            self._looks[key] = look = _look(region, program, module, observers)
        result, values = look.call(module, inputs)
        for observer, known, numbers in look.shown:
            observer.see(known, [values[number] for number in numbers])
        return result


def _look(region: Region, program: Program, module: nn.Module, observers: Sequence[Observer]) -> _Look:
    asked = [(observer, *observer.places(region, program)) for observer in observers]
    nodes = list(dict.fromkeys(node for _, wanted, _ in asked for node in wanted))
    number = {node: i for i, node in enumerate(nodes)}
    shown = tuple((observer, known, tuple(number[node] for node in wanted)) for observer, wanted, known in asked)
    return _Look(program, watch(program, region.kept(program), module, nodes), shown)


def observe(region: Region, observer: Observer) -> None:
    """Let an observer see what is computed in a region.

    Raises:
        EcoSpaError: the region's own Python runs, and no graph of ours.
    """
    if region.compiled.execution == "module":
        raise EcoSpaError(
            "scores of activations, and Gram matrices, are read off the graphs that run, and with execution='module' "
            "the model's own Python runs; use another score, absorb=False and rotate=False, or execution='graph'"
        )
    if not isinstance(region.watcher, Observers):
        region.watcher = Observers()
    region.watcher.observers.append(observer)


def ignore(region: Region, observer: Observer) -> None:
    """Let it see no more."""
    if isinstance(region.watcher, Observers):
        region.watcher.observers = [each for each in region.watcher.observers if each is not observer]
        if not region.watcher.observers:
            region.watcher = None
