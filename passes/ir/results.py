"""Results: the tree of what a forward returns, in which a dataclass that it has made is a node like a tuple.

    flattened_results(value, given)   leaves and tree; unflattening makes instances of the same classes
    kept_elsewhere(value, given)      the first dataclass among them that something else holds too, if there is one

torch's pytrees take such an instance for a leaf, and registering its class would change what all other code sees. One
that the forward was given, or that it keeps, stays a leaf: a call returns that very object, and not another like it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from types import FrameType, MemberDescriptorType
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from .state_access import foreign

Given = Callable[[Any], bool]


@dataclass
class Made:
    """A dataclass in a tree: its class, and its attributes by name."""

    cls: type
    values: dict[str, Any]


def flattened_results(value: Any, given: Given = lambda _: False) -> tuple[list[Any], pytree.TreeSpec]:
    """Return the leaves of results, and their tree.

    Args:
        value: the results.
        given: whether an object is one of those that the forward was called with.
    """
    return pytree.tree_flatten(_with_nodes(value, given, set()), is_leaf=foreign)


def kept_elsewhere(value: Any, given: Given) -> Any:
    """Return a dataclass among results that something other than these holds too: an attribute, a list, a closure.

    A graph would return others like it. None where there is none.
    """
    inside: list[Any] = []
    records = [each for each in _every(value, inside) if is_dataclass(each) and not given(each)]
    own = {id(each) for each in (records, inside, *inside)} | {id(vars(each)) for each in inside if _has_dict(each)}
    for record in records:
        others = gc.get_referrers(record)
        if any(id(other) not in own and not isinstance(other, FrameType) for other in others):
            return record
    return None


def _with_nodes(value: Any, given: Given, seen: set[int]) -> Any:
    leaves, spec = pytree.tree_flatten(value, is_leaf=foreign)
    records = [leaf for leaf in leaves if _is_record(leaf) and not given(leaf)]
    if not records:
        return value
    nodes = []
    for leaf in leaves:
        if any(leaf is record for record in records) and id(leaf) not in seen:
            seen.add(id(leaf))  # one that occurs twice stays a leaf: two would be made of it
            leaf = Made(type(leaf), {name: _with_nodes(v, given, seen) for name, v in _attributes(leaf).items()})
        nodes.append(leaf)
    return pytree.tree_unflatten(nodes, spec)


def _every(value: Any, inside: list[Any]) -> Iterator[Any]:
    """Yield the leaves of results and of the dataclasses among them; collect all that holds them in `inside`."""

    def is_leaf(node: Any) -> bool:
        if not isinstance(node, Tensor):
            inside.append(node)
        return foreign(node)

    for leaf in pytree.tree_leaves(value, is_leaf=is_leaf):
        yield leaf
        if _is_record(leaf):
            for held in _attributes(leaf).values():
                yield from _every(held, inside)


def _is_record(value: Any) -> bool:
    """Return whether a value is an instance of a class that is declared a dataclass, and nothing more than its data."""
    cls: Any = type(value)
    plain = cls.__new__ is object.__new__ and "__dataclass_fields__" in vars(cls)
    return (
        plain
        and not isinstance(value, (Tensor, nn.Module, tuple, list, dict, set))
        and cls not in pytree.SUPPORTED_NODES
    )


def _has_dict(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, type)


def _attributes(record: Any) -> dict[str, Any]:
    own = dict(vars(record)) if _has_dict(record) else {}
    slots = (
        name for cls in type(record).__mro__ for name, value in vars(cls).items() if type(value) is MemberDescriptorType
    )
    return own | {name: getattr(record, name) for name in slots if hasattr(record, name)}


def _parts(node: Made) -> tuple[list[Any], Any]:
    return list(node.values.values()), (node.cls, tuple(node.values))


def _put_together(values: Any, context: Any) -> Any:
    cls, names = context
    made = object.__new__(cls)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)  # frozen ones, too
    return made


pytree.register_pytree_node(Made, _parts, _put_together)
