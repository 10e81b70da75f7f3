"""Sandbox: an execution of a file that shares nothing with another, and comparison of all that two of them hold."""

from __future__ import annotations

import collections
import dataclasses
import linecache
import operator
import random
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ecospa_fx.model.class_swap import ShrinkableLinear, original_class

from .twins import Remains

TOLERANCE = 1e-9  # in float64, of the largest entry
WORLDS = "plain_program", "compiled_program"
_SIZES = ("in_features", "out_features", "num_features")  # of layers, which may or may not follow a shrink
_OURS = "_ecospa"
_MODULE = frozenset(nn.Module().__dict__) - {"training"}


class Differs(Exception):
    """A difference between two worlds: its place, and both values."""


@dataclass
class Generators:
    """The states of the generators of torch, Python and numpy."""

    states: tuple[Any, Any, Any]

    @classmethod
    def now(cls) -> Generators:
        """Read all of them."""
        return cls((torch.get_rng_state(), random.getstate(), np.random.get_state()))  # noqa: NPY002

    @classmethod
    def seeded(cls, seed: int) -> Generators:
        """Seed all of them."""
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        return cls.now()

    def put_back(self) -> None:
        """Set all of them to these states."""
        torch.set_rng_state(self.states[0])
        random.setstate(self.states[1])
        np.random.set_state(self.states[2])  # noqa: NPY002

    def check(self, what: str) -> None:
        """Compare with what they are now.

        Raises:
            Differs: one of them has drawn more, or less.
        """
        now = Generators.now().states
        if not torch.equal(self.states[0], now[0]):
            raise Differs(f"{what}: torch's generator")
        if self.states[1] != now[1]:
            raise Differs(f"{what}: Python's generator")
        if self.states[2][2] != now[2][2] or not np.array_equal(self.states[2][1], now[2][1]):
            raise Differs(f"{what}: numpy's generator")


class Sandbox:
    """One execution of a file: its module, a `model` of it, and an optimizer."""

    def __init__(self, source: str, name: str) -> None:
        self.name = name
        self.module = types.ModuleType(name)
        self.module.__file__ = filename = f"{name}.py"
        # Its lines can be read, as those of any file; and pickle finds its classes.
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        sys.modules[name] = self.module
        exec(compile(source, filename, "exec"), self.module.__dict__)
        self.model = self.made()
        self.optimizer = optimizer_of(self.model)
        self.memory: dict[str, Any] = {}  # what the loop has kept

    def made(self) -> nn.Module:
        """Make a model, the same at each call."""
        before = Generators.now()
        Generators.seeded(0)
        try:
            model: nn.Module = self.module.Model().double()
        finally:
            before.put_back()
        return model

    def file_state(self) -> dict[str, Any]:
        """Return what the globals and the attributes of classes hold."""
        state = {name: value for name, value in self.module.__dict__.items() if name.isupper() and name != "F"}
        for cls in (self.module.Block, self.module.Model):
            state |= {f"{cls.__name__}.{name}": v for name, v in vars(cls).items() if name[:1].isupper()}
        return state


def optimizer_of(model: nn.Module) -> Optimizer:
    """Make the optimizer of a loop."""
    return SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


Frozen = Mapping[str, Any]


def everything(world: Sandbox) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of all that a world holds, down to tensors, numbers and texts."""
    seen: set[int] = set()
    for path, module in world.model.named_modules():
        yield f"{path}: class", _class_name(module)
        for kind in ("parameter", "buffer"):
            held = module._parameters if kind == "parameter" else module._buffers
            for name, tensor in held.items():
                yield f"{kind} {path}.{name}", tensor
                if kind == "parameter" and isinstance(tensor, Tensor):
                    yield f"gradient {path}.{name}", tensor.grad
        yield f"{path}: buffers that are not saved", sorted(module._non_persistent_buffers_set)
        for name, value in module.__dict__.items():
            if name not in _MODULE and not name.startswith(_OURS) and name not in _SIZES:
                yield from _inside(f"attribute {path}.{name}", value, seen)
    for name, value in world.file_state().items():
        yield from _inside(f"global {name}", value, seen)
    for name, value in world.memory.items():
        yield from _inside(f"memory {name}", value, seen)
    named = {id(p): name for name, p in world.model.named_parameters()}
    for parameter, state in world.optimizer.state.items():
        for name, value in state.items():
            yield f"optimizer {named.get(id(parameter), 'of nothing')}.{name}", value


def _class_name(module: nn.Module) -> str:
    cls = original_class(module)
    return nn.Linear.__name__ if cls is ShrinkableLinear else cls.__name__


def _inside(place: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple, collections.deque)):
        yield f"{place} ({type(value).__name__})", len(value)
        for i, each in enumerate(value):
            yield from _inside(f"{place}[{i}]", each, seen)
    elif isinstance(value, dict):
        yield f"{place} (keys)", list(map(str, value))
        for key, each in value.items():
            yield from _inside(f"{place}[{key!r}]", each, seen)
    elif isinstance(value, types.SimpleNamespace) or dataclasses.is_dataclass(value):
        if id(value) not in seen:
            seen.add(id(value))
            yield from _inside(f"{place}.", vars(value), seen)
    elif isinstance(value, nn.Module):
        yield place, f"the module {_class_name(value)}"
    elif isinstance(value, torch.Generator):
        yield place, value.get_state()
    elif isinstance(value, random.Random):
        yield place, value.getstate()
    elif isinstance(value, np.random.Generator):
        yield place, str(value.bit_generator.state)
    elif isinstance(value, type(iter(()))):
        yield place, f"{operator.length_hint(value)} left"
    elif isinstance(value, types.FunctionType):
        yield place, f"the function {value.__name__}"
        if value.__module__ in WORLDS:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            for held in (vars(value), value.__defaults__, cells):
                yield from _inside(f"{place}()", held, seen)
    elif callable(value):
        yield place, f"the function {getattr(value, '__name__', value)}"
    else:
        yield place, value


def frozen(world: Sandbox) -> dict[str, Any]:
    """Copy all that a world holds."""
    return {
        place: value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value.copy()
        if isinstance(value, np.ndarray)
        else value
        for place, value in everything(world)
    }


def check_same(expected: Mapping[str, Any], found: Mapping[str, Any], what: str, cut: Remains | None = None) -> None:
    """Compare all that two worlds hold.

    Args:
        expected: what the plain one holds, from `everything`.
        found: what the other holds.
        what: the step, for the message.
        cut: what has been removed from the other.

    Raises:
        Differs: a value differs, or is missing.
    """
    for place in [*expected, *(place for place in found if place not in expected)]:
        if place not in found:
            raise Differs(f"{what}: {place} is missing, expected {_short(expected[place])}")
        if place not in expected:
            raise Differs(f"{what}: {place} is {_short(found[place])}, expected nothing")
        name = place.split(" ")[-1]
        name = name.rpartition(".")[0] if place.startswith("optimizer") else name
        check_value(expected[place], found[place], f"{what}: {place}", name, cut)


def check_value(a: Any, b: Any, where: str, name: str = "", cut: Remains | None = None) -> None:
    """Compare two values, tensors up to rounding.

    Raises:
        Differs: they differ.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        candidates = [a.detach()] if cut is None or a.shape == b.shape else cut.sliced(a.detach(), name, b.shape)
        for fact in ("dtype", "requires_grad"):
            if getattr(a, fact) != getattr(b, fact):
                raise Differs(f"{where} has {fact} {getattr(b, fact)}, expected {getattr(a, fact)}")
        if not any(each.shape == b.shape and _close(each, b.detach()) for each in candidates):
            raise Differs(f"{where} is {_short(b)}, expected {_short(candidates[0])}")
    elif isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if not np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE):
            raise Differs(f"{where} is {b}, expected {a}")
    elif type(a) is not type(b):
        raise Differs(f"{where} is {_short(b)}, expected {_short(a)}")
    elif isinstance(a, float):
        if not abs(a - b) <= TOLERANCE * max(1.0, abs(a)) and a == a:
            raise Differs(f"{where} is {b}, expected {a}")
    elif a != b:
        raise Differs(f"{where} is {b}, expected {a}")


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=0.0, atol=TOLERANCE * max(1.0, float(a.abs().max())), equal_nan=True)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        numbers = ", ".join(f"{x:.6g}" for x in value.detach().flatten()[:4].tolist())
        return f"a tensor {tuple(value.shape)} of {numbers}{', ...' if value.numel() > 4 else ''}"
    return f"{type(value).__name__} {value!r}"[:80]
