"""Live calls: methods of the objects that a call hands in, called by the program instead of traced.

    mark_bodies(graph)   marks the nodes between the edges of a method's call, see `passes.objects.tracker`
    go_live(...)         replaces them by the call, where a program is made

The nodes in between stay in the captured graph: the axes are inferred from them, and they are compared with eager and
with masking. A program calls the method instead, so that counters, growing and fixed memory, sliding windows, beams and
whatever else an object does are its own business, at the sizes of now.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.utils._sympy.functions import FloorDiv, Max

from ecospa_fx.errors import CaptureError, EcoSpaError
from ecospa_fx.passes.axes.algebra import Size, as_size
from ecospa_fx.passes.graph.boundary_op import END, LATE, edge
from ecospa_fx.passes.graph.nodes import tensor_meta
from ecospa_fx.passes.ir.state_access import TENSOR, LiveCall, ObjectPath, StateAccess, Stored

aten = torch.ops.aten
BODY = "ecospa_live"  # in the meta of a node: the number of the call that it belongs to


def edges(graph: fx.Graph, number: int, *, out: bool) -> dict[int, fx.Node]:
    """Return the edges into or out of a call, by position among its leaves."""
    nodes = [node for node in graph.nodes if node.target is edge and node.args[1] == number and node.args[3] is out]
    return {node.args[2]: node for node in nodes}


def mark_bodies(graph: fx.Graph, stored: int, region: str) -> None:
    """Mark the nodes between the edges of each call.

    Args:
        graph: as it was traced.
        stored: number of its last outputs that are tensors held by objects.
        region: name of the region, for messages.

    Raises:
        CaptureError: the region uses a value that a method computed and did not return.
    """
    inside: int | None = None
    for node in graph.nodes:
        if node.target is edge:
            _, number, place, out = node.args
            inside = None if out and (place == END or place >= LATE) else number
            node.meta[BODY] = number
        elif inside is not None:
            node.meta[BODY] = inside
    for node in graph.nodes:
        if node.target is edge or BODY not in node.meta:
            continue
        if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool, torch.SymFloat, int)) and not any(
            tensor_meta(used) and BODY in used.meta for used in node.all_input_nodes
        ):
            continue  # arithmetic on sizes, traced wherever it was first needed
        written = _written(node)
        for user in list(node.users):
            if BODY in user.meta:
                continue
            if written is not None and user.op != "output":
                user.replace_input_with(node, written)  # the memory outlives the call
                continue
            outputs = user.args[0] if user.op == "output" else ()
            if user.op == "output" and node not in outputs[: len(outputs) - stored]:
                continue
            raise CaptureError(
                f"{f'region `{region}`' if region else 'the model'} uses a value ({node.name}) that a method of an "
                "object among its arguments computed and did not return; a program calls that method and gets "
                "only its result"
            )


def _written(node: fx.Node) -> fx.Node | None:
    """Return the input that an in-place op writes into and returns, or None."""
    while isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and node.args:
        node = node.args[0]  # type: ignore[assignment]
        if node.op == "placeholder":
            return node
    return None


def go_live(
    carried: StateAccess,
    graph: fx.Graph,
    new: dict[fx.Node, fx.Node],
    objects: Sequence[fx.Node],
    sizes: Callable[[fx.Node], Sequence[Size]],
) -> None:
    """Replace the traced bodies of methods by calls of them.

    Args:
        carried: the state access of the captured graph.
        graph: a copy of the captured graph, at the sizes of now.
        new: node of the captured graph -> node of the copy; results of methods are those of the calls afterwards.
        objects: the placeholders for the objects.
        sizes: returns the sizes now of the tensor that a node of the captured graph makes.
    """
    before = {node: old for old, node in new.items()}
    calls = set()
    for number, call in enumerate(carried.calls):
        into, out = edges(graph, number, out=False), edges(graph, number, out=True)
        last = next(iter(out.values()))
        end = out.pop(END)
        with graph.inserting_before(last):
            given = [node.args[0] for _, node in sorted(into.items())]
            expected = [sizes(before[node]) for _, node in sorted(out.items())]
            wanted = [[size_node(size, graph, new) for size in shape] for shape in expected]
            live = graph.call_function(
                _calling(call, [[None if isinstance(n, fx.Node) else n for n in shape] for shape in wanted]),
                (objects[call.place.number], *given, *(n for shape in wanted for n in shape if isinstance(n, fx.Node))),
            )
            calls.add(live)
            for i, (_, node) in enumerate(sorted(out.items())):
                item = graph.call_function(operator.getitem, (live, i))
                node.replace_all_uses_with(item)
                new[before[node]] = item
        graph.erase_node(end)
    for node in reversed(graph.nodes):
        if node.op == "output":
            results = node.args[0]
            kept = len(results) - len(carried.stored)
            effects = [results[kept + v.number] for _, v in carried.effects if isinstance(v, Stored)]
            node.args = ((*results[:kept], *effects),)
        elif _is_rest(node, before) and node not in calls:
            graph.erase_node(node)


def _is_rest(node: fx.Node, before: Mapping[fx.Node, fx.Node]) -> bool:
    """Return whether a node of the copy is dead now: traced in the body of a method, or made from one that was."""
    unused = node.op == "call_function" and not node.users
    return unused and (node not in before or BODY in before[node].meta)


def pass_edges(graph: fx.Graph, new: dict[fx.Node, fx.Node]) -> None:
    """Remove the edges of a graph that keeps the traced bodies of its calls.

    Args:
        graph: a copy of the captured graph.
        new: node of the captured graph -> node of the copy; what comes over an edge is the value itself afterwards.
    """
    over = {node: old for old, node in new.items()}
    for node in list(graph.nodes):
        if node.target is edge:
            if node in over:
                new[over[node]] = node.args[0]
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


_ARITHMETIC: dict[type, Callable[..., Any]] = {
    sympy.Add: operator.add, sympy.Mul: operator.mul, sympy.Pow: operator.pow, FloorDiv: operator.floordiv, Max: max,
}  # fmt: skip
SIZE_OPS = frozenset((*_ARITHMETIC.values(), aten.sym_size.int))
"""The functions with which `size_node` computes."""


def size_node(size: Size, graph: fx.Graph, new: Mapping[fx.Node, fx.Node]) -> Any:
    """Return a size as a number, or as a node that computes it from sizes of inputs; -1 where it cannot."""
    value = _size_node(size, graph, new)
    return -1 if value is None else value


def _size_node(size: Size, graph: fx.Graph, new: Mapping[fx.Node, fx.Node]) -> Any:
    if not isinstance(size, sympy.Expr) or isinstance(size, sympy.Integer):
        return int(size)
    if isinstance(size, sympy.Symbol):
        for old, node in new.items():
            if old.op == "placeholder" and isinstance(old.meta.get("val"), Tensor):
                for dim, found in enumerate(old.meta["val"].shape):
                    if as_size(found) == size:
                        return graph.call_function(aten.sym_size.int, (node, dim))
        return None
    above, below = sympy.fraction(size)
    op, args = (operator.floordiv, (above, below)) if below != 1 else (_ARITHMETIC.get(type(size)), size.args)
    parts = [_size_node(part, graph, new) for part in args]
    if op is None or any(part is None for part in parts):
        return None
    total = parts[0]
    for part in parts[1:]:
        total = graph.call_function(op, (total, part))
    return total


def _calling(call: LiveCall, expected: Sequence[Sequence[int | None]]) -> Callable[..., Any]:
    """Generate a function that calls a method of an object and returns the tensors of its result.

    It is generated because it runs once for every token.

    Args:
        call: the call.
        expected: the sizes of these tensors: -1 for any, None for one that is passed at the call, after the tensors.
    """
    scope: dict[str, Any] = {"differs": _differs, "changed": _changed, "call": call}
    tensors = [f"t{i}" for i in range(sum(leaf is TENSOR for leaf in call.leaves))]
    remaining = iter(tensors)

    def text(value: Any) -> str:
        if value is TENSOR:
            return next(remaining)
        if type(value) in (list, tuple):
            inside = "".join(f"{text(item)}, " for item in value)
            return f"[{inside}]" if type(value) is list else f"({inside})"
        if type(value) is dict:
            return "{" + "".join(f"{_held(scope, key)}: {text(item)}, " for key, item in value.items()) + "}"
        return _held(scope, value)

    args, kwargs = pytree.tree_unflatten(list(call.leaves), call.spec)
    given = [text(arg) for arg in args]
    given += [f"{name}={text(value)}" for name, value in kwargs.items()]
    at = "".join(f"[{_held(scope, s.key)}]" if s.entry else f".{s.key}" for s in call.place.path)
    numbers = iter(range(sum(n is None for shape in expected for n in shape)))
    sizes = [[f"n{next(numbers)}" if n is None else n for n in shape] for shape in expected]
    names = [f"n{i}" for i in range(sum(n is None for shape in expected for n in shape))]
    body = [f"result = held{at}.{call.method}({', '.join(given)})"]
    plain = call.out_spec == pytree.tree_structure(tuple(call.out_leaves)) and all(x is TENSOR for x in call.out_leaves)
    if call.out_leaves == (TENSOR,) and call.out_spec == pytree.tree_structure(TENSOR):
        body.append("result = (result,)")
    elif not plain:
        scope["tensors_of"] = _result_tensors
        body.append("result = tensors_of(call, result)")
    for place in call.late:
        scope[found := f"place_{len(scope)}"] = ObjectPath(0, place.path)
        body.append(f"result = (*result, {found}.find((held,)))")
    for i, shape in enumerate(sizes):
        checks = [f"result[{i}].size({dim}) != {size}" for dim, size in enumerate(shape) if size != -1]
        if checks:
            body.append(f"if {' or '.join(checks)}: differs(call, {i}, result[{i}], ({', '.join(map(str, shape))},))")
    for place, value in call.after.items():
        scope[found := f"place_{len(scope)}"] = ObjectPath(0, place.path)
        body.append(f"if {found}.find((held,)) != {_held(scope, value)}: changed({found}, {_held(scope, value)})")
    body.append("return result")
    newline = "\n    "
    exec(f"def {call.method}({', '.join(['held', *tensors, *names])}):{newline}{newline.join(body)}\n", scope)
    function: Callable[..., Any] = scope[call.method]
    return function


def _held(scope: dict[str, Any], value: Any) -> str:
    if value is None or type(value) in (bool, int, str):
        return repr(value)
    scope[name := f"held_{len(scope)}"] = value
    return name


def _result_tensors(call: LiveCall, result: Any) -> tuple[Tensor, ...]:
    """Return the tensors in the result of a method, where that is not just a tuple of tensors."""
    leaves, spec = pytree.tree_flatten(result)
    constants = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    if spec != call.out_spec or constants != [leaf for leaf in call.out_leaves if leaf is not TENSOR]:
        raise EcoSpaError(
            f"`{call.method}` returned another structure or other constants than when it was captured: the object's "
            "contents match no graph. Start with an empty one"
        )
    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def _changed(place: ObjectPath, expected: Any) -> None:
    raise EcoSpaError(
        f"`{place}` of an object is not {expected!r} after a method that made it so when it was captured: the object's "
        "contents match no graph. Start with an empty one"
    )


def _differs(call: LiveCall, number: int, found: Tensor, expected: tuple[int, ...]) -> None:
    sizes = tuple(size if wanted == -1 else wanted for size, wanted in zip(found.shape, expected, strict=True))
    raise EcoSpaError(
        f"result {number} of `{call.method}` has sizes {tuple(found.shape)}, where {sizes} were expected: the "
        "object's contents match no graph. Start with an empty one"
    )
