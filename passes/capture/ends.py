"""Ends: the parameters at the two ends of a model, tables that are looked up and heads whose products are its results.

One dim of an end is an index that a caller knows, an entry per word or per class, and stays whole in any graph. The
other runs through the whole model. So no region, the root included, can do more for an end than remove what runs
through all blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ecospa_fx.passes.graph.tensors import parameters_of

_LOOK_UPS = {nn.functional.embedding, nn.functional.embedding_bag, torch.embedding}


class Ends(TorchFunctionMode):
    """A mode that watches the functions of torch that one forward of a model calls.

    Attributes:
        names: the parameters at its ends, once `leave` has seen the results.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._matrices = {id(p): name for name, p in parameters_of(model) if p.ndim > 1}
        self._made: dict[int, tuple[weakref.ref[Any], list[str]]] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and note the matrices that it takes."""
        result = func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves((args, kwargs))
        used = [self._matrices[id(leaf)] for leaf in leaves if id(leaf) in self._matrices]
        if func in _LOOK_UPS:
            self.names.update(used)
        elif used and isinstance(result, Tensor):
            self._made[id(result)] = weakref.ref(result), used
        return result

    def leave(self, results: Any) -> None:
        """Note the matrices whose products are results of the model."""
        for leaf in pytree.tree_leaves(results, is_leaf=lambda value: isinstance(value, Tensor)):
            made, used = self._made.get(id(leaf), (None, []))
            if made is not None and made() is leaf:
                self.names.update(used)
        self._made.clear()
