"""Nodes: queries on FX nodes, about their outputs, arguments, source lines and memory."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx


def tensor_meta(node: fx.Node) -> tuple[Tensor, ...]:
    """Return the fake tensors that stand for the outputs of `node`; empty unless all of them are tensors."""
    val = node.meta.get("val")
    if isinstance(val, Tensor):
        return (val,)
    if isinstance(val, (tuple, list)) and val and all(isinstance(item, Tensor) for item in val):
        return tuple(val)
    return ()


def is_complex(node: fx.Node) -> bool:
    """Return whether an output of `node` holds complex numbers."""
    return any(each.is_complex() for each in tensor_meta(node))


def is_tensor(node: fx.Node) -> bool:
    """Return True if `node` makes one tensor, not several and not a number."""
    return isinstance(node.meta.get("val"), Tensor)


def op_name(node: fx.Node) -> str:
    """Return the short name of the op of `node`, as a user would write it: `aten.softmax`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}.{node.target._opname}"
    return getattr(node.target, "__name__", str(node.target))


def place(node: fx.Node, region: str = "") -> str:
    """Return the origin of `node`: module path in the model and, where known, file and line."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    inside = paths[-1].removeprefix("region").lstrip(".") if paths else ""
    line = file_and_line(node.meta.get("stack_trace") or "")
    module = ".".join(part for part in (region, inside) if part)
    return ", ".join(part for part in (module, line) if part) or node.name


def file_and_line(trace: str) -> str:
    """Return the innermost place in a stack trace as `file:line`; empty where there is none."""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File")]
    if not frames:
        return ""
    file, number = frames[-1].split('"')[1].rsplit("/", 1)[-1], frames[-1].split("line ")[1].split(",")[0]
    return f"{file}:{number}"


def source_line(node: fx.Node) -> str:
    """Return the line of code that `node` comes from; empty where it is not known."""
    trace = (node.meta.get("stack_trace") or "").splitlines()
    frames = [i for i, line in enumerate(trace) if line.strip().startswith("File")]
    return trace[frames[-1] + 1].strip() if frames and frames[-1] + 1 < len(trace) else ""


def reason_text(reason: str, node: fx.Node, region: str = "") -> str:
    """Return a reason to pin an axis with the place of its op; the output of a region has no place."""
    return reason if node.op == "output" else f"{reason} ({place(node, region)})"


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return the positional arguments of `node`, typed as Any: their types are those that its op takes."""
    return node.args


def argument_nodes(node: fx.Node) -> list[fx.Node]:
    """Return the nodes among the arguments of `node`, in order, repeated where they repeat."""
    nodes: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), nodes.append)
    return nodes


def tensors_of(node: fx.Node) -> list[fx.Node]:
    """Return the arguments of `node` that are one tensor each."""
    return [arg for arg in argument_nodes(node) if is_tensor(arg)]


def written_arguments(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the arguments whose memory `node` writes to."""
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        named = [(argument, node.kwargs[argument.name]) for argument in schema if argument.name in node.kwargs]
        for argument, value in (*zip(schema, node.args, strict=False), *named):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
                yield value


def by_name(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, defaults: bool = False) -> dict[str, Any]:
    """Return the arguments of an op by their names in its schema, with those that are not given if `defaults`."""
    schema = op._schema.arguments
    left_out = {argument.name: argument.default_value for argument in schema} if defaults else {}
    return left_out | dict(kwargs) | {argument.name: value for argument, value in zip(schema, args, strict=False)}


def may_draw(op: Any) -> bool:
    """Decide whether an op draws from a random generator, at least with some of its arguments."""
    return isinstance(op, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in op.tags


def memory_behind(node: fx.Node) -> Iterator[fx.Node]:
    """Yield `node` and the nodes that it is a view of, back to the one that made the memory, if an op did."""
    while node.op == "call_function":
        yield node
        if not _shares_memory(node):
            break
        node = arguments(node)[0]


def memory_root(node: fx.Node) -> fx.Node:
    """Return the node whose memory `node` is a view of: an op that made it, or a tensor that came in."""
    while node.op == "call_function" and _shares_memory(node):
        node = arguments(node)[0]
    return node


def _shares_memory(node: fx.Node) -> bool:
    """Return True if the result of `node` may share the memory of its first argument, by the schema of any op."""
    if node.target is operator.getitem:
        return True
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    shared = any(result.alias_info is not None for result in returns)
    return shared and bool(node.args) and isinstance(node.args[0], fx.Node)
