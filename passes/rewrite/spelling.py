"""Spelling: the quickest way to call an op from Python.

Most ops of `aten` have a function or a method of the same name that torch generates from the same schema, so that its
arguments are the same in the same order. Calling it skips the look-up and boxing that `torch.ops.aten.add.Tensor(x, y)`
pays for. Torch itself tells which ops have one: functions that are written by hand, in Python or over several ops, are
not among the generated ones, and are not used.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Literal, TypeAlias

import torch

from ecospa_fx.passes.rules import op_info

Spelling: TypeAlias = tuple[Literal["torch", "nn", "method"], str]


def spelling(op: Any) -> Spelling | None:
    """Return the quickest way to call an op: `torch.add`, `torch._C._nn.gelu`, `x.expand`; None: the op itself."""
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten":
        return None
    info = op_info(op)  # asked each time: rules come and go
    if info is None or info.refused:
        return None  # only of ops with a rule do tests compare the two ways to call them
    return _generated(op)


@functools.cache
def _generated(op: torch._ops.OpOverload) -> Spelling | None:
    """Return the function or method that torch generates for an op, with the same arguments."""
    arguments = op._schema.arguments
    if not arguments or "Tensor" not in str(arguments[0].type):
        return None  # it makes a tensor from sizes alone; torch's function for it is written by hand
    if any(argument.name == "reduction" for argument in arguments):
        return None  # torch's functions do not read the default of the schema, `Mean`, and reduce nothing
    if any(str(argument.type) == "List[Optional[Tensor]]" for argument in arguments):
        return None  # Python writes such an index as `x[:, i]`, and takes no list with None in it
    name = op._opname
    generated = getattr(torch._C._VariableFunctions, name, None)
    if generated is not None and getattr(torch, name, None) is generated:
        return "torch", name
    if generated is None and hasattr(torch._C._nn, name):
        return "nn", name
    method = getattr(torch._C.TensorBase, name, None)  # some are properties, `x.mT`
    if arguments[0].name == "self" and inspect.ismethoddescriptor(method) and getattr(torch.Tensor, name) is method:
        return "method", name
    return None
