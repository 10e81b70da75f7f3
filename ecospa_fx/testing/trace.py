"""Trace of a module without torch.export, many times as fast, for thousands of small programs.

The library captures with torch.export. Recording the ops that a module dispatches before autograd gives the same ATen
ops at static sizes; a sample of the programs goes through torch.export too (see `ecospa_fx.testing.fuzz`).
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_pre_dispatch, enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ecospa_fx.passes.graph.tensors import storage_key
from ecospa_fx.passes.ir.region_graph import RegionGraph
from ecospa_fx.passes.ir.signature import Signature, autocast_now, training_flags
from ecospa_fx.passes.ir.state_access import TENSOR
from ecospa_fx.passes.simplify.canonicalise import canonicalise
from ecospa_fx.passes.simplify.clean import clean


def trace(module: nn.Module, args: tuple[Tensor, ...]) -> RegionGraph:
    """Capture a module whose arguments and results are tensors, at the sizes of this call."""
    recorder = _Recorder()
    graph = recorder.graph
    named = dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    placeholders = {}
    for name, tensor in named.items():
        if first.setdefault(storage_key(tensor), name) == name:
            placeholders[recorder.placeholder(tensor)] = name
        else:
            same[name] = first[storage_key(tensor)]
    inputs = [recorder.placeholder(tensor) for tensor in args]
    with enable_python_dispatcher(), enable_pre_dispatch(), recorder:
        outputs = module(*args)
    out_leaves, out_spec = pytree.tree_flatten(outputs)
    graph.output(tuple(recorder.nodes[out] for out in out_leaves))
    clean(graph)
    canonicalise(graph, recorder.constants)
    leaves, spec = pytree.tree_flatten((args, {}))
    signature = Signature(
        spec, tuple(TENSOR for _ in leaves), tuple((t.dtype, t.device, tuple(t.shape)) for t in args),
        training_flags(module), {}, autocast_now(),
    )  # fmt: skip
    return RegionGraph(
        region="", graph=graph, tensors=placeholders,
        parameters=frozenset(p for p, name in placeholders.items() if name in parameters),
        constants=recorder.constants, inputs=tuple(inputs), signature=signature,
        sizes={name: named[name].shape for name in placeholders.values()}, out_spec=out_spec,
        out_leaves=tuple(TENSOR for _ in out_leaves), same_storage=same,
    )  # fmt: skip


class _Recorder(ProxyTorchDispatchMode):
    """A dispatch mode that runs each op and records it, before autograd decomposes it.

    It uses nothing of its base class: torch lets no other kind of mode see ops before autograd.
    """

    def __init__(self) -> None:
        nothing: Any = None
        super().__init__(nothing, "real", pre_dispatch=True)
        self.graph = fx.Graph()
        # Weak, because torch returns the result of a factory unchanged only if nothing else refers to it.
        self.nodes: Any = WeakIdKeyDictionary()
        self.constants: dict[str, Tensor] = {}

    def placeholder(self, tensor: Tensor) -> str:
        node = self.graph.placeholder(f"p{len(self.graph.nodes)}")
        self._record(tensor, node)
        return node.name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return result
        node_args, node_kwargs = pytree.tree_map_only(Tensor, self._node, (args, kwargs))
        node = self.graph.call_function(func, node_args, node_kwargs)
        if isinstance(result, Tensor):
            self._record(result, node)
        else:
            node.meta["val"] = tuple(map(_stand_in, result))
            for i, item in enumerate(result):
                self._record(item, self.graph.call_function(operator.getitem, (node, i)))
        return result

    def _record(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta["val"] = _stand_in(tensor)
        self.nodes[tensor] = node

    def _node(self, tensor: Tensor) -> fx.Node:
        node: fx.Node | None = self.nodes.get(tensor)
        if node is None:
            with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
                node = self.graph.placeholder(f"c{len(self.constants)}")
            self.constants[node.name] = tensor
            self._record(tensor, node)
        return node


def _stand_in(tensor: Tensor) -> Tensor:
    """Make a stand-in for a tensor in a graph: its shape and dtype, without its values."""
    stand_in: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    vars(stand_in)["fake_mode"] = nullcontext()
    return stand_in
