"""Routing: the choice of the program that serves a call of a region.

call -> call_key -> Routing.remembered   the program that served a call of the same key before, while nothing changes
-> no route -> Routing.search       the newest program whose signature, hooks and constants fit
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ecospa_fx.passes.capture.hooks import calls_itself
from ecospa_fx.passes.ir.guards import ModuleRoot, Read, first_changed, setting_read, told
from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.ir.signature import Signature, below, modes_and_hooks, training_flags
from ecospa_fx.passes.ir.unchanged import unchanged
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.ranks.tensor_parallel import sends

from .specialization import Specialization

MOST_ROUTES = 1024  # calls remembered per region, one per combination of sizes

MOST_GUARDS = 8  # per graph: of train and eval mode, with hooks and without

Route: TypeAlias = "tuple[Signature, Callable[[], bool]]"  # the signature of a program, and whether it serves still


class Routing:
    """The routes from calls of one region to its programs. Newer programs are tried before older ones."""

    def __init__(self) -> None:
        # A key leads to several routes where modes, hooks, constants or the contents of objects tell calls apart.
        self._routes: dict[Any, tuple[Route, ...]] = {}
        self._bound: dict[int, _Bound] = {}  # per graph
        # Keys of calls that no program serves, nor ever will while the region is whole.
        self._own_python: set[Any] = set()

    def without_routes(self) -> Routing:
        """Return a routing that remembers no call, for a region that takes other sizes from now on."""
        fresh = Routing()
        fresh._bound = self._bound
        return fresh

    def remembered(
        self, specializations: Sequence[Specialization], key: Any, tensors: Sequence[Tensor], objects: Sequence[Any]
    ) -> Program | None:
        """Return the program that served a call of the same key before, if it still fits."""
        for signature, holds in self._routes.get(key, ()) if key is not None else ():
            if not holds():
                continue
            for each in specializations:
                program = each.program
                if program.captured.signature is signature:
                    if not objects:
                        return program
                    # The key says nothing about the tensors in the objects, nor about sizes.
                    state = program.captured.carried.read(objects)
                    if state is not None and program.fits([*tensors, *state]):
                        return program
        return None

    def remember(self, key: Any, module: nn.Module, program: Program) -> None:
        """Lead later calls of the same key to a program, while the region is as it is now."""
        if key is not None:
            if len(self._routes) >= MOST_ROUTES:
                self._routes.clear()
            holds = self._bind(module, program.captured).guard()
            if holds is None:
                return
            route = program.captured.signature, holds
            routes = self._routes.get(key, ())
            self._routes[key] = (route, *(other for other in routes if other != route))[:MOST_GUARDS]

    def leave(self, key: Any) -> None:
        """Leave later calls of the same key to the region's own Python, which is right for all while it is whole."""
        if key is not None:
            if len(self._own_python) >= MOST_ROUTES:
                self._own_python.clear()
            self._own_python.add(key)

    def leaves(self, key: Any) -> bool:
        """Return whether calls of this key are left to the region's own Python."""
        return key in self._own_python

    def search(
        self, specializations: Sequence[Specialization], module: nn.Module, call: Any, hooks: Mapping[str, int]
    ) -> Program | None:
        """Return the newest program that serves a call, or None."""
        training = training_flags(module)
        for each in reversed(specializations):
            program = each.program
            if not program.captured.serves(hooks, program.called):
                continue
            if (
                program.captured.difference(call, module, training, program.sizes) is None
                and self.changed_constant(specializations, module, program) is None
            ):
                return program
        return None

    def changed_constant(
        self, specializations: Sequence[Specialization], module: nn.Module, program: Program
    ) -> str | None:
        """Return the first value held by a graph that has changed, with both values, or None."""
        if len(specializations) == 1 and torch.compiler.is_compiling():
            # `changed` names objects of one block, for each of which torch.compile would make a graph of its own. It is
            # needed where several graphs must be told apart.
            return None if program.settings_hold(module) else "an attribute that it reads has changed"
        return self._bind(module, program.captured).changed()

    def changed_numbers(self, module: nn.Module, program: Program) -> list[Read] | None:
        """Return the numbers held by a graph that have changed; None if something else has changed, too."""
        return self._bind(module, program.captured).changed_numbers()

    def divided_number(self, module: nn.Module, program: Program, ranks: int) -> str | None:
        """Return in words an integer held by a graph that has been divided by a number of ranks since; None if none."""
        return self._bind(module, program.captured).divided(ranks)

    def _bind(self, module: nn.Module, captured: RegionGraph) -> _Bound:
        bound = self._bound.get(id(captured))
        if bound is None or bound.captured is not captured or not bound.is_of(module):
            self._bound[id(captured)] = bound = _Bound(captured, module)
        return bound


class _Bound:
    """The values that a graph holds as constants, bound to the places in a live region where it read them."""

    def __init__(self, captured: RegionGraph, module: nn.Module) -> None:
        self.captured, self.module = captured, module
        self.modules = below(module)
        self.named = dict(module.named_modules(remove_duplicate=False))
        settings = [setting_read(path, name, value) for (path, name), value in captured.settings.items()]
        self.reads = (*settings, *captured.reads)
        self.guards: list[Callable[[], bool]] = []
        self._made = 0
        self._changed: tuple[Read, ...] = ()

    def is_of(self, module: nn.Module) -> bool:
        """Return whether the submodules of a region are those that this was made of."""
        if torch.compiler.is_compiling():
            return True
        modules = below(module)
        return len(modules) == len(self.modules) and all(map(is_, modules, self.modules))

    def guard(self) -> Callable[[], bool] | None:
        """Return a function that says whether the region is as it is now; None where the graph is not right now."""
        for holds in self.guards:
            if holds():
                return holds
        if self.changed() is not None:
            return None
        self._made += 1
        if self._made <= 2 * MOST_GUARDS:
            holds = unchanged(self.module, self.reads, self.captured.numbers, self.captured.signature.weights)
            if holds():
                self.guards = [holds, *self.guards[: MOST_GUARDS - 1]]
                return holds
        # Something is replaced by its equal at each call, or each time that it is looked at.
        state = modes_and_hooks(self.module)
        return lambda: (
            self.is_of(self.module)
            and modes_and_hooks(self.module) == state
            and self.captured.signature.other_weight(self.module) is None
            and self.changed() is None
        )

    def changed(self) -> str | None:
        """Return the first value that has changed, in words."""
        if torch.compiler.is_compiling():
            found = self._first(self.reads)
        elif any(holds() for holds in self.guards):
            return None
        else:  # what has changed once is as a rule what changes
            found = self._first(self._changed) or self._first(self.reads)
            self._changed = () if found is None else (found[0],)
        if found is not None:
            return told(*found)
        for number in self.captured.numbers:
            if not number.fits(self.named):
                return told(number.read, number.read.now(self.named))
        return None

    def _first(self, reads: Sequence[Read]) -> tuple[Read, Any] | None:
        """Return the first of some reads that has changed, and its value now.

        A layer that the code calls as a module may have got a forward that sends for it, by tensor parallelism.
        """
        while (found := first_changed(reads, self.named)) is not None:
            read, now = found
            layer = self.named.get(read.root.path) if isinstance(read.root, ModuleRoot) else None
            is_forward = layer is not None and [step.key for step in read.steps] == ["forward"]
            if layer is None or not (is_forward and calls_itself(layer) and sends(now)):
                return found
            reads = reads[next(i for i, each in enumerate(reads) if each is read) + 1 :]
        return None

    def divided(self, ranks: int) -> str | None:
        """Return in words the first integer that has been divided by a number of ranks; None if there is none."""
        for read in self.reads:
            now = read.now(self.named)
            if type(read.value) is int and type(now) is int and now and now * ranks == read.value:
                return told(read, now)
        return None

    def changed_numbers(self) -> list[Read] | None:
        """Return the numbers that have changed, of those that the graph holds; None if something else has changed."""
        changed = [read for read in self.reads if self._first([read]) is not None]
        changed = [entry for read in changed for entry in read.entries() if not entry.holds(self.named)]
        numbers = [read for read in changed if type(read.value) is float and type(read.now(self.named)) is float]
        return numbers if len(numbers) == len(changed) else None
