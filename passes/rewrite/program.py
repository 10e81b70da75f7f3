"""Program: the forward of a region as generated code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.utils.checkpoint
from torch import Tensor, nn

from ecospa_fx.passes.axes.algebra import Size
from ecospa_fx.passes.capture.hooks import fire
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.ir.state_access import Stored

# Raised by activation checkpointing when it has recomputed enough; a torch without that name is not listened to.
_STOP: type[BaseException] = getattr(torch.utils.checkpoint, "_StopRecomputationError", StopIteration)


@dataclass(eq=False)
class Program:
    """A region's forward as generated code.

    Attributes:
        captured: the captured graph, at original sizes.
        axis_facts: the axes of that graph.
        run: `run(region, *inputs, *objects, *constants)` returns the output tensors.
        constants: lifted tensors, subgraphs and index tensors that `run` takes, and `RegionGraph.numbers` as captured.
        source: the generated code, to read.
        called: submodules that the code calls as modules.
        sizes: the sizes that the tensors of a call must have, those in its objects last.
        results: names of the locals of `run` that it returns, `""` for results that no local holds.
        settings_hold: says of a live region whether the numbers in attributes that `run` has as constants are as they
            were; see `same_settings`.
        check: see `fits`; made when it is first needed.
    """

    captured: RegionGraph
    axis_facts: AxisFacts
    run: Any
    constants: tuple[Any, ...]
    source: str
    called: frozenset[str] = frozenset()
    sizes: tuple[tuple[Size, ...], ...] = ()
    results: tuple[str, ...] = ()
    settings_hold: Callable[[nn.Module], bool] = lambda region: True
    check: Callable[[Sequence[Tensor]], bool] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self  # holds no module: it runs on whichever region calls it

    def __call__(self, region: nn.Module, inputs: Sequence[Any]) -> Any:
        """Run one call and return its results in the structure that the region's own forward gives them.

        Args:
            region: the live region.
            inputs: the tensors of the call, those in its objects, then the objects.
        """
        return self.returned(region, inputs, self.tensors(region, inputs))

    def tensors(self, region: nn.Module, inputs: Sequence[Any]) -> Any:
        """Run the code of one call, and return its tensors; arguments as of a call."""
        try:
            return self.run(region, *inputs, *self.constants_now(region))
        except _STOP as stop:
            self._assign_until(stop, region)
            raise

    def _assign_until(self, stop: BaseException, region: nn.Module) -> None:
        """Assign to attributes what the code had computed for them when activation checkpointing broke it off.

        It runs a forward a second time until it has what backward needs. The region's own Python assigns at its place
        in the forward, before that, so that it assigns twice; a program assigns when its code has returned.
        """
        trace = stop.__traceback__
        while trace is not None and trace.tb_frame.f_code is not self.run.__code__:
            trace = trace.tb_next
        held = {} if trace is None else trace.tb_frame.f_locals
        for attribute, name in zip(self.captured.assigned, self._assigned_among(self.results), strict=True):
            if name in held:
                attribute.put(region, held[name])

    def _assigned_among(self, outputs: Sequence[Any]) -> Sequence[Any]:
        """Return the part of outputs of the code that goes to attributes."""
        stored = sum(isinstance(value, Stored) for _, value in self.captured.carried.effects)
        return self.captured.assigned_among(outputs, stored)

    def constants_now(self, region: nn.Module) -> tuple[Any, ...]:
        """Return `constants` with the numbers that a live region has now."""
        if not self.captured.numbers:
            return self.constants
        return (*self.constants[: -len(self.captured.numbers)], *self.captured.numbers_now(region))

    def returned(self, region: nn.Module, inputs: Sequence[Any], tensors: Any) -> Any:
        """Turn the tensors that the code returned into results of the region; fill its objects and fire its hooks."""
        captured = self.captured
        objects: Sequence[Any] = inputs[len(captured.inputs) :]
        stored = sum(isinstance(value, Stored) for _, value in captured.carried.effects)
        if captured.carried.effects:
            fillings = iter(tensors[len(tensors) - stored :])
            for place, value in captured.carried.effects:
                place.put(objects, next(fillings) if isinstance(value, Stored) else value)
        if captured.assigned:
            for attribute, tensor in zip(captured.assigned, self._assigned_among(tensors), strict=True):
                attribute.put(region, tensor)
        if captured.observed:
            fire(region, captured.observed, tensors[captured.returned :], captured.region, objects)
        return captured.result(tensors[: captured.returned], objects)

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return True if the program serves the sizes of a call's tensors, including those in its objects."""
        if self.check is None:
            called = len(self.captured.inputs) - len(self.captured.state)
            self.check = self.captured.signature.checker(self.sizes, called)
        return self.check(tensors)
