"""Inner: modules inside a shrunk region that somebody calls by themselves, as a `sample` or `encode` does.

A call of the region never comes here, because its code holds their ops. Their own Python may be of the original sizes:
it would fail, or view what is left of the heads as as many shorter ones, without a word.

inner call
  -> fits       the Python of the region around gives what its programs give: then so does that of all inside
  -> Region     otherwise a program of the module's own, captured at original sizes, that follows the plan
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ecospa_fx.errors import CaptureError
from ecospa_fx.passes.follow.attributes import fitted
from ecospa_fx.passes.follow.trial import NotTried, difference, example_calls, modes
from ecospa_fx.passes.graph.forward_swap import own_forward, swap_forward
from ecospa_fx.passes.graph.isolate import isolated
from ecospa_fx.passes.graph.tensors import parameters_of, swapped
from ecospa_fx.passes.ir.signature import autocast_now, with_autocast
from ecospa_fx.passes.rewrite.program import Program
from ecospa_fx.threads import alone, in_call

from .region import REGION, Region

INNER = "_ecospa_inner"  # key in a module's __dict__


class Around:
    """A shrunk region and its module, for the modules inside.

    Args:
        region: the region.
        module: its module.
    """

    def __init__(self, region: Region, module: nn.Module) -> None:
        self.region, self.module = region, module
        self._fits: bool | None = None

    def __str__(self) -> str:
        return f"`{self.region.name}`" if self.region.name else "the model"

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @alone()
    def fits(self) -> bool:
        """Return whether the region's own Python computes with the weights that are left what its programs compute.

        That is tried once after a shrink, in all calls met so far.
        """
        if self._fits is None:
            programs = [each.program for each in self.region.specializations]
            with fitted(self.module), inner_as_is(self.module):
                self._fits = (
                    bool(programs)
                    and self.region.shared_out is None
                    and all(difference_of_python(program, self.module) is None for program in programs)
                )
        return self._fits


class InnerCall:
    """The forward of a module inside a region, for calls that do not come from the region.

    Args:
        name: name of the module in the model.
        around: the region around it.
    """

    def __init__(self, name: str, around: Around) -> None:
        self.around = around
        self.region = Region(name, around.region.state, {})

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own Python where that is right, else a program of the sizes left."""
        if torch.compiler.is_dynamo_compiling():
            return self._run(module, args, kwargs)
        with in_call():
            return self._run(module, args, kwargs)

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = own_forward(module, INNER)
        if not self._small(module):  # as while graphs are captured
            return own(module, *args, **kwargs)
        if self.around.fits():
            with fitted(module):
                return own(module, *args, **kwargs)
        try:
            return self.region(module, args, kwargs)
        except CaptureError as error:
            raise CaptureError(
                f"`{self.region.name}` lies in {self.around}, which has shrunk and runs as one graph; called by itself "
                f"it cannot be captured: {error}"
            ) from error

    def _small(self, module: nn.Module) -> bool:
        """Return whether some parameter of a module has fewer entries now than before any shrink."""
        before = self.region.state.plan.original_shapes
        named = ((f"{self.region.name}.{path}", p) for path, p in parameters_of(module, remove_duplicate=False))
        return any(tuple(p.shape) != tuple(before.get(name, p.shape)) for name, p in named)


def guard_inner(module: nn.Module, region: Region) -> None:
    """Route calls of the modules inside a region, other than layers and containers of torch, to `InnerCall`."""
    around, shrunk = Around(region, module), list(region.state.plan.original_shapes)
    for path, inner in module.named_modules():
        name = f"{region.name}.{path}" if region.name else path
        if path and not _follows_its_weights(inner) and any(each.startswith(f"{name}.") for each in shrunk):
            inner.__dict__[INNER] = InnerCall(name, around)
            swap_forward(inner, INNER)


@contextmanager
def inner_as_is(model: nn.Module) -> Iterator[None]:
    """Let modules inside regions run their own Python for a while, at whatever sizes."""
    removed = [(each.__dict__, each.__dict__.pop(INNER)) for each in model.modules() if INNER in each.__dict__]
    try:
        yield
    finally:
        for attributes, call in removed:
            attributes[INNER] = call


def difference_of_python(program: Program, module: nn.Module) -> str | None:
    """Say how the own forward of a region differs from a program on a call that both take; None where they agree.

    Both run in the dtypes in which the program was captured, for weights may have been cast since, and under its
    autocast if it is right under that alone.
    """
    why: str | None = None
    signature = program.captured.signature
    cast = {name: held.detach().to(dtype) for name, held, dtype in signature.other_weights(module)}
    for args, kwargs in example_calls(program.axis_facts, program.sizes):
        try:
            with (
                modes(module, signature.training), isolated(module), torch.no_grad(), swapped(module, cast),
                with_autocast(signature.autocast if program.captured.under_autocast else autocast_now()),
            ):  # fmt: skip
                return difference(module, program, own_forward(module, REGION), args, kwargs)
        except NotTried as error:
            why = f"cannot be tried: {error}"
    return why


def _follows_its_weights(module: nn.Module) -> bool:
    """Return whether a module has no Python of its own beside a call of one operator, or of its children in turn."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return True
    torchs = str(type(module).forward.__module__).startswith("torch.nn.modules.")
    return torchs and not any(True for _ in module.children())
