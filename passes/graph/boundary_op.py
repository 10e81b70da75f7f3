"""Edge: marks in a traced graph where a tensor goes into a method of an object, or comes out of it.

    edge(x, call, place, out) -> x

`call` numbers the calls of methods, `place` the leaves of their arguments or results.
"""

from __future__ import annotations

from typing import Any

import torch

_library = torch.library.Library("ecospa_fx", "FRAGMENT")
_library.define("edge(Tensor x, int call, int place, bool out) -> Tensor")
_library.impl("edge", lambda x, call, place, out: x.clone(), "CompositeImplicitAutograd")

edge: Any = torch.ops.ecospa_fx.edge.default
torch.fx.node.has_side_effect(edge)  # one that nothing uses is an argument nevertheless

LATE = 1 << 20  # places from here on are of what is read of an object when a method has returned
END = -1  # the place that says where a method has returned, in case it returns no tensor
