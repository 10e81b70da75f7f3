"""export: a compiled and shrunk model as a program of torch.export, for files that run without this library.

export(model, args)
  -> torch.export.export    the generated code of the regions, traced with the model's own Python around them
  -> _meeting               a call that a region sees only while it is exported: captured outside, then again
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram

from ecospa_fx.errors import CaptureError
from ecospa_fx.model.lookup import is_captured, regions_of, state_of
from ecospa_fx.model.region import Region
from ecospa_fx.passes.graph.isolate import isolated
from ecospa_fx.passes.ir.state_access import flattened, foreign


class _Unmet(Exception):
    """A region was called in a way that it has no graph for."""

    def __init__(self, meet: Callable[[], Any]) -> None:
        super().__init__()
        self.meet = meet


def export(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """`torch.export.export` of a compiled model at the sizes it has now.

    >>> program = ecospa_fx.export(model, (x,))
    >>> torch.export.save(program, "model.pt2")
    >>> torch.onnx.export(program).save("model.onnx")

    Some models behave otherwise while they are exported: those of transformers make their causal mask as a tensor, so
    that their blocks are called as they never were. Such calls are captured here, and compared with the model's own
    Python as any other; plain `torch.export.export` ends with an error at the first.

    Args:
        model: a compiled model. Its mode, train or eval, is part of what is exported.
        args: positional arguments of a call.
        kwargs: keyword arguments of that call.
        dynamic_shapes: see `torch.export.export`; without it all sizes are those of this call.

    Returns:
        The program. Nothing of this library is in it.

    Raises:
        EcoSpaError: the model is not compiled.
        CaptureError: a region cannot be captured in the way it is called while it is exported.
        PinnedAxisError: called in that way, it needs an axis whole that has shrunk.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    if regions_of(model) and not is_captured(model):  # it was loaded, and not called since
        with torch.no_grad(), isolated(model):
            model(*args, **kwargs)
    state_of(model)
    while True:
        try:
            with _meeting(model):
                return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        except _Unmet as unmet:
            meet = unmet.meet
        meet()


@contextmanager
def _meeting(model: nn.Module) -> Iterator[None]:
    """Regions say what they would have to capture, in place of doing it: inside of an export they cannot."""
    regions = list(regions_of(model).values())
    for region in regions:
        region.__dict__["add"] = _adder(region)
    try:
        yield
    finally:
        for region in regions:
            del region.__dict__["add"]


def _adder(region: Region) -> Callable[..., Any]:
    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = flattened((args, kwargs))
        odd = next((leaf for leaf in leaves if foreign(leaf)), None)
        if odd is not None:
            raise CaptureError(
                f"region `{region.name}` is called with a {type(odd).__name__} while the model is exported, in a way "
                "it has not been called in before: export a call without one (of a cache, `use_cache=False` as a rule)"
            )
        seen = [_Seen(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # what is traced dies with it

        def meet() -> None:
            call = pytree.tree_unflatten([leaf.made() if isinstance(leaf, _Seen) else leaf for leaf in seen], spec)
            region.add(module, *call)

        raise _Unmet(meet)

    return add


class _Seen:
    """A tensor that was seen in an export."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = [int(n.node.hint) if isinstance(n, torch.SymInt) else int(n) for n in tensor.shape]
        self.dtype, self.device = tensor.dtype, tensor.device

    def made(self) -> Tensor:
        """One like it, with values that any code takes: nothing is masked out, the first entry of every table."""
        made = torch.ones if self.dtype == torch.bool else torch.zeros
        if self.dtype.is_floating_point or self.dtype.is_complex:
            made = torch.randn
        return made(self.shape, dtype=self.dtype, device=self.device)
