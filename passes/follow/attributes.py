"""Attributes: integers that modules hold beside their weights, and that may be sizes of these.

A forward views by `self.num_heads` and splits by `self.split_size`. If its weights shrink and it goes on running, such
integers must follow. Those of torch.nn layers are known (`sizes_of_layer`); all others are among the integers that a
forward reads (`held_integers`), and their meaning is found by trial (`passes/follow/follow.py`), never by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ecospa_fx.passes.capture.reads import AttributeReads
from ecospa_fx.passes.graph.isolate import weight_of
from ecospa_fx.passes.graph.python_state import OWN
from ecospa_fx.passes.graph.stand_in_class import quiet_subclass
from ecospa_fx.passes.graph.tensors import parameters_of


@dataclass(frozen=True, order=True)
class Attribute:
    """An integer that a module holds.

    Attributes:
        module: path of the module in the region or the model.
        name: of the instance attribute.
        inside: where the attribute is not the integer itself: its position in a tuple or list, or the field of an
            object (a configuration).
    """

    module: str
    name: str
    inside: int | str | None = None

    def __str__(self) -> str:
        path = ".".join(filter(None, (self.module, self.name)))
        if self.inside is None:
            return path
        return f"{path}[{self.inside}]" if type(self.inside) is int else f"{path}.{self.inside}"

    def within(self, region: str) -> Attribute:
        """Return the attribute of a region as one of the model."""
        return replace(self, module=".".join(filter(None, (region, self.module))))

    def read(self, root: nn.Module) -> Any:
        """Return the value now.

        Raises:
            AttributeError: there is no such attribute.
        """
        try:
            value = root.get_submodule(self.module).__dict__[self.name]
            if self.inside is None:
                return value
            return value[self.inside] if type(self.inside) is int else getattr(value, str(self.inside))
        except (KeyError, IndexError, TypeError) as error:
            raise AttributeError(f"there is no {self}") from error

    def write(self, root: nn.Module, value: Any) -> None:
        """Set another integer. An object that others may hold too is not written into: the module gets its own."""
        module = root.get_submodule(self.module)
        if self.inside is None:
            module.__dict__[self.name] = value
            return
        container = module.__dict__[self.name]
        if type(self.inside) is int:
            items = list(container)
            items[self.inside] = value
            module.__dict__[self.name] = type(container)(items)
        else:
            module.__dict__[self.name] = with_field(container, str(self.inside), value)


Value = int | tuple[int, ...]  # an integer; of a `Given`, positions
Values = Mapping[Attribute, Value]
Changes = dict[Attribute, tuple[Value, Value]]  # attribute -> its value before any shrink, and its value now


def numbers_in(model: nn.Module) -> frozenset[tuple[type, str]]:
    """Find the attributes, as (class, name), that differ between modules with weights of equal shapes: layer numbers.

    They are not sizes of those weights, whatever they happen to equal.
    """
    seen: dict[tuple[Any, ...], int] = {}
    numbers = set()
    for module in model.modules():
        shapes = tuple((name, p.shape) for name, p in parameters_of(module))
        for name, value in module.__dict__.items():
            key = (type(module), name)
            if type(value) is int and seen.setdefault((*key, shapes), value) != value:
                numbers.add(key)
    return frozenset(numbers)


def held_integers(
    root: nn.Module, reads: AttributeReads, numbers: Set[tuple[type, str]] = frozenset()
) -> dict[Attribute, int]:
    """Return the integers above 1 that a forward read, itself or in a tuple, list or object that it read.

    Args:
        root: the module that the paths in `reads` start from.
        reads: the attributes that were read.
        numbers: attributes that are not sizes, see `numbers_in`.
    """
    integers: dict[Attribute, int] = {}
    modules = dict(root.named_modules())
    for path, names in reads.items():
        of_layer = sizes_of_layer(modules[path]) if path in modules else {}
        for name in sorted(names - OWN - of_layer.keys()):
            if path not in modules or (type(modules[path]), name) in numbers or isinstance(modules[path], nn.Linear):
                continue  # the sizes of an nn.Linear are read off its weight, see `ShrinkableLinear`
            if name in modules[path].__dict__:
                for inside, value in _integers(modules[path].__dict__[name]):
                    integers[Attribute(path, name, inside)] = value
    return integers


def _integers(value: Any) -> Iterator[tuple[int | str | None, int]]:
    if type(value) is int:
        if value > 1:
            yield None, value
    elif type(value) in (tuple, list):
        yield from ((i, item) for i, item in enumerate(value) if type(item) is int and item > 1)
    elif type(value).__new__ is object.__new__ and not isinstance(value, (Tensor, nn.Module)):  # type: ignore[comparison-overlap]
        fields = getattr(value, "__dict__", {})
        yield from ((name, item) for name, item in fields.items() if type(item) is int and item > 1 and name[:1] != "_")


@contextmanager
def holding(root: nn.Module, values: Values) -> Iterator[None]:
    """Let attributes hold other values for the time inside; afterwards they hold the same objects as before."""
    before = _held_before(root, values)
    try:
        for attribute, value in values.items():
            attribute.write(root, value)
        yield
    finally:
        _put_back(before)


@contextmanager
def assigned(root: nn.Module, values: Values) -> Iterator[None]:
    """Make attributes hold other values; put the old ones back if the body fails."""
    before = _held_before(root, values)
    try:
        for attribute, value in values.items():
            if attribute.read(root) != value:
                attribute.write(root, value)
        yield
    except BaseException:
        _put_back(before)
        raise


_MISSING = object()
_Before = list[tuple[nn.Module, type, str, Any]]  # a module, its class, an attribute, what that held


def _held_before(root: nn.Module, values: Values) -> _Before:
    places = {(a.module, a.name): root.get_submodule(a.module) for a in values}
    return [(m, type(m), name, m.__dict__.get(name, _MISSING)) for (_, name), m in places.items()]


def _put_back(before: _Before) -> None:
    for module, cls, name, held in before:
        if type(module) is not cls:
            module.__class__ = cls
        if held is _MISSING:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = held


def with_field(original: Any, field: str, value: int) -> Any:
    """Return a view of `original` that shares its fields, also when they change, except for one.

    A configuration is one object that all layers hold. A layer that has shrunk needs a number of heads of its own, but
    must still see other fields that are set later (the attention implementation, for example).
    """
    cls, fields = type(original), {field: value}
    if (overridden := cls.__dict__.get("_ecospa_fields")) is not None:
        original, fields = overridden[0], {**overridden[1], **fields}
        cls = type(original)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        return _with_fields, (original, fields)

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        return _with_fields(copy.deepcopy(original, memo), fields)

    body: dict[str, Any] = {name: property(partial(_held, value=held)) for name, held in fields.items()}
    body |= {"__reduce_ex__": reduce_ex, "__deepcopy__": deepcopy, "_ecospa_fields": (original, fields)}
    view: Any = object.__new__(quiet_subclass(cls, body))
    object.__setattr__(view, "__dict__", original.__dict__)
    return view


def _held(_: Any, value: int) -> int:
    return value


def _with_fields(original: Any, fields: Mapping[str, int]) -> Any:
    for field, value in fields.items():
        original = with_field(original, field, value)
    return original


_WEIGHTED = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.Embedding,
    nn.EmbeddingBag, nn.PReLU,
)  # fmt: skip


def sizes_of_layer(module: nn.Module) -> dict[str, Any]:
    """Return the attributes in which a torch.nn layer keeps the sizes of its weights, with these sizes now."""
    weight: Any = weight_of(module) if isinstance(module, _WEIGHTED) else None
    match module:
        case nn.modules.conv._ConvTransposeNd():
            return {"in_channels": weight.shape[0], "out_channels": weight.shape[1] * module.groups}
        case nn.modules.conv._ConvNd():
            if module.groups > 1 and module.groups == module.in_channels:  # depthwise: a group per channel
                out_in_group = module.out_channels // module.groups
                groups = weight.shape[0] // out_in_group
                return {"groups": groups, "in_channels": groups, "out_channels": weight.shape[0]}
            return {"in_channels": weight.shape[1] * module.groups, "out_channels": weight.shape[0]}
        case nn.modules.batchnorm._NormBase():
            held = weight if weight is not None else module.running_mean
            return {} if held is None else {"num_features": held.shape[0]}
        case nn.GroupNorm() if weight is not None:
            return {"num_channels": weight.shape[0]}
        case nn.LayerNorm() | nn.RMSNorm() if weight is not None:
            return {"normalized_shape": tuple(weight.shape)}
        case nn.Embedding() | nn.EmbeddingBag():
            return {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
        case nn.RNNBase():
            inputs, values = (module.get_parameter(name).shape[1] for name in ("weight_ih_l0", "weight_hh_l0"))
            if module.proj_size == 0:
                return {"input_size": inputs, "hidden_size": values}
            units = module.get_parameter("weight_hr_l0").shape[1]
            return {"input_size": inputs, "hidden_size": units, "proj_size": values}
        case nn.RNNCellBase():
            inputs, units = (module.get_parameter(name).shape[1] for name in ("weight_ih", "weight_hh"))
            return {"input_size": inputs, "hidden_size": units}
        case nn.PReLU():
            return {"num_parameters": weight.shape[0]}
    return {}


Fitted = list[tuple[nn.Module, str, Any]]  # a layer, an attribute of it, its value before


def sync_layer_sizes(model: nn.Module) -> Fitted:
    """Set the size attributes of every torch.nn layer to the sizes of its weights; return the values before."""
    before: Fitted = []
    for child in model.modules():
        for attribute, size in sizes_of_layer(child).items():
            if getattr(child, attribute) != size:
                before.append((child, attribute, getattr(child, attribute)))
                setattr(child, attribute, size)
    return before


def restore_layer_sizes(before: Iterable[tuple[nn.Module, str, Any]]) -> None:
    """Undo `sync_layer_sizes`."""
    for child, attribute, size in before:
        setattr(child, attribute, size)


@contextmanager
def fitted(model: nn.Module) -> Iterator[None]:
    """Sync the size attributes of torch.nn layers with their weights for the time inside."""
    before = sync_layer_sizes(model)
    try:
        yield
    finally:
        restore_layer_sizes(before)
