"""Other mode: a graph of a region in training mode beside that of eval mode, where its Python runs other ops in it.

    other_mode(module, ...) -> the analysis of a call in the other mode; None where the graph that there is says it all

Where programs run, a call in another mode is captured when it comes, and refused if it needs what is gone. The module's
own Python would simply run. Most forwards differ in nothing but dropout and what batch norms count: these are told by
the ops that both modes run, and need no second graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ecospa_fx.errors import CaptureError
from ecospa_fx.logs import logger
from ecospa_fx.passes.capture.options import CaptureOptions
from ecospa_fx.passes.find.analyse import Analysis, Captures, analyse_once
from ecospa_fx.passes.graph.isolate import isolated, seed
from ecospa_fx.passes.graph.tensors import named_tensors
from ecospa_fx.passes.ir.axis_facts import AxisFacts
from ecospa_fx.passes.ir.region_graph import Call, Forward

from .trial import NotTried, example_calls, modes

_DROPS = {
    F.dropout, F.alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout, torch.dropout,
    torch.dropout_, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout,
}  # fmt: skip
_OF_MODE = _DROPS | {F.batch_norm, F.instance_norm, F.rrelu, torch.rrelu, F.scaled_dot_product_attention}
"""Functions that do the same along every axis in both modes, in other ops."""

_NOISE = {
    getattr(torch.ops.aten, name)
    for names in (
        "empty new_empty empty_like rand rand_like randn randn_like bernoulli bernoulli_ uniform_ normal_",
        "add add_ sub mul mul_ div div_ floor floor_ lt le gt ge",
    )
    for name in names.split()
}
"""Ops that draw, and those that change every entry by itself."""

_COPIES = {torch.ops.aten.clone, torch.ops.aten.alias, torch.ops.aten.detach}
_VIEWS = {torch.ops.aten.view, torch.ops.aten._unsafe_view, torch.ops.aten.reshape, torch.ops.aten._reshape_alias}


def other_mode(
    module: nn.Module,
    axis_facts: AxisFacts,
    forward: Forward,
    name: str,
    outside: Mapping[str, str],
    captures: Captures,
    options: CaptureOptions,
    moving: frozenset[str] = frozenset(),
) -> Analysis | None:
    """Analyse a call in the other mode, if the forward runs other ops in it.

    Args:
        module: the region, at its original sizes; left as it is.
        axis_facts: axes of its graph in one mode.
        forward: its own forward.
        name: its name in the model.
        outside: see `RegionGraph.shared_outside`.
        captures: see `analyse_once`.
        options: of the model's captures.
        moving: see `RegionGraph`.

    Returns:
        None where both modes run the same ops, and where the other cannot be run or captured.
    """
    if any(tensor.is_meta for tensor in named_tensors(module).values()):
        return None
    training = axis_facts.captured.signature.training
    other = [not training[0]] * len(training)
    for call in example_calls(axis_facts):
        try:
            with torch.set_grad_enabled(options.gradients):
                if _alike(_ops(module, forward, call, training), _ops(module, forward, call, other)):
                    return None
            with modes(module, other):
                return analyse_once(
                    module, name, call, outside, captures, forward=forward, moving=moving, options=options
                )
        except NotTried:
            return None
        except CaptureError as error:
            logger("discover").info(
                "%s in %s mode: %s", name or "the model", "eval" if training[0] else "training", error
            )
            return None
        except Exception:  # a call that is made up may be none that the forward takes
            continue
    return None


@dataclass(frozen=True)
class _Op:
    """An op with the sizes of its tensors and its numbers.

    `noise`: it does the same to every entry, and takes nothing but results of this forward: a path dropped at random.
    """

    func: Any
    leaves: list[Any]
    noise: bool


def _alike(mine: list[_Op], theirs: list[_Op]) -> bool:
    """Return whether two modes run the same ops, but for noise in one of them."""
    i = j = 0
    while i < len(mine) or j < len(theirs):
        if i < len(mine) and j < len(theirs) and mine[i] == theirs[j]:
            i, j = i + 1, j + 1
        elif j < len(theirs) and theirs[j].noise:
            j += 1
        elif i < len(mine) and mine[i].noise:
            i += 1
        else:
            return False
    return True


def _ops(module: nn.Module, forward: Forward, call: Call, training: Any) -> list[_Op]:
    """Run a call, and return its ops on floating-point tensors."""
    with isolated(module), modes(module, training):
        seed(0)
        functions = _Functions()
        ops = _Ops(functions, pytree.tree_leaves(call))
        with functions, ops:
            forward(module, *call[0], **call[1])
    return ops.seen


class _Functions(TorchFunctionMode):
    inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _OF_MODE:
            return func(*args, **(kwargs or {}))
        self.inside += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside -= 1


class _Ops(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, functions: _Functions, given: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[_Op] = []
        self._functions = functions
        self._made: dict[int, Any] = {id(leaf): leaf for leaf in given}  # kept, so that no other takes its identity

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = pytree.tree_leaves((args, kwargs))
        packet = getattr(func, "overloadpacket", None)
        noise = packet in _NOISE and all(id(leaf) in self._made for leaf in taken if isinstance(leaf, Tensor))
        result = func(*args, **(kwargs or {}))
        leaves = [*taken, *(results := pytree.tree_leaves(result))]
        if not any(isinstance(x, Tensor) and x.is_floating_point() for x in leaves):
            return result
        self._made.update((id(leaf), leaf) for leaf in results if isinstance(leaf, Tensor))
        if not self._functions.inside and packet not in _COPIES:
            if packet in _VIEWS:  # which of them it is, memory decides
                func, leaves = "view", [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            self.seen.append(_Op(func, [tuple(x.shape) if isinstance(x, Tensor) else x for x in leaves], noise))
        return result
