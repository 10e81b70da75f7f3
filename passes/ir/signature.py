"""Signature: the form that a call of a region must have for a captured graph to serve it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ecospa_fx.passes.axes.algebra import Size

from .size_guards import SizeGuards
from .state_access import TENSOR, ObjectLeaf, foreign

AUTOCAST = ("cpu", "cuda")  # device types whose autocast state is part of a signature

Autocast = tuple[torch.dtype | None, ...]


@dataclass(frozen=True, eq=False)
class Signature:
    """The form that a call must have for a captured graph to serve it.

    Attributes:
        spec: tree of the arguments.
        leaves: the leaves of that tree: `TENSOR` where there is a tensor, else the value itself.
        tensors: (dtype, device, sizes) of each tensor; a size that was specialised is an int.
        training: the training flag of each module of the region.
        ranges: least and largest size of each dynamic dim.
        autocast: the dtypes that autocast casts to, under which the graph has been compared with eager.
        guards: what the forward asked about the dynamic sizes.
        weights: parameter or buffer -> its dtype, which the forward may read, and by which its results get theirs.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    tensors: tuple[tuple[torch.dtype, torch.device, tuple[Size, ...]], ...]
    training: tuple[bool, ...]
    ranges: Mapping[sympy.Symbol, tuple[float, float]]
    autocast: Autocast
    guards: SizeGuards = field(default_factory=SizeGuards)
    weights: Mapping[str, torch.dtype] = field(default_factory=dict)

    def mismatch(
        self,
        spec: pytree.TreeSpec,
        leaves: Sequence[Any],
        training: tuple[bool, ...],
        state: Sequence[Tensor] = (),
        sizes: Sequence[tuple[Size, ...]] | None = None,
    ) -> str | None:
        """Say why a call does not fit; None where it does.

        Args:
            spec: tree of its arguments.
            leaves: of that tree.
            training: see `training_flags`.
            state: tensors in objects among the leaves; they follow those of the call.
            sizes: of all tensors, where some have changed since the call was captured.
        """
        if training != self.training:
            return "train and eval mode differ"
        if autocast_now() != self.autocast:
            return "autocast is another"
        if spec != self.spec:
            return "the arguments are structured differently"
        for mine, given in zip(self.leaves, leaves, strict=True):
            if isinstance(given, Tensor) != (mine is TENSOR):
                return "a tensor argument became a constant or the reverse"
            if mine is not TENSOR and not _same_constant(mine, given):
                return f"the constant argument {given!r} was {mine!r}"
        return self._sizes_differ([*(leaf for leaf in leaves if isinstance(leaf, Tensor)), *state], self.now(sizes))

    def other_weights(self, region: nn.Module) -> Iterator[tuple[str, Tensor, torch.dtype]]:
        """Yield the parameters and buffers of a live region that have another dtype than they had, and that dtype."""
        for name, dtype in self.weights.items():
            *path, key = name.split(".")
            owner: nn.Module | None = region
            for step in path:
                owner = owner._modules.get(step) if owner is not None else None
            if owner is None:
                continue  # a module has been wrapped since
            held = owner._parameters.get(key) if key in owner._parameters else owner._buffers.get(key)
            if held is not None and held.dtype != dtype:
                yield name, held, dtype

    def other_weight(self, region: nn.Module) -> str | None:
        """Say which parameter or buffer of a live region has another dtype than it had; None where none has."""
        for name, held, dtype in self.other_weights(region):
            return f"`{name}` is {held.dtype}, was {dtype}"
        return None

    def now(self, sizes: Sequence[tuple[Size, ...]] | None = None) -> list[tuple[torch.dtype, torch.device, Any]]:
        """Return `tensors` with other sizes."""
        if not sizes:
            return list(self.tensors)
        return [(dtype, device, now) for (dtype, device, _), now in zip(self.tensors, sizes, strict=True)]

    def _sizes_differ(self, tensors: Sequence[Tensor], wanted: Sequence[tuple[Any, Any, Any]]) -> str | None:
        sizes: dict[Any, int] = {}
        for given, (dtype, device, shape) in zip(tensors, wanted, strict=True):
            if given.dtype != dtype or given.device != device or given.ndim != len(shape):
                return f"a tensor is {given.dtype} {tuple(given.shape)} on {given.device}, was {dtype} on {device}"
            for size, now in zip(shape, given.shape, strict=True):
                if type(size) is int:
                    if size != now:
                        return f"a dim of {now} was specialised to {size}"
                elif isinstance(size, sympy.Symbol) and sizes.setdefault(size, now) != now:
                    return f"dims that were equal are {sizes[size]} and {now}"
        for symbol, now in sizes.items():
            low, high = self.ranges.get(symbol, (0, math.inf))
            if not low <= now <= high:
                return f"a dim of {now} lies outside {low} to {high}"
        for given, (_, _, shape) in zip(tensors, wanted, strict=True):
            for size, now in zip(shape, given.shape, strict=True):
                if isinstance(size, sympy.Expr) and not size.is_Symbol and size.subs(sizes) != now:
                    return f"a dim of {now} was {size}"
        if not self.guards.hold_for(sizes):
            asked = ", ".join(str(sizes[symbol]) for symbol in self.guards.symbols)
            return f"the forward decides by sizes, and for these ({asked}) not as in the call that was captured"
        return None

    def admits(self, sizes: Mapping[sympy.Symbol, int]) -> bool:
        """Return whether a call may have these sizes in its dynamic dims."""
        ranges = ((now, *self.ranges.get(symbol, (0, math.inf))) for symbol, now in sizes.items())
        return all(low <= now <= high for now, low, high in ranges) and self.guards.hold_for(sizes)

    def checker(self, sizes: Sequence[tuple[Size, ...]], called: int) -> Callable[[Sequence[Tensor]], bool]:
        """Generate the checks that `mismatch` makes of tensors, for calls whose sizes change each time.

        Dtypes, devices and numbers of dims of the call's own tensors are known to fit and not checked; those of
        tensors in objects are.

        Args:
            sizes: of all tensors now.
            called: number of the call's own.
        """
        wanted = self.now(sizes)
        scope: dict[str, Any] = {}
        lines: list[str] = []
        checks: list[str] = []
        bound: dict[Any, str] = {}
        for i, (dtype, device, shape) in enumerate(wanted):
            if i >= called:
                scope |= {f"dtype{i}": dtype, f"device{i}": device}
                checks.append(
                    f"t[{i}].dtype is dtype{i} and t[{i}].device == device{i} and t[{i}].ndim == {len(shape)}"
                )
            lines.append(f"s{i} = t[{i}].shape")
            for dim, size in enumerate(shape):
                if type(size) is int:
                    checks.append(f"s{i}[{dim}] == {size}")
                elif isinstance(size, sympy.Symbol) and size not in bound:
                    bound[size] = f"s{i}[{dim}]"
                    low, high = self.ranges.get(size, (0, math.inf))
                    checks.append(f"{int(low)} <= s{i}[{dim}]" + (f" <= {int(high)}" if math.isfinite(high) else ""))
                elif isinstance(size, sympy.Symbol):
                    checks.append(f"s{i}[{dim}] == {bound[size]}")
        for i, (_, _, shape) in enumerate(wanted):
            for dim, size in enumerate(shape):
                if isinstance(size, sympy.Expr) and not size.is_Symbol:
                    names = {symbol: sympy.Symbol(f"n{j}") for j, symbol in enumerate(sorted(bound, key=str))}
                    scope[f"size{i}_{dim}"] = sympy.lambdify(list(names.values()), size.subs(names), "math")
                    values = ", ".join(bound[symbol] for symbol in names)
                    checks.append(f"s{i}[{dim}] == size{i}_{dim}({values})")
        if self.guards.symbols:
            scope["guards"] = self.guards.holds
            checks.append(f"guards({', '.join(bound[symbol] for symbol in self.guards.symbols)})")
        ndims = [line for i, line in enumerate(checks) if " is dtype" in line]
        rest = [line for line in checks if " is dtype" not in line]
        body = [f"if not ({' and '.join(ndims) or True}): return False", *lines, f"return {' and '.join(rest) or True}"]
        newline = "\n    "
        exec(f"def fits(t):{newline}{newline.join(body)}\n", scope)
        fits: Callable[[Sequence[Tensor]], bool] = scope["fits"]
        return fits

    def dynamic_sizes(self, inputs: Sequence[Tensor]) -> dict[sympy.Symbol, int]:
        """Return the sizes that a call with these tensors gives to the dynamic dims."""
        return {
            size: now
            for given, (_, _, shape) in zip(inputs, self.tensors, strict=True)
            for size, now in zip(shape, given.shape, strict=True)
            if isinstance(size, sympy.Symbol)
        }


def _same_constant(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def autocast_now() -> Autocast:
    """Return the dtype that autocast casts to on each device type; None where it is off."""
    return tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in AUTOCAST)


@contextmanager
def kept_autocast() -> Iterator[None]:
    """Keep autocast as it is, if a graph breaks off inside, between where it enters and where it leaves its own."""
    depth = _autocast_depth()
    before = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in AUTOCAST]
    cached = torch.is_autocast_cache_enabled()
    try:
        yield
    except BaseException:
        while _autocast_depth() > depth:
            torch.autocast_decrement_nesting()
        for kind, enabled, dtype in before:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(cached)
        raise


def _autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


@contextmanager
def with_autocast(autocast: Autocast | None = None) -> Iterator[None]:
    """Set autocast on each type of device for the time inside: as `autocast_now` once returned it, by default off."""
    with ExitStack() as settings:
        for kind, dtype in zip(AUTOCAST, autocast or (None,) * len(AUTOCAST), strict=True):
            settings.enter_context(torch.autocast(kind, dtype=dtype, enabled=dtype is not None))
        yield


def training_flags(module: nn.Module) -> tuple[bool, ...]:
    """Return the training flag of every module of a region: train, eval and a frozen norm are three signatures."""
    # Runs at every call, so without `nn.Module.modules`, whose generators cost as much as a small layer.
    return tuple(child.training for child in below(module))


def below(module: nn.Module) -> list[nn.Module]:
    """Return a module and all submodules, in the order of `training_flags`."""
    modules: list[nn.Module] = []
    stack, seen = (
        [module],
        {module},
    )  # not of `id`, at which torch.compile would take each of many equal blocks for another
    while stack:
        modules.append(child := stack.pop())
        for grandchild in child._modules.values():
            if grandchild is not None and grandchild not in seen:
                seen.add(grandchild)
                stack.append(grandchild)
    return modules


def modes_and_hooks(module: nn.Module) -> tuple[Hashable, ...]:
    """Return `training_flags`, and the number of hooks of each kind on submodules that have any."""
    modules = below(module)
    state: list[Hashable] = [child.training for child in modules]
    for i, child in enumerate(modules[1:]):
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
            kinds = child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks
            state.append((i, *map(len, kinds)))
    return tuple(state)


def call_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Hashable, list[Tensor], list[Any]] | None:
    """Return a key that equal calls share, for a look-up that is cheaper than `Signature.mismatch`.

    It contains all that `Signature.mismatch` compares of a call, but for sizes where there are objects (see
    `state_access.foreign`): with a cache these change at each call.

    Returns:
        The key, the tensors, and the objects, each once. None for arguments of unknown types, and for sizes that are
        not plain numbers, as those of nested tensors.
    """
    if torch.compiler.is_compiling():
        return None  # a traced look-up by sizes would make every size a constant
    key: list[Any] = [len(args), len(kwargs), *kwargs]
    tensors: list[Tensor] = []
    objects: list[Any] = []
    if not _describe((*args, *kwargs.values()), key, tensors, objects):
        return None
    if torch._C._is_any_autocast_enabled():
        key.append(autocast_now())
    try:
        key += [t.ndim for t in tensors] if objects else [t.shape for t in tensors]
        hashable = tuple(key)
        hash(hashable)
    except (TypeError, RuntimeError):  # a symbolic size, or none for all samples
        return None
    return hashable, tensors, objects


def _describe(values: Iterable[Any], key: list[Any], tensors: list[Tensor], objects: list[Any]) -> bool:
    """Append to `key` all that `Signature.mismatch` compares but sizes; False for a value of unknown type.

    It runs at every call, so in one loop: whatever stands first for a value says how many entries it has in the key.
    """
    for value in values:
        kind = type(value)
        if value is None or kind is str:
            key.append(value)
        elif isinstance(value, Tensor):
            key += value.dtype, value.device
            tensors.append(value)
        elif kind in (bool, int, float):
            key += kind, value
        elif kind in (tuple, list):
            key += kind, len(value)
            if not _describe(value, key, tensors, objects):
                return False
        elif kind is dict:
            key += kind, len(value), *value
            if not _describe(value.values(), key, tensors, objects):
                return False
        elif foreign(value):
            number = next((i for i, other in enumerate(objects) if other is value), len(objects))
            if number == len(objects):
                objects.append(value)
            key += kind, ObjectLeaf(number)
        else:
            return False
    return True
