"""Routing: the choice of the program that serves a call of a region.

call -> call_key -> Routing.remembered   the program that served a call of the same key before
-> no route -> Routing.search       the newest program whose signature, hooks and constants fit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.passes.ir.guards import Read, first_changed, guard, setting_read, told
from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.ir.signature import Signature, below, training_flags
from ecospa_fx.passes.rewrite.program import Program

from .specialization import Specialization

MOST_ROUTES = 1024  # calls remembered per region, one per combination of sizes


class Routing:
    """The routes from calls of one region to its programs. Newer programs are tried before older ones."""

    def __init__(self) -> None:
        # A key leads to several signatures where only the contents of objects tell calls apart.
        self._routes: dict[Any, tuple[Signature, ...]] = {}
        self._bound: dict[int, _Bound] = {}  # per graph

    def without_routes(self) -> Routing:
        """Return a routing that remembers no call, for a region that takes other sizes from now on."""
        fresh = Routing()
        fresh._bound = self._bound
        return fresh

    def remembered(
        self,
        specializations: Sequence[Specialization],
        module: nn.Module,
        key: Any,
        tensors: Sequence[Tensor],
        objects: Sequence[Any],
    ) -> Program | None:
        """Return the program that served a call of the same key before, if it still fits."""
        for signature in self._routes.get(key, ()) if key is not None else ():
            for each in reversed(specializations):
                program = each.program
                if program.captured.signature is signature and (
                    self.changed_constant(specializations, module, program) is None
                ):
                    if not objects:
                        return program
                    # The key says nothing about the tensors in the objects, nor about sizes.
                    state = program.captured.carried.read(objects)
                    if state is not None and program.fits([*tensors, *state]):
                        return program
        return None

    def remember(self, key: Any, program: Program) -> None:
        """Lead later calls of the same key to a program."""
        if key is not None:
            if len(self._routes) >= MOST_ROUTES:
                self._routes.clear()
            signature = program.captured.signature
            signatures = self._routes.setdefault(key, ())
            if not any(other is signature for other in signatures):
                self._routes[key] = (signature, *signatures)

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
                self.changed_constant(specializations, module, program) is None
                and program.captured.mismatch(call, training, program.sizes) is None
            ):
                return program
        return None

    def changed_constant(
        self, specializations: Sequence[Specialization], module: nn.Module, program: Program
    ) -> str | None:
        """Return the first value held by a graph that has changed, with both values, or None."""
        if len(specializations) == 1 and torch.compiler.is_compiling():
            return None  # torch.compile guards what a traced forward reads, and traces again where it changes
        return self._bind(module, program.captured).changed()

    def changed_numbers(self, module: nn.Module, program: Program) -> list[Read] | None:
        """Return the numbers held by a graph that have changed; None if something else has changed, too."""
        return self._bind(module, program.captured).changed_numbers()

    def _bind(self, module: nn.Module, captured: RegionGraph) -> _Bound:
        bound = self._bound.get(id(captured))
        if bound is None or bound.captured is not captured:
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
        self.holds = guard(self.reads, self.named)

    def changed(self) -> str | None:
        """Return the first value that has changed, in words."""
        if torch.compiler.is_compiling() or not self.holds():
            found = first_changed(self.reads, self.named)
            return told(*found) if found is not None else None
        for number in self.captured.numbers:
            if not number.fits(self.named):
                return told(number.read, number.read.now(self.named))
        return None

    def changed_numbers(self) -> list[Read] | None:
        """Return the numbers that have changed, of those that the graph holds; None if something else has changed."""
        changed = [read for read in self.reads if not read.holds(self.named)]
        changed = [entry for read in changed for entry in read.entries() if not entry.holds(self.named)]
        numbers = [read for read in changed if type(read.value) is float and type(read.now(self.named)) is float]
        return numbers if len(numbers) == len(changed) else None
