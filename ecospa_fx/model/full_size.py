"""Full size: stand-ins at original sizes for all that has shrunk, to capture a call after that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.errors import EcoSpaError
from ecospa_fx.passes.follow.attributes import Changes, holding, restore_layer_sizes, sync_layer_sizes
from ecospa_fx.passes.graph.tensors import dequantized, is_quantized, join, named_tensors, parameters_of, swapped
from ecospa_fx.passes.graph.uncompiled import uncompiled
from ecospa_fx.passes.ir.border import Border, argument_names
from ecospa_fx.passes.ir.region_graph import Call, Forward
from ecospa_fx.passes.ir.state_access import foreign
from ecospa_fx.plan import Plan


def in_transform() -> bool:
    """Return whether a transform of torch.func (`vmap`, `grad`) is running, inside of which nothing can be captured."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextmanager
def outside_forward() -> Iterator[None]:
    """Leave inference mode, saved-tensor hooks and compiled code, to capture in the middle of a forward.

    Tensors that a graph keeps must serve training later; and activation checkpointing would run the forward again for
    the gradients by which a graph is compared with eager.
    """
    with torch.inference_mode(False), uncompiled(), ExitStack() as stack:
        if not in_transform() and _hooked():  # transforms refuse such hooks
            # A hook that keeps the tensor itself makes a cycle of an op that saves its result: memory for ever.
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda t: t))
        yield


def _hooked() -> bool:
    """Return whether hooks are on that take the tensors which ops save for their gradients, or may be."""
    hooks = saved_tensors_hooks_on()
    return hooks is None or len(hooks) > 0


def saved_tensors_hooks_on() -> tuple[Callable[..., Any], ...] | None:
    """Return the innermost hooks on saved tensors, (pack, unpack), or (); None where this torch does not say."""
    top: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else tuple(top(True) or ())


def outside_inference(call: Call) -> Call:
    """Return the arguments of a call, with clones for inference tensors, which autograd does not take."""
    plain: Call = pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, call, is_leaf=foreign)
    return plain


class FullSizeTensors:
    """Stand-ins at original sizes for the tensors of a region that have shrunk, to capture a new call.

    A graph of that call is compared with eager as any other, which takes values: zeros in place of removed entries.
    They exist for one comparison, with gradients, of one region: at most half the memory that the unshrunk region took
    in training with Adam, and that the shrunk one no longer takes.

    A parameter that torch.func.functional_call has replaced by a tensor gets a parameter as its stand-in. Quantized
    weights get plain ones, all of the region: no graph needs to show how entries are packed.
    """

    def __init__(self, module: nn.Module, region: str, plan: Plan) -> None:
        self.region, self.plan = region, plan
        self.parameters = dict(parameters_of(module, remove_duplicate=False))
        self.named = {
            name: tensor
            for name, tensor in named_tensors(module).items()
            if join(region, name) in plan.original_shapes
            or is_quantized(tensor)
            or (name in self.parameters and not isinstance(tensor, nn.Parameter))
        }

    def shapes(self) -> dict[str, Tensor]:
        """Return zeros: tracing reads no entries."""
        return self._tied(empty=True)

    def values(self) -> dict[str, Tensor]:
        """Return the entries that are left in their places among zeros."""
        return self._tied(empty=False)

    def _tied(self, empty: bool) -> dict[str, Tensor]:
        """Make the stand-ins; tied tensors get one and the same."""
        stand_ins: dict[int, Tensor] = {}
        for name, tensor in self.named.items():
            if id(tensor) in stand_ins:
                continue
            full_name, parameter = join(self.region, name), name in self.parameters
            value = dequantized(tensor)
            if full_name in self.plan.original_shapes:
                shape = self.plan.original_shapes[full_name]
                value = full_of(tensor, shape) if empty else unshrunk(tensor, self.plan, full_name)
            stand_ins[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if parameter else value
        return {name: stand_ins[id(tensor)] for name, tensor in self.named.items()}


def unshrunk(tensor: Tensor, plan: Plan, name: str, fill: float = 0.0) -> Tensor:
    """Return a tensor at its original shape, with `fill` (zero in a tensor of integers) in place of removed entries."""
    fill = fill if tensor.is_floating_point() else 0
    full = full_of(tensor, plan.original_shapes[name], fill)
    index = [plan.kept.get((name, dim), torch.arange(size)).to(tensor.device) for dim, size in enumerate(full.shape)]
    full[torch.meshgrid(*index, indexing="ij")] = dequantized(tensor)
    return full


def unshrunk_dim(tensor: Tensor, dim: int, kept: Tensor, size: int, name: str, who: str) -> Tensor:
    """Return an argument of a region with zeros in place of the entries that are gone along one dim.

    Raises:
        EcoSpaError: it has another size than is left.
    """
    if dim >= tensor.ndim or tensor.shape[dim] != len(kept):
        raise EcoSpaError(
            f"the argument `{name}` of {who} has sizes {tuple(tensor.shape)}, and {len(kept)} of {size} entries are "
            f"left along its dim {dim}, which has shrunk with the model around: pass what the module before it "
            'returns, or compile with regions="blocks", where arguments and results of blocks keep their sizes'
        )
    shape = list(tensor.shape)
    shape[dim] = size
    full = tensor.new_zeros(shape)
    return full.index_copy(dim, kept.to(tensor.device), tensor.detach())


def full_of(tensor: Tensor, shape: Sequence[int], fill: float = 0.0) -> Tensor:
    """Return a tensor of `fill` with another shape, its dims in the same order in memory.

    A forward may ask for that order: `torch.view_as_complex(weight)` takes pairs that lie side by side.
    """
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
    full = torch.empty_permuted(tuple(shape), order, dtype=tensor.dtype, device=tensor.device)
    return full.fill_(fill)


def full_size_call(call: Call, forward: Forward, border: Border, plan: Plan, who: str) -> Call:
    """Return a call of a region with tensors that have shrunk with the model around it at their original sizes.

    Args:
        call: the call.
        forward: the region's own, which has names for them.
        border: the dims that shrink so.
        plan: the plan.
        who: the region, for messages.

    Raises:
        EcoSpaError: such a tensor has another size than the model leaves now.
    """
    gone = {edge: of for edge, of in border.arguments.items() if of is not None and of in plan.kept}
    if not gone:
        return call
    names = iter(argument_names(forward, *call))

    def expand(tensor: Tensor) -> Tensor:
        name = next(names)
        for (argument, dim), of in gone.items():
            if argument == name:
                tensor = unshrunk_dim(tensor, dim, plan.kept[of], plan.original_shapes[of[0]][of[1]], name, who)
        return tensor

    full: Call = pytree.tree_map_only(Tensor, expand, call, is_leaf=foreign)
    return full


@contextmanager
def original_numbers(module: nn.Module, region: str, changed: Changes, originals: FullSizeTensors) -> Iterator[None]:
    """Give a region whose own Python runs the integers that it held before any shrink, for the time inside.

    Args:
        module: the region.
        region: its name.
        changed: the integers of the model that have followed: the value before any shrink, and now.
        originals: its tensors at original sizes.
    """
    prefix = f"{region}." if region else ""
    inside = {
        replace(a, module=f"{a.module}."[len(prefix) :].removesuffix(".")): original
        for a, (original, _) in changed.items()
        if f"{a.module}.".startswith(prefix)
    }
    with holding(module, inside):
        with swapped(module, originals.shapes()):
            before = sync_layer_sizes(module)
        try:
            yield
        finally:
            restore_layer_sizes(before)
