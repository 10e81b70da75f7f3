"""Stand-ins: what has shrunk at its original sizes, for a call that is captured after that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.passes.graph.tensors import join, named_tensors
from ecospa_fx.passes.ir.region_graph import Call
from ecospa_fx.passes.ir.state_access import foreign
from ecospa_fx.plan import Plan


@contextmanager
def outside_forward() -> Iterator[None]:
    """Capture in the middle of a forward: out of inference mode, and out of sight of whoever packs saved tensors.

    What a graph keeps must serve training later; and activation checkpointing would run the forward again for the
    gradients that a graph is compared by.
    """
    with torch.inference_mode(False), ExitStack() as stack:
        if torch._C._functorch.peek_interpreter_stack() is None:  # its transforms know no such hooks
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        yield


def outside_inference(call: Call) -> Call:
    """The arguments of a call, those that inference mode has made as tensors that autograd takes."""
    plain: Call = pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, call, is_leaf=foreign)
    return plain


class FullSizeTensors:
    """What of a region has shrunk, at original sizes, for the capture of a new call.

    A graph of that call is compared with eager as any other, and that takes values: zeros where entries are gone. They
    exist for one comparison, with gradients, of one region: at most half of what the unshrunk region took in training
    with Adam, and the shrunk one no longer takes.

    A parameter that torch.func.functional_call has replaced by a tensor is stood in for by one again.
    """

    def __init__(self, module: nn.Module, region: str, plan: Plan) -> None:
        self.region, self.plan = region, plan
        self.parameters = dict(module.named_parameters(remove_duplicate=False))
        self.named = {
            name: tensor
            for name, tensor in named_tensors(module).items()
            if join(region, name) in plan.original_shapes
            or (name in self.parameters and not isinstance(tensor, nn.Parameter))
        }

    def shapes(self) -> dict[str, Tensor]:
        """Parameters of one entry each, repeated; buffers, which a forward may write into, as in `values`."""
        return self._tied(expanded=True)

    def values(self) -> dict[str, Tensor]:
        """What is left, in its places among zeros."""
        return self._tied(expanded=False)

    def _tied(self, expanded: bool) -> dict[str, Tensor]:
        """Weights that are one stay one."""
        made: dict[int, Tensor] = {}
        for name, tensor in self.named.items():
            if id(tensor) in made:
                continue
            full, parameter = join(self.region, name), name in self.parameters
            whole = tensor.detach()
            if full in self.plan.original_shapes:
                whole = whole.new_zeros(()).expand(self.plan.original_shapes[full])
                if not (expanded and parameter):
                    whole = unshrunk(tensor, self.plan, full)
            made[id(tensor)] = nn.Parameter(whole, tensor.requires_grad) if parameter else whole
        return {name: made[id(tensor)] for name, tensor in self.named.items()}


def unshrunk(tensor: Tensor, plan: Plan, name: str, fill: float = 0.0) -> Tensor:
    """`tensor` in its places at the shape it had before any shrink, among zeros, or among `fill` if it is of floats."""
    fill = fill if tensor.is_floating_point() else 0
    whole = torch.full(plan.original_shapes[name], fill, dtype=tensor.dtype, device=tensor.device)
    index = [plan.kept.get((name, dim), torch.arange(size)).to(tensor.device) for dim, size in enumerate(whole.shape)]
    whole[torch.meshgrid(*index, indexing="ij")] = tensor.detach()
    return whole
