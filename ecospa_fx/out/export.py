"""Export: a compiled and shrunk model as a program of torch.export, for files that run without this library.

export(model, args)
  -> torch.export.export    traces the generated code of the regions, with the model's own Python around them
  -> _new_calls_raise       stops at a call that a region has no graph for; it is captured outside, then again
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram

from ecospa_fx.arguments import INPUTS, KEYWORDS, MODULE, optional, takes
from ecospa_fx.errors import CaptureError, EcoSpaError
from ecospa_fx.model.lookup import check_whole, is_captured, regions_of, state_of, try_call
from ecospa_fx.model.region import Region
from ecospa_fx.passes.graph.isolate import forked_rng
from ecospa_fx.passes.ir.state_access import flattened, foreign
from ecospa_fx.ranks.wrappers import looks_inside


class _NewCall(Exception):
    """A call of a region that it has no graph for.

    Attributes:
        capture: captures a graph for the call.
    """

    def __init__(self, capture: Callable[[], Any]) -> None:
        super().__init__()
        self.capture = capture


@takes(model=MODULE, args=INPUTS, kwargs=optional(KEYWORDS))
@looks_inside
def export(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """Export a compiled model with `torch.export.export`, at the sizes it has now.

    >>> program = ecospa_fx.export(model, (x,))
    >>> torch.export.save(program, "model.pt2")
    >>> torch.onnx.export(program).save("model.onnx")

    Some models behave differently while they are exported: those of transformers build their causal mask as a tensor,
    so that their blocks get calls they never had before. Such calls are captured here, and compared with the model's
    own Python like any other; plain `torch.export.export` fails at the first.

    Args:
        model: a compiled model. Its mode, train or eval, is part of what is exported.
        args: positional arguments of a call.
        kwargs: keyword arguments of that call.
        dynamic_shapes: see `torch.export.export`; without it, all sizes are those of this call.

    Returns:
        The program, which does not use this library.

    Raises:
        EcoSpaError: the model is not compiled.
        CaptureError: a region cannot be captured as it is called during the export.
        PinnedAxisError: that call needs an axis at full size which has shrunk.
    """
    check_whole(model, "an export")
    args, kwargs = tuple(args), dict(kwargs or {})
    if regions_of(model) and not is_captured(model):  # it was loaded, and has not been called since
        try_call(model, args, kwargs)
    state_of(model)
    while True:
        try:
            with _new_calls_raise(model), forked_rng(model):
                return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        except _NewCall as call:
            capture = call.capture
        except EcoSpaError:
            raise
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            kinds = f"{type(model).__name__} with this call, it fails with {type(error).__name__}"
            raise CaptureError(f"torch.export cannot export the {kinds}: {line}") from error
        with forked_rng(model):
            capture()


@contextmanager
def _new_calls_raise(model: nn.Module) -> Iterator[None]:
    """Make regions raise `_NewCall` in place of capturing, which they cannot do inside an export."""
    regions = list(regions_of(model).values())
    for region in regions:
        region.__dict__["add"] = _raise_new_call(region)
    try:
        yield
    finally:
        for region in regions:
            del region.__dict__["add"]


def _raise_new_call(region: Region) -> Callable[..., Any]:
    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = flattened((args, kwargs))
        odd = next((leaf for leaf in leaves if foreign(leaf)), None)
        if odd is not None:
            raise CaptureError(
                f"region `{region.name}` has no graph for a call that it gets during the export, with a "
                f"{type(odd).__name__}: export a call without one (for a cache, pass `use_cache=False`)"
            )
        # Traced tensors die with the export, so only their metadata is kept.
        metadata = [_TensorLike(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def capture() -> None:
            call = [leaf.make() if isinstance(leaf, _TensorLike) else leaf for leaf in metadata]
            region.add(module, *pytree.tree_unflatten(call, spec))

        raise _NewCall(capture)

    return add


class _TensorLike:
    """The shape, dtype and device of a tensor in an export."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = [int(n.node.hint) if isinstance(n, torch.SymInt) else int(n) for n in tensor.shape]
        self.dtype, self.device = tensor.dtype, tensor.device

    def make(self) -> Tensor:
        """Make such a tensor, with values that any code accepts: nothing is masked, indices are 0."""
        factory = torch.ones if self.dtype == torch.bool else torch.zeros
        if self.dtype.is_floating_point or self.dtype.is_complex:
            factory = torch.randn
        return factory(self.shape, dtype=self.dtype, device=self.device)
