"""Routing: the choice of the program that serves a call of a region.

call -> call_key -> Routing.remembered   the program that served a call of the same key before
-> no route -> Routing.search       the newest program whose signature, hooks and constants fit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.ir.signature import Signature, training_flags
from ecospa_fx.passes.ir.state_access import ABSENT
from ecospa_fx.passes.rewrite.program import Program

from .specialization import Specialization

MOST_ROUTES = 1024  # calls remembered per region, one per combination of sizes

Constant = tuple[dict[str, Any], str, Any, Any]  # the __dict__ of a module, a name in it, the default, the value


class Routing:
    """The routes from calls of one region to its programs. Newer programs are tried before older ones."""

    def __init__(self) -> None:
        # A key leads to several signatures where only the contents of objects tell calls apart.
        self._routes: dict[Any, tuple[Signature, ...]] = {}
        # Per graph the attributes of the live region that it was captured with as constants.
        self._constants: dict[int, tuple[RegionGraph, list[Constant]]] = {}

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
                and program.captured.mismatch(call, training, program.state) is None
            ):
                return program
        return None

    def changed_constant(
        self, specializations: Sequence[Specialization], module: nn.Module, program: Program
    ) -> str | None:
        """Return the first captured constant whose value has changed, with both values, or None."""
        if len(specializations) == 1 and torch.compiler.is_compiling():
            return None  # torch.compile guards what a traced forward reads, and traces again where it changes
        captured = program.captured
        entry = self._constants.get(id(captured))
        if entry is None or entry[0] is not captured:
            named = dict(module.named_modules(remove_duplicate=False))
            constants = [
                (named[path].__dict__, name, getattr(type(named[path]), name, ABSENT), value)
                for (path, name), value in captured.settings.items()
            ]
            self._constants[id(captured)] = entry = (captured, constants)
        for (attributes, name, default, value), where in zip(entry[1], captured.settings, strict=True):
            now = attributes.get(name, default)
            if now is not value and (type(now) is not type(value) or now != value):
                return f"`{'.'.join(part for part in where if part)}` is {now!r} and was {value!r}"
        return None
