"""Observers: objects that read values inside a region while it runs, all served by one program.

observe(region, observer)   region.watcher -> Observers -> one program with the nodes of all observers as outputs
                                                        -> each observer receives the values of its own nodes
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, fx, nn

from ecospa_fx.errors import EcoSpaError
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.passes.rewrite.rewrite import Tap
from ecospa_fx.passes.rewrite.watch import Watched, watch

from .compiled_code import OWN
from .lookup import compiled_state, regions_of
from .region import Region


class Observer(Protocol):
    """An object that reads values inside regions."""

    def wants(self, module: nn.Module) -> bool:
        """Decide whether to observe the call of a region that is about to run."""

    def nodes_of(self, region: Region, program: Program, module: nn.Module) -> tuple[Sequence[fx.Node], Any]:
        """Choose the nodes of a program's graph to read, and a tag that `receive` gets with their values."""

    def receive(self, tag: Any, values: Sequence[Tensor]) -> None:
        """Take the values of these nodes in one call, detached."""


@runtime_checkable
class Tapper(Protocol):
    """An observer that reads gradients inside regions.

    Attributes:
        computes_again: no value inside a region is held for backward, which computes them again.
    """

    computes_again: bool

    def taps_of(self, region: Region, program: Program, module: nn.Module) -> Sequence[Tap]:
        """Choose the values of a program's graph that pass through a function of the observer's."""


class _Watching(Protocol):
    @property
    def regions(self) -> Collection[Region]:
        """The regions that it stands in."""

    def detach(self) -> None:
        """Leave them."""


W = TypeVar("W", bound=_Watching)


@dataclass(frozen=True, eq=False)
class _Observed:
    """A program generated once more, with the nodes that some observers read among its outputs."""

    program: Program
    shared_out: Any
    call: Watched
    requests: tuple[tuple[Observer, Any, tuple[int, ...]], ...]  # observer, its tag, numbers of its values
    tappers: tuple[Tapper, ...]


class Observers:
    """The watcher of a region: hands values computed in it to observers."""

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        self._observed: list[_Observed] = []

    def __call__(self, region: Region, program: Program, module: nn.Module, inputs: Sequence[Tensor]) -> Any:
        """Run one call of the region."""
        observers = [observer for observer in self.observers if observer.wants(module)]
        if not observers:
            return region.program_here(program, module)(module, inputs)
        observed = self._found(region, program, observers)
        if observed is None:
            observed = _observed_program(region, program, module, observers)
            alive = [each.program for each in region.specializations]
            self._observed = [each for each in self._observed if any(each.program is program for program in alive)]
            self._observed.append(observed)
        result, values = observed.call(module, inputs, any(tapper.computes_again for tapper in observed.tappers))
        _hand_over(observed.requests, values)
        return result

    def _found(self, region: Region, program: Program, observers: Sequence[Observer]) -> _Observed | None:
        """Return the program with the values that some observers read; None where it has still to be made.

        By `is`, not by `id`, at which torch.compile would take each of many equal blocks for another.
        """
        for each in self._observed:
            if each.program is program and each.shared_out is region.shared_out:
                theirs = [request[0] for request in each.requests]
                if len(theirs) == len(observers) and all(map(operator.is_, theirs, observers)):
                    return each
        return None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _hand_over(requests: Sequence[tuple[Observer, Any, tuple[int, ...]]], values: Sequence[Tensor]) -> None:
    """Give observers their values: one break in compiled code, and nothing of theirs to compile again."""
    for observer, tag, numbers in requests:
        observer.receive(tag, [values[number] for number in numbers])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _observed_program(region: Region, program: Program, module: nn.Module, observers: Sequence[Observer]) -> _Observed:
    requests = [(observer, *observer.nodes_of(region, program, module)) for observer in observers]
    nodes = list(dict.fromkeys(node for _, chosen, _ in requests for node in chosen))
    number = {node: i for i, node in enumerate(nodes)}
    numbered = tuple((observer, tag, tuple(number[node] for node in chosen)) for observer, chosen, tag in requests)
    tappers = tuple(observer for observer in observers if isinstance(observer, Tapper))
    taps = [tap for observer in tappers for tap in observer.taps_of(region, program, module)]
    return _Observed(
        program, region.shared_out, watch(program, region.kept_here(program, module), module, nodes, taps), numbered,
        tappers,
    )  # fmt: skip


def check_observable(model: nn.Module) -> None:
    """Refuse to observe a compiled model whose own Python runs, and no generated graph.

    Raises:
        EcoSpaError: it is compiled with `execution="module"`.
    """
    if compiled_state(model).execution == "module":
        raise EcoSpaError(
            "scores of activations, and Gram matrices (for absorb and rotate, which policy='adaptive' turns on), are "
            "read off the graphs that run, and with execution='module' the model's own Python runs; use another score, "
            "absorb=False and rotate=False, or execution='graph'"
        )


def observe(region: Region, observer: Observer) -> None:
    """Subscribe an observer to a region of a model that can be observed."""
    if not isinstance(region.watcher, Observers):
        region.watcher = Observers()
    region.watcher.observers.append(observer)


def are_of(regions: Collection[Region], model: nn.Module) -> bool:
    """Decide whether these are the regions that a model has now: `resume` may have made others for it."""
    now = regions_of(model).values()
    return len(now) == len(regions) and all(map(operator.is_, now, regions))


def still_watching(observer: W | None, model: nn.Module) -> W | None:
    """Return an observer if it stands in the regions that a model has now; else take it off, and return None."""
    if observer is None or are_of(observer.regions, model):
        return observer
    observer.detach()
    return None


def ignore(region: Region, observer: Observer) -> None:
    """Unsubscribe an observer from a region."""
    if isinstance(region.watcher, Observers):
        region.watcher.observers = [each for each in region.watcher.observers if each is not observer]
        if not region.watcher.observers:
            region.watcher = None


OWN += [Region.__call__, Region._run, Observers.__call__]
