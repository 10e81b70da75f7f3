"""Boundary op: a mark in a traced graph where a tensor enters or leaves a method of an object.

    edge(x, call, place, out) -> x

`call` numbers the method calls, `place` the leaves of their arguments or results.
"""

from __future__ import annotations

from typing import Any

import torch

if not hasattr(torch.ops.ecospa_fx, "edge"):  # torch keeps the definition alive, also where this file is loaded again
    torch.library.define("ecospa_fx::edge", "(Tensor x, int call, int place, bool out) -> Tensor")
    torch.library.impl("ecospa_fx::edge", "CompositeImplicitAutograd", lambda x, call, place, out: x.clone())

edge: Any = torch.ops.ecospa_fx.edge.default
torch.fx.node.has_side_effect(edge)  # a mark without users is an argument nevertheless

LATE = 1 << 20  # places from here on number the tensors that are read from an object after a method has returned
END = -1  # the place that marks the return of a method, in case it returns no tensor
