"""Probe: experiments on small random tensors that show how an op without a rule treats axes.

    probe(node, operands) -> Probed | None
      -> _Trial            the op at sizes of our choice, in eager, on the CPU
      -> _tied_dims        the dims of the operands that can change their size only together: one axis
      -> _carriers         the dim of each output that has the size of that axis, whatever size that is
      -> _selects          perturbing one entry changes that entry of the outputs and no other, bit for bit;
                           selecting entries before the op equals selecting them after it

An experiment is evidence, not proof, so it decides as little as possible: an axis either passes through the op entry by
entry, or it stays whole. It never decides that an axis is summed over, and never probes an op with state or randomness,
one that shares or writes memory, or one on numbers other than floats. The result must hold at the sizes of the model,
too, not only at small ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor, fx

from ecospa_fx.passes.graph.isolate import seed
from ecospa_fx.passes.graph.nodes import tensor_meta
from ecospa_fx.passes.ir.relations import Operand, Probed

Dim: TypeAlias = tuple[int, int]  # (number of the operand, dim)
OperandShapes: TypeAlias = tuple[tuple[int, ...], ...]

MOST_ENTRIES = 2**22  # of an operand at the sizes of the model; ops on larger operands are not probed
SIZES = (7, 11, 5, 13, 3, 17, 19, 23)  # each axis gets a size of its own, so that none is taken for another
SCALES = (1.0, 1e-2, 1e2)  # of the random entries
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

_RESULTS: dict[Any, tuple[tuple[tuple[int, ...], ...], tuple[tuple[int | None, ...], ...]] | None] = {}


def probe(node: fx.Node, operands: tuple[Operand, ...]) -> Probed | None:
    """Return what experiments show about the op of `node`, or None if they show nothing or must not be run."""
    if not _may_be_probed(node):
        return None
    constants = fx.node.map_arg((node.args, node.kwargs), lambda arg: _TENSOR)
    shapes = _numbers([operand.shape for operand in operands])
    dtypes = tuple(tensor_meta(operand.node)[0].dtype for operand in operands)
    if shapes is None or any(math.prod(shape) > MOST_ENTRIES for shape in shapes):
        return None
    key = (node.target, repr(constants), shapes, dtypes)
    if key not in _RESULTS:
        trial = _Trial(node.target, constants, dtypes)
        with torch.random.fork_rng(devices=()), torch.no_grad():
            seed(0)
            _RESULTS[key] = _investigate(trial, shapes)
    result = _RESULTS[key]
    return None if result is None else Probed(operands, *result)


class _Placeholder:
    def __repr__(self) -> str:
        return "tensor"


_TENSOR: Any = _Placeholder()  # stands for a tensor among the arguments of an op

_NOT_PROBED = ("nondeterministic_seeded", "data_dependent_output", "dynamic_output_shape", "inplace_view")


def _may_be_probed(node: fx.Node) -> bool:
    """Return whether the op of `node` is deterministic, writes and shares no memory, and takes and returns floats."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable:
        return False
    if any(getattr(torch.Tag, name) in op.tags for name in _NOT_PROBED):
        return False
    if any(result.alias_info is not None for result in op._schema.returns):
        return False  # a write into its result would be a write into its operand
    results = tensor_meta(node)
    operands = [meta for source in node.all_input_nodes for meta in (tensor_meta(source) or (None,))]
    return bool(results) and all(meta is not None and meta.is_floating_point() for meta in (*results, *operands))


def _numbers(shapes: Sequence[tuple[Any, ...]]) -> OperandShapes | None:
    """Return shapes with small numbers in place of dynamic sizes."""
    symbols = sorted(
        {s for shape in shapes for size in shape if isinstance(size, sympy.Expr) for s in size.free_symbols}, key=str
    )
    if len(symbols) > 3:
        return None
    values = dict(zip(symbols, (6, 10, 4), strict=False))
    return tuple(
        tuple(int(size.subs(values)) if isinstance(size, sympy.Expr) else size for size in shape) for shape in shapes
    )


class _Trial:
    """An op with its constant arguments, which runs on tensors of any shape."""

    def __init__(self, op: Any, constants: Any, dtypes: tuple[torch.dtype, ...]) -> None:
        self.op, self.constants = op, constants
        self.dtypes = tuple(dtype if dtype in TOLERANCE else torch.float32 for dtype in dtypes)

    def draw(self, shapes: OperandShapes, scale: float = 1.0) -> list[Tensor]:
        """Draw random operands, some entries of which are exactly zero."""
        operands = [torch.randn(shape, dtype=dtype) * scale for shape, dtype in zip(shapes, self.dtypes, strict=True)]
        return [x * (torch.rand(x.shape) > 0.1) for x in operands]

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Return the outputs, or None if the op refuses these operands."""
        args, kwargs = _fill(self.constants, iter(tensors))
        try:
            result = self.op(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError, NotImplementedError):
            return None
        outputs = (result,) if isinstance(result, Tensor) else tuple(result)
        return outputs if all(isinstance(out, Tensor) for out in outputs) else None


def _fill(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Put the next of `tensors` in each place of `value` that stands for one."""
    if value is _TENSOR:
        return next(tensors)
    if isinstance(value, (list, tuple)):
        return type(value)([_fill(item, tensors) for item in value])
    if isinstance(value, dict):
        return {key: _fill(item, tensors) for key, item in value.items()}
    return value


def _investigate(
    trial: _Trial, shapes: OperandShapes
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int | None, ...], ...]] | None:
    """Return the number of the axis of each dim of each operand, and of each dim of each output that carries one."""
    operands = trial.draw(shapes)
    first, second = trial(operands), trial(operands)
    if first is None or second is None or not all(map(_same, first, second)):
        return None
    axes = _tied_dims(trial, shapes)
    if axes is None:
        return None
    free = [axis for axis in axes if len(axis[1]) > 0 and axis[0]]
    if not free:
        return None
    assignments = [
        _resize(shapes, {dims: SIZES[(i + turn) % len(SIZES)] for i, (_, dims) in enumerate(free)}) for turn in range(3)
    ]
    if len(free) > len(SIZES):
        return None
    outputs = [trial(trial.draw(assignment)) for assignment in assignments]
    if any(out is None for out in outputs):
        return None
    axis_number = {dim: number for number, (_, dims) in enumerate(axes) for dim in dims}
    carriers: dict[int, tuple[int, ...]] = {}
    for number, (movable, dims) in enumerate(axes):
        places = _carriers(dims, assignments, outputs, shapes, first) if movable else None
        at_every_size = places is not None and all(
            _selects(trial, sizes, dims, places) for sizes in (*assignments, shapes)
        )
        if places is not None and at_every_size:
            carriers[number] = places
    if not carriers:
        return None
    numbers = tuple(tuple(axis_number[i, d] for d in range(len(shape))) for i, shape in enumerate(shapes))
    results = tuple(
        tuple(next((n for n, places in carriers.items() if places[k] == d), None) for d in range(out.ndim))
        for k, out in enumerate(first)
    )
    return numbers, results


def _tied_dims(trial: _Trial, shapes: OperandShapes) -> list[tuple[bool, tuple[Dim, ...]]] | None:
    """Group the dims of the operands that change their size together, and tell whether they can change it at all.

    Dims of different sizes cannot be one axis. Of equal ones, the smallest set that can be resized alone is one.
    """
    by_size: dict[int, list[Dim]] = {}
    groups: list[tuple[bool, tuple[Dim, ...]]] = []
    for i, shape in enumerate(shapes):
        for d, size in enumerate(shape):
            if size > 1:
                by_size.setdefault(size, []).append((i, d))
            else:
                groups.append((False, ((i, d),)))  # it may be an axis along which the operand repeats
    for size, dims in by_size.items():
        remaining = list(dims)
        while remaining:
            group = next((g for g in _subsets(remaining) if _changes(trial, shapes, g, size + 1)), None)
            movable = group is not None
            group = group or (remaining[0],)
            if movable and any(_changes(trial, shapes, part, size + 1) for part in _proper_subsets(group)):
                return None
            groups.append((movable, group))
            remaining = [dim for dim in remaining if dim not in group]
    return groups


def _subsets(dims: list[Dim]) -> Iterator[tuple[Dim, ...]]:
    """Yield subsets with the first of `dims`, small ones first; of many dims not all."""
    for count in (*range(min(3, len(dims))), *([len(dims) - 1] if len(dims) > 3 else [])):
        for others in itertools.combinations(dims[1:], count):
            yield (dims[0], *others)


def _proper_subsets(group: tuple[Dim, ...]) -> Iterator[tuple[Dim, ...]]:
    for count in range(1, len(group)):
        yield from itertools.combinations(group, count)


def _changes(trial: _Trial, shapes: OperandShapes, dims: tuple[Dim, ...], size: int) -> bool:
    """Return whether the op takes these dims, and these alone, at another size."""
    return trial(trial.draw(_resize(shapes, {dims: size}))) is not None


def _resize(shapes: OperandShapes, sizes: Mapping[tuple[Dim, ...], int]) -> OperandShapes:
    new = [list(shape) for shape in shapes]
    for dims, size in sizes.items():
        for i, d in dims:
            new[i][d] = size
    return tuple(map(tuple, new))


def _carriers(
    dims: tuple[Dim, ...],
    assignments: Sequence[OperandShapes],
    outputs: Sequence[tuple[Tensor, ...] | None],
    shapes: OperandShapes,
    first: tuple[Tensor, ...],
) -> tuple[int, ...] | None:
    """Return the dim of each output that has the size of an axis under every assignment; None unless each has one."""
    i, d = dims[0]
    places = []
    for k, out in enumerate(first):
        carrying = [
            dim
            for dim in range(out.ndim)
            if out.shape[dim] == shapes[i][d]
            and all(
                run is not None and run[k].shape[dim] == a[i][d] for a, run in zip(assignments, outputs, strict=True)
            )
        ]
        if len(carrying) != 1:
            return None
        places.append(carrying[0])
    return tuple(places)


def _selects(trial: _Trial, shapes: OperandShapes, dims: tuple[Dim, ...], places: tuple[int, ...]) -> bool:
    """Return whether entries along an axis pass through the op one by one."""
    i, d = dims[0]
    size = shapes[i][d]
    informative = False
    for scale in SCALES:
        operands = trial.draw(shapes, scale)
        before = trial(operands)
        if before is None:
            return False
        informative |= all(bool(out.isfinite().float().mean() > 0.5) for out in before)
        for entry in {0, size - 1, int(torch.randint(size, ()))}:
            after = trial(_perturb(operands, dims, entry, scale))
            others = torch.tensor([j for j in range(size) if j != entry])
            if after is None or not all(
                _same(a.index_select(at, others), b.index_select(at, others))
                for a, b, at in zip(before, after, places, strict=True)
            ):
                return False
        for amount in {1, size // 2, size - 1} - {0}:
            keep = torch.randperm(size)[:amount].sort().values
            small = [
                x.index_select(next(dim for j, dim in dims if j == k), keep) if any(j == k for j, _ in dims) else x
                for k, x in enumerate(operands)
            ]
            if len({j for j, _ in dims}) != len(dims):
                return False  # twice along one operand: a diagonal
            selected = trial(small)
            if selected is None or not all(
                _close(a.index_select(at, keep), b) for a, b, at in zip(before, selected, places, strict=True)
            ):
                return False
    return informative


def _perturb(operands: Sequence[Tensor], dims: tuple[Dim, ...], entry: int, scale: float) -> list[Tensor]:
    copies = [x.clone() for x in operands]
    for i, d in dims:
        row = copies[i].select(d, entry)
        row.copy_(torch.randn(row.shape, dtype=row.dtype) * 10 * scale)
    return copies


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = TOLERANCE.get(a.dtype, 0.0)
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
